"""A ggml graph as values: which node's result, or which bytes of memory, does each operand really read?

A graph's meaning is sequential: nodes run in order, each reads bytes and writes bytes, and the client chose every
address. :func:`trace` follows the bytes, not the edges: for each range of memory it remembers who wrote it last, so
that in-place operations, memory used twice, views of views and stale names all come out right by construction.

- An operand whose bytes one node wrote is a view of that node's value; nothing need be in memory for that.
- An operand whose bytes no node wrote is a leaf: a typed view of a buffer.
- An operand whose bytes came from several places is read from memory, and they are stored there before.
- What the client can still read when the graph has run, bytes of its buffers that no later node overwrote, is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from sdrpc.errors import GraphError
from sdrpc.ggml.params import NO_PARAMS, Params
from sdrpc.ggml.tensor import ALIASES, Dims, Graph, Tensor, contiguous_strides, extent, is_contiguous
from sdrpc.ggml.types import I8, Type

from .deadline import checkpoint
from .intervals import Intervals
from .layout import Strided


class Place(NamedTuple):
    """A tensor in memory. ``memory`` counts the graph's buffers, or is negative: scratch memory of the program."""

    memory: int
    offset: int
    type: Type
    ne: Dims
    nb: Dims

    @property
    def end(self) -> int:
        return self.offset + extent(self.type, self.ne, self.nb)

    def overlaps(self, other: Place) -> bool:
        return self.memory == other.memory and self.offset < other.end and other.offset < self.end


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """The result of one step: an operation of ggml, one that fusion made, or LEAF, VIEW or SNAPSHOT.

    ``at`` is its position in the graph; steps run in that order. ``place`` is where a leaf is read; ``store`` is
    where the result is written when it is computed, if it is. ``node`` says which node is to blame for an error.
    ``dtype`` is the one that it is held in, once :mod:`sdrpc.engine.precision` has decided.
    """

    op: str
    type: Type
    ne: Dims
    src: tuple[Value | None, ...] = ()
    params: Params = NO_PARAMS
    at: int = 0
    place: Place | None = None
    store: Place | None = None
    node: str = ""
    dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        return f"{self.op}:{self.type}{list(self.ne)}@{self.at}"


@dataclass(frozen=True)
class Traced:
    """The values that have to be computed for their effect on memory, in order, the keys of the buffers that places
    count, and the sizes of scratch memories."""

    effects: tuple[Value, ...]
    buffers: tuple[int, ...]
    scratch: Mapping[int, int]

    @property
    def values(self) -> list[Value]:
        """All values that the effects need, each after its sources, in the order of execution."""
        return ordered(self.effects)


def ordered(effects: Iterable[Value]) -> list[Value]:
    """Everything that ``effects`` reach, each after its sources and by position in the graph."""
    reached: dict[Value, None] = {}
    stack = list(effects)
    while stack:
        value = stack.pop()
        if value not in reached:
            reached[value] = None
            stack.extend(s for s in value.src if s is not None)
    done: dict[Value, None] = {}
    for root in sorted(reached, key=lambda v: v.at):
        todo = [root]
        while todo:
            value = todo[-1]
            waiting = [s for s in value.src if s is not None and s not in done]
            if waiting:
                todo.extend(waiting)
            else:
                todo.pop()
                done.setdefault(value)
    return list(done)


def moves_blocks(value: Value) -> bool:
    """Whether ``value`` is blocks of its operands as they are, so that nothing is read out of them or made anew."""
    return (
        value.op in MOVES_BYTES and not value.type.plain and all(s is None or s.type is value.type for s in value.src)
    )


def node_label(at: int, node: Tensor) -> str:
    return f"node {at} ({node.op}{f' {node.name!r}' if node.name else ''})"


OPERANDS = {"CPY": 1, "CONT": 1, "DUP": 1, "SET_ROWS": 2}
"""How many sources an operation reads, where the others only say where to write."""

MOVES_BYTES = frozenset({"SNAPSHOT", "CPY", "CONT", "DUP", "CONCAT"})
"""Operations that give what they got, where the types are the same."""

WRITES_IN_PLACE = frozenset({"SET_ROWS"})
"""Operations that change part of what is in their destination: that memory is state, not a value."""


IN_MEMORY = -1
"""As the writer of a range: several nodes, whose results are all stored."""
MANY = 64
"""Ranges of a read from which on they become one, so that tracing does not take time with the square of the nodes."""


@dataclass
class _Read:
    """What an operand turned out to be: a view of the value that node ``writer`` made, or memory."""

    place: Place
    writer: int | None


