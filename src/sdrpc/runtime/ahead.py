"""Arrays that stay on a device: what is computed with them is told to the device, and nobody waits for it.

A sampler's arithmetic over :class:`DeviceArray` makes expressions. They become a small graph when a lowered module
needs one of them as its input, or somebody wants to see the numbers. Nothing is read before that, so a client is
several steps ahead of its device, and the time that messages take does not count. Numbers that come from elsewhere are
no reason to wait, either: what the device is to be told behind them is kept until they are there.

Arithmetic is numpy's, operation by operation in float32: results are the same, bit for bit, on a device that computes
float32 as it is written down; but means, which devices add up in their own order. What is none of the operations here
is done by numpy, with numbers that are read.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..device import Buffer, Bytes, Device, Later, Program, Span, Turns
from ..errors import DeviceLost
from ..ggml.memory_planner import aligned
from .chain import Turn
from .deferred import GraphWriter, Line, Node, graph_of, ranked
from .elsewhere import NUMPY, Array, Elsewhere
from .run import Executable, Place, compiled

PROGRAMS = 64
"""Small graphs that are kept: a sampler repeats a few."""
NUMBERS = 64
"""Single numbers of one graph, at most."""
PACE = 0.05
"""Seconds between two looks at how far the device is: so often it has nothing queued while it answers."""
LOOKS = 2
"""How many of them may be unanswered."""


class DeviceArray(Elsewhere):
    """An array on a device."""

    def __init__(self, ahead: Ahead, node: Node) -> None:
        self.ahead, self._node = ahead, node
        node.handle = weakref.ref(self)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._node.shape

    def read(self) -> Array:
        return self.ahead.read(self)

    def rows(self, rows: Any) -> DeviceArray | None:
        return self.ahead.rows(self, rows)

    def apply(self, op: str, *others: Any) -> Any:
        return self.ahead.apply(op, self, *others)


class _Told(NamedTuple):
    """What a device is still to be told, and what has to be there before."""

    tell: Callable[[], None]
    awaits: Later | None = None


class _Question(Later):
    """A question to a device, which it is still to be asked if there is something before it."""

    def __init__(self, ahead: Ahead) -> None:
        self._ahead = ahead
        self.answer: Later | None = None

    def wait(self) -> Bytes:
        while self.answer is None:
            self._ahead.go_on()
        return self.answer.wait()

    def shows_at(self) -> int | None:
        return None if self.answer is None else self.answer.shows_at()


class Ahead:
    """A device that is told what to compute before it is its turn. ``close`` frees what it has there. ``turns``: when
    it may be used, where that is not up to the device alone."""

    def __init__(self, device: Device, turns: Turn | None = None) -> None:
        self.device = device
        self.turns: Turn | Turns = turns or device.turns
        self._held: deque[_Told] = deque()
        self._pending: list[weakref.ref[Node]] = []
        self._results: list[weakref.ref[Node]] = []
        self._programs: OrderedDict[tuple[Line, ...], Program] = OrderedDict()
        self._free: dict[int, list[Place]] = {}
        self._sizes, self._sizes_before = set[int](), set[int]()
        """Of the arrays since the last beginning, and of those between the last two."""
        self.life = device.life
        """What it has is there only in this life of the device."""
        self._buffers: list[Buffer] = []
        self._room: Buffer | None = None
        self._step = aligned(4, device.alignment)
        self._numbers = self._allocate(NUMBERS * self._step)
        self._looks: deque[tuple[_Question, list[Callable[[], None]]]] = deque()
        self._later: list[Callable[[], None]] = []
        self._due: list[Callable[[], None]] = []
        self._every, self._since = 1, 0
        self._seen = time.monotonic()

    def begin(self) -> None:
        """Something new begins: who waited for what was told before is not told any more, nor is the device what it was
        still to be told. (It may have been cancelled.)"""
        self._held.clear()
        self._looks = deque((asked, []) for asked, _ in self._looks if asked.answer is not None)
        self._later, self._due = [], []
        self._sizes, self._sizes_before = set(), self._sizes

    def _check(self) -> None:
        """Raises :class:`DeviceLost` when the device was lost and somebody had it again: what was there is nowhere."""
        if self.life != self.device.life:
            raise DeviceLost(f"{self.device.name} was lost meanwhile, with all that was on it")

    # --- arrays

    def put(self, array: Array) -> DeviceArray:
        """``array`` on the device."""
        with self.turns:
            self._check()
            place = self._slot(array.nbytes)  # first: what is drawn now has this size
            self._give_back()
            self._write(place, array)
        return self._array(self._stored(array.shape, place))

    def read(self, array: DeviceArray) -> Array:
        """Its numbers, when the device has done all that it was told."""
        with self.turns:
            self._check()
            place = self._place(array)
            self.catch_up()
            data = self.device.read(*place, 4 * array.size)
            while self._looks:  # they were answered before
                self._answer()
            self._due, self._later = self._due + self._later, []
        return np.frombuffer(bytes(data), np.float32).reshape(array.shape)

    def rows(self, array: DeviceArray, rows: Any) -> DeviceArray | None:
        """Consecutive rows of the first dimension; None where they can't be a part of what is on the device."""
        if not isinstance(rows, slice):
            return None
        start, stop, step = rows.indices(array.shape[0])
        if (start, stop, step) == (0, len(array), 1):
            return array
        offset = start * 4 * prod(array.shape[1:])
        node = array._node
        if step != 1 or stop <= start or node.place is None or offset % self.device.alignment:
            return None
        buffer, at = node.place
        part = Node((stop - start, *array.shape[1:]), (buffer, at + offset), "PART", (node,))
        self._results.append(weakref.ref(part))
        return self._array(part)

    def apply(self, op: str, array: DeviceArray, *others: Any) -> Any:
        """An operation with ``array`` as the first operand; by numpy where the second one is nothing for a device."""
        for other in others:
            if not self._takes(array, other):
                return NUMPY[op](np.asarray(array), np.asarray(other) if isinstance(other, DeviceArray) else other)
        operands = tuple(each._node if isinstance(each, DeviceArray) else each for each in (array, *others))
        node = Node(() if op == "MEAN" else array.shape, None, op, operands)
        self._pending.append(weakref.ref(node))
        made = self._array(node)
        if len(self._pending) == NUMBERS:  # each has one number at most
            with self.turns:
                self._compute([])
        return made

    def _takes(self, array: DeviceArray, other: Any) -> bool:
        if isinstance(other, DeviceArray):
            return other.ahead is self and other.shape == array.shape
        if isinstance(other, np.ndarray):
            fits = other.ndim == len(array.shape) and all(
                b in (1, a) for a, b in zip(ranked(array.shape), ranked(other.shape), strict=True)
            )
            return other.dtype == np.float32 and fits
        return type(other) in (np.float32, float, int)

    def _array(self, node: Node) -> DeviceArray:
        return DeviceArray(self, node)

    def _place(self, array: DeviceArray) -> Place:
        """Where its numbers are, or will be."""
        if array._node.place is None:
            self._compute([])
        assert array._node.place is not None  # noqa: S101
        return array._node.place

    # --- what comes from other devices, in whose turn this is as well

    def ask(self, array: DeviceArray) -> Later:
        """Ask for its numbers, as bytes."""
        return self._ask_for(self._place(array), 4 * array.size)

    def arriving(self, awaited: Later, shape: tuple[int, ...]) -> DeviceArray:
        """An array of which the numbers will come. What the device is told from now on it is told behind them."""
        place = self._slot(4 * prod(shape))
        self._held.append(_Told(lambda: self.device.write(*place, awaited.wait()), awaited))
        return self._array(self._stored(shape, place))

    def copied(self, array: DeviceArray) -> DeviceArray | None:
        """An array of another device, here, if the devices do that among themselves."""
        there, size = array.ahead, 4 * array.size
        place, source = self._slot(size), there._place(array)
        copy = self._array(self._stored(array.shape, place))
        done = there.device.copy_to(Span(there.device, *source, size), Span(self.device, *place, size))
        return copy if done else None

    @property
    def awaited(self) -> Later | None:
        """What has to be there before the device is told more; None: nothing."""
        return self._held[0].awaits if self._held else None

    def go_on(self) -> None:
        """Wait for what is awaited, and tell the device that and what is behind it, up to what else is awaited."""
        self._check()
        self._held.popleft().tell()
        while self._held and self._held[0].awaits is None:
            self._held.popleft().tell()

    def catch_up(self) -> None:
        """Tell the device all that it is to be told."""
        while self._held:
            self.go_on()

    def _tell(self, tell: Callable[[], None]) -> None:
        if self._held:
            self._held.append(_Told(tell))
        else:
            tell()

    @property
    def _holds_work(self) -> bool:
        """Whether the device is still to be told of something that reads and writes."""
        return any(told.awaits is None for told in self._held)

    def _write(self, place: Place, array: Array) -> None:
        """Bytes may go before those that are awaited, but not before work that was told earlier."""
        self._check()
        data = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8)
        if self._holds_work:
            self._tell(partial(self.device.write, *place, data.tobytes()))
        else:
            self.device.write(*place, data.data)

    def _ask_for(self, place: Place, size: int) -> _Question:
        self._check()
        question = _Question(self)

        def ask() -> None:
            question.answer = self.device.read_later(*place, size)

        self._tell(ask)
        return question

    # --- modules

    def run(self, program: Executable, inputs: Mapping[str, Any]) -> list[DeviceArray]:
        """The module's outputs of ``inputs``, of which some are arrays on the device, in whose turn this is."""
        self._check()
        saved = [node for each in self._results if (node := each()) is not None and node.wanted]
        if self._holds_work:  # which may be this program, with other inputs
            self.catch_up()
        places = program.prepare({name: each for name, each in inputs.items() if not isinstance(each, DeviceArray)})
        wanted = [
            (each._node, place)
            for name, each in inputs.items()
            if isinstance(each, DeviceArray)
            for place in places[name]
        ]
        self._compute(wanted, saved)
        self._results.clear()
        results = []
        self._tell(program.start)
        for shape, place in program.outputs():
            node = Node(shape, place)
            self._results.append(weakref.ref(node))
            results.append(self._array(node))
        self._look()
        return results

    def keep(self) -> None:
        """Move what the last module gave to places of its own: the module may leave the device before it is read."""
        saved = [node for each in self._results if (node := each()) is not None and node.wanted]
        self._results.clear()
        with self.turns:
            self._compute([], saved)

    # --- how far the device is

    def then(self, told: Callable[[], None]) -> None:
        """Call ``told`` when it is known that the device has done all that it was told so far."""
        self._later.append(told)

    def finish(self) -> None:
        """Wait until the device has done everything."""
        with self.turns:
            self._ask()
            while self._looks:
                self._answer()
        self.tell()

    def tell(self) -> None:
        """Call those who wait for what the device has done, outside of its turn."""
        due, self._due = self._due, []
        for told in due:
            told()

    def _look(self) -> None:
        self._since += 1
        if self._since < self._every:
            return
        self._ask()
        while len(self._looks) > LOOKS:
            self._answer()

    def _ask(self) -> None:
        if not self._looks:  # nothing was under way: the time since then was nobody's
            self._seen = time.monotonic()
        self._looks.append((self._ask_for((self._numbers, 0), 4), self._later))
        self._later, self._since = [], 0

    def _answer(self) -> None:
        asked, told = self._looks.popleft()
        asked.wait()
        now = time.monotonic()
        took, self._seen = now - self._seen, now
        self._every = max(1, min(2 * self._every, int(PACE * self._every / max(took, 1e-6))))
        self._due += told

    # --- graphs

    def _compute(self, wanted: Sequence[tuple[Node, Place]], saved: Sequence[Node] = ()) -> None:
        """Compute what somebody still has a handle of, and put ``wanted`` nodes where they are wanted; ``saved`` get a
        place of their own, because theirs is written next."""
        alive = [node for each in self._pending if (node := each()) is not None and node.wanted]
        self._pending.clear()
        if not (alive or wanted or saved):
            return
        self._check()
        graph = GraphWriter(self._numbers, self._step, self._slot)
        moved = [(node, self._slot(4 * prod(node.shape))) for node in saved]
        for node, place in moved:
            graph.copy(node, place)
        stored = []
        for node in alive:
            if node.place is None:
                place = self._slot(4 * prod(node.shape))
                graph.store(node, place)
                stored.append((node, place))
        for node, place in wanted:
            graph.copy(node, place)
        self._start(graph)
        for node, place in (*moved, *stored):
            node.op, node.operands = "", ()
            self._stored(node.shape, place, node)

    def _start(self, graph: GraphWriter) -> None:
        """Tell the device to compute ``graph``, with what of this process it needs."""
        for place, array in graph.arrays:
            self._write(place, array)
        if graph.numbers:
            self._write((self._numbers, 0), graph.table)
        lines = graph.lines
        program = self._programs.get(lines)
        if program is None:
            program = self._programs[lines] = compiled(self.device, graph_of(lines), graph.buffers, self._scratch)
        self._programs.move_to_end(lines)
        while len(self._programs) > PROGRAMS:
            self._programs.popitem(last=False)
        self._tell(program.run)
        for place, array in graph.arrays:
            self._free.setdefault(array.nbytes, []).append(place)

    def _stored(self, shape: tuple[int, ...], place: Place, node: Node | None = None) -> Node:
        """A node at ``place``, which is free again when nobody has the node any more."""
        found = node or Node(shape)
        found.place = place
        weakref.finalize(found, self._free.setdefault(4 * prod(shape), []).append, place)
        return found

    def _give_back(self) -> None:
        """Free the places of sizes that neither what is drawn now nor what was drawn before it has: those of pictures
        of another size, which may not come again. Nothing may be left to tell, which may be about them."""
        if self._held:
            return
        gone = [places for size, places in self._free.items() if size not in self._sizes | self._sizes_before]
        keys = {buffer.key for places in gone for buffer, _ in places}
        if not keys:
            return
        for key in [key for key in self._programs if any(line.place and line.place[0] in keys for line in key)]:
            del self._programs[key]
        for buffer in [buffer for buffer in self._buffers if buffer.key in keys]:
            self.device.free(buffer)
            self._buffers.remove(buffer)
        for places in gone:
            places.clear()  # the lists stay: arrays that somebody has will be put into them

    def _slot(self, size: int) -> Place:
        self._sizes.add(size)
        free = self._free.setdefault(size, [])
        if not free:
            return self._allocate(size), 0
        # always the oldest: steps then take the same places in turn, and their graphs repeat
        return free.pop(min(range(len(free)), key=lambda i: free[i][0].key))

    def _allocate(self, size: int) -> Buffer:
        buffer = self.device.allocate(size)
        self._buffers.append(buffer)
        return buffer

    def _scratch(self, size: int) -> Buffer:
        """Memory for the nodes of small graphs, which have it in turn."""
        if self._room is None or self._room.size < size:
            self._room = self._allocate(size)
        return self._room

    def close(self) -> None:
        """Free its memory on the device, in whose turn this is."""
        self._held.clear()
        for buffer in self._buffers:
            self.device.free(buffer)
        self._buffers.clear()