@dataclass
class _Write:
    """A node that computes: its operands and where its result belongs."""

    node: Tensor
    at: int
    place: Place
    reads: list[_Read | None] = field(default_factory=list)
    stored: bool = False
    in_place: bool = False  # the operation itself changes memory; there is no value


class _Tracer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.writes: dict[int, _Write] = {}
        self.buffers: dict[int, int] = {}  # keys of buffers → their memory's number
        self.maps: dict[int, Intervals] = {}
        self.virtual: dict[Tensor, int] = {}  # tensors that live in no buffer → their memory's (negative) number
        self.scratch: dict[int, int] = {}
        self.snapshots: dict[Place, Value] = {}
        self.stored_last: dict[int, Intervals] = {}  # by memory, while values are made: which node stored where last

    # where things are

    def place(self, tensor: Tensor) -> Place:
        memory, offset = self._address(tensor)
        return Place(memory, offset, tensor.type, tensor.ne, tensor.nb)

    def _address(self, tensor: Tensor) -> tuple[int, int]:
        offset = 0
        while True:
            if tensor.buffer:
                return self.buffers.setdefault(tensor.buffer, len(self.buffers)), tensor.offset + offset
            offset += tensor.view_offset
            below = tensor.view_src or (tensor.src[0] if tensor.op in ALIASES and tensor.src else None)
            if below is None or below is tensor:
                return self.virtual.setdefault(tensor, -1 - len(self.virtual)), offset
            tensor = below

    # first pass: who reads what

    def walk(self) -> None:
        for at, node in enumerate(self.graph.nodes):
            checkpoint()
            if node.op == "NONE" or not node.elements:
                continue
            place = self.place(node)
            if node.op in ALIASES:
                below = node.view_src or node.src[0]
                if below is None or self._same_bytes(place, node, below):
                    continue
                source = self._seen_from(node, below)
                self._write(_Write(node, at, place, [self._read(source)]))
                continue
            operands = node.src[: OPERANDS.get(node.op)]
            write = _Write(node, at, place)
            write.reads = [None if s is None else self._read(self.place(s)) for s in operands]
            self._write(write)

    def _same_bytes(self, place: Place, node: Tensor, below: Tensor) -> bool:
        return place[:2] == self._seen_from(node, below)[:2]

    def _seen_from(self, node: Tensor, below: Tensor) -> Place:
        memory, offset = self._address(below)
        return Place(memory, offset + (node.view_offset if node.view_src is not None else 0), *self.place(node)[2:])

    def _map(self, memory: int) -> Intervals:
        return self.maps.setdefault(memory, Intervals())

    def _read(self, place: Place) -> _Read:
        writers = self._map(place.memory).writers(place.offset, place.end)
        only = writers[0] if len(writers) == 1 and writers[0] != IN_MEMORY else None
        if only is not None and _viewable(self.writes[only].place, place):
            return _Read(place, only)
        for writer in writers:
            if writer is not None and writer != IN_MEMORY:
                self._store(writer)
        if len(writers) > MANY:  # the next read need not look at all of them again
            self._map(place.memory).assign(place.offset, place.end, IN_MEMORY)
        if place.memory < 0 and writers == [None] and place.memory not in self.scratch:
            raise GraphError(
                f"a {place.type} tensor {list(place.ne)} is read that lives in no buffer and that no node made"
            )
        return _Read(place, None)

    def _store(self, writer: int) -> None:
        write = self.writes[writer]
        write.stored = True
        if write.place.memory < 0:
            self._need_scratch(write.place)

    def _need_scratch(self, place: Place) -> None:
        self.scratch[place.memory] = max(self.scratch.get(place.memory, 0), place.end)

    def _write(self, write: _Write) -> None:
        self.writes[write.at] = write
        place = write.place
        ranges = self._map(place.memory)
        write.in_place = write.node.op in WRITES_IN_PLACE
        if write.in_place or not place.type.plain or not is_contiguous(place.type, place.ne, place.nb):
            for writer in ranges.writers(place.offset, place.end):
                if writer is not None and writer != IN_MEMORY:
                    self._store(writer)
            write.stored = True
            if place.memory < 0:
                self._need_scratch(place)
            ranges.assign(place.offset, place.end, None)
        else:
            ranges.assign(place.offset, place.end, write.at)

    def finish(self) -> None:
        """Store what can be read when the graph has run."""
        for memory, ranges in self.maps.items():
            if memory >= 0:
                for writer in ranges:
                    if writer != IN_MEMORY:
                        self.writes[writer].stored = True

    # second pass: values

    def values(self) -> Traced:
        overwritten = self._overwritten()
        made: dict[int, Value] = {}
        effects = []
        for at, write in self.writes.items():
            checkpoint()
            node = write.node
            label = node_label(at, node)
            src = tuple(None if r is None else self._operand(r, at, label, made, overwritten) for r in write.reads)
            if write.in_place:
                target = Value("LEAF", node.type, node.ne, at=at, place=write.place, node=label)
                value = Value(
                    node.op, node.type, node.ne, (target, *src), node.params, at, place=write.place, node=label
                )
            else:
                value = Value(_operation(node), node.type, node.ne, src, node.params, at, node=label,
                              store=write.place if write.stored else None)  # fmt: skip
            if write.stored:
                effects.append(value)
                place = write.place
                self.stored_last.setdefault(place.memory, Intervals()).assign(place.offset, place.end, at)
            made[at] = value
        return Traced(tuple(effects), tuple(self.buffers), dict(self.scratch))

    def _overwritten(self) -> set[tuple[int, Place]]:
        """Which places that a node (by position) reads from memory are stored to by that node or a later one: found
        from the last node to the first, so that all stores that are known are such."""
        later: dict[int, Intervals] = {}
        found: set[tuple[int, Place]] = set()
        for at, write in reversed(self.writes.items()):
            checkpoint()
            if write.stored:
                place = write.place
                later.setdefault(place.memory, Intervals()).assign(place.offset, place.end, at)
            for read in write.reads:
                if read is not None and read.writer is None and read.place.memory in later:
                    place = read.place
                    if later[place.memory].touches(place.offset, place.end):
                        found.add((at, place))
        return found

    def _is_current(self, snapshot: Value, place: Place) -> bool:
        """Whether nobody has stored to ``place`` since ``snapshot`` of it was taken."""
        stored = self.stored_last.get(place.memory)
        if stored is None:
            return True
        writers = stored.writers(place.offset, place.end)
        if not all(writer is None or writer < snapshot.at for writer in writers):
            return False
        if len(writers) > MANY:
            stored.assign(place.offset, place.end, snapshot.at - 1)
        return True

    def _operand(
        self, read: _Read, at: int, label: str, made: Mapping[int, Value], overwritten: set[tuple[int, Place]]
    ) -> Value:
        place = read.place
        if read.writer is not None:
            return view(made[read.writer], relative(self.writes[read.writer].place, place), at, label)
        snapshot = self.snapshots.get(place)
        if snapshot is not None and self._is_current(snapshot, place):
            return snapshot
        leaf = Value("LEAF", place.type, place.ne, at=at, place=place, node=label)
        if (at, place) in overwritten:
            self.snapshots[place] = Value("SNAPSHOT", place.type, place.ne, (leaf,), at=at, node=label)
            return self.snapshots[place]
        return leaf


def _operation(node: Tensor) -> str:
    """What the value of ``node`` is called. Names for bytes copy those of several places; products of integers are not
    MUL_MAT, which may be computed in any dtype."""
    if node.op in ALIASES:
        return "CONT"
    weight = node.src[0] if node.op == "MUL_MAT" else None
    return "MUL_MAT_I8" if weight is not None and weight.type is I8 else node.op


def _viewable(writer: Place, reader: Place) -> bool:
    """Whether ``reader`` is elements of what ``writer`` holds: the same type, and offsets in whole elements."""
    size = writer.type.size
    return (
        reader.type is writer.type
        and writer.offset <= reader.offset
        and reader.end <= writer.end
        and (reader.offset - writer.offset) % size == 0
        and all(b % size == 0 for b, n in zip(reader.nb, reader.ne, strict=True) if n != 1)
    )


def relative(writer: Place, reader: Place) -> Strided:
    """``reader`` as elements of the dense array that ``writer`` is."""
    size = writer.type.size
    strides = tuple(b // size for b in reader.nb)
    return Strided(reader.ne, (strides[0], strides[1], strides[2], strides[3]), (reader.offset - writer.offset) // size)


def view(base: Value, strided: Strided, at: int, label: str = "") -> Value:
    """``strided`` elements of ``base``; ``base`` itself where that is all of it in its own shape."""
    if strided.dense and strided.ne == base.ne:
        return base
    return Value("VIEW", base.type, strided.ne, (base,), strided, at, node=label or base.node)


def reshaped(base: Value, ne: Dims, at: int) -> Value:
    """``base`` with another shape of as many elements."""
    nb = contiguous_strides(base.type, ne)
    size = base.type.size
    return view(base, Strided(ne, (1, nb[1] // size, nb[2] // size, nb[3] // size)), at)


def trace(graph: Graph) -> Traced:
    """The values of ``graph``, which has been checked. Raises :class:`GraphError` for a read of what nobody made."""
    tracer = _Tracer(graph)
    tracer.walk()
    tracer.finish()
    return tracer.values()
