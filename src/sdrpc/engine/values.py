"""A ggml graph in SSA form: which node's result, or which bytes of memory, does each operand really read?

A ggml graph is a sequence of writes to memory: nodes run in order, each reads bytes and writes bytes, and the client
chose every address. :func:`trace` turns it into values that are assigned once. It follows the bytes, not the edges: for
each range of memory it remembers which node wrote it last, so that in-place operations, memory used twice, views of
views and tensors whose bytes were overwritten need no special case.

- An operand whose bytes one node wrote is a view of that node's value; nothing need be in memory for that.
- An operand whose bytes no node wrote is a leaf: a typed view of a buffer.
- An operand whose bytes several nodes wrote is read from memory, and their values are stored there before.
- What the client can still read when the graph has run, bytes of its buffers that no later node overwrote, is stored.

Values that are stored are the roots: everything else is computed only because a root needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Generic, NamedTuple

import torch
from typing_extensions import TypeVar

from sdrpc.errors import GraphError
from sdrpc.ggml.ops import ALIASES, OPS
from sdrpc.ggml.params import NO_PARAMS, Params
from sdrpc.ggml.tensor import Dims, Graph, Tensor, contiguous_strides, extent, is_contiguous
from sdrpc.ggml.types import I8, Type
from sdrpc.ggml.validate import where

from .deadline import checkpoint
from .intervals import Intervals
from .layout import Strided
from .operations import EngineOp, OpName

P_co = TypeVar("P_co", covariant=True, default=object)


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
class Value(Generic[P_co]):
    """An SSA value: the result of one operation, of ggml's or of the engine's own, with parameters of class ``P_co``
    (``Value`` alone: whatever they are).

    ``at`` is its position in the graph; steps run in that order. ``place`` is where a leaf is read; ``store`` is
    where the result is written when it is computed, if it is. ``node`` names the node that errors are reported for.
    ``dtype`` is the one that it is held in, once :mod:`sdrpc.engine.precision` has decided.
    """

    op: OpName
    type: Type
    ne: Dims
    src: tuple[Value | None, ...] = ()
    params: P_co = NO_PARAMS  # type: ignore[assignment]  # where it is left out there are none
    at: int = 0
    place: Place | None = None
    store: Place | None = None
    node: str = ""
    dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        return f"{self.op}:{self.type}{list(self.ne)}@{self.at}"


@dataclass(frozen=True)
class Traced:
    """``roots``: the values that are stored in memory, in order. ``buffers``: the keys of the buffers, in the order in
    which places number them. ``scratch``: sizes of the program's own memories, by their (negative) numbers."""

    roots: tuple[Value, ...]
    buffers: tuple[int, ...]
    scratch: Mapping[int, int]

    @property
    def values(self) -> list[Value]:
        """All values that the roots need, each after its sources, in the order of execution."""
        return ordered(self.roots)


def ordered(roots: Iterable[Value]) -> list[Value]:
    """All values that ``roots`` need, each after its sources and by position in the graph."""
    reached: dict[Value, None] = {}
    stack = list(roots)
    while stack:
        value = stack.pop()
        if value not in reached:
            reached[value] = None
            stack.extend(s for s in value.src if s is not None)
    done: dict[Value, None] = {}
    for value in sorted(reached, key=lambda v: v.at):
        todo = [value]
        while todo:
            value = todo[-1]
            waiting = [s for s in value.src if s is not None and s not in done]
            if waiting:
                todo.extend(waiting)
            else:
                todo.pop()
                done.setdefault(value)
    return list(done)


def same_blocks(value: Value) -> bool:
    """Whether ``value`` is in quantized blocks, and all its operands are in blocks of the same type."""
    return not value.type.plain and all(s is None or s.type is value.type for s in value.src)


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
    """A node that computes: its operands and where its result belongs. ``stored``: it must be in memory, since it
    is read there."""

    node: Tensor
    op: OpName
    params: Params
    at: int
    place: Place
    reads: list[_Read | None] = field(default_factory=list)
    stored: bool = False
    in_place: bool = False  # the operation itself changes memory; there is no value


class _Tracer:
    """Goes over the graph twice. The first pass (:meth:`walk`, :meth:`finish`) finds out which node wrote the bytes
    that each operand reads, and which results must be in memory. The second one (:meth:`values`) makes the values: only
    then is it known which memory is overwritten before all have read it, so that a snapshot is needed."""

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
        """The number of the memory that ``tensor`` lies in, and how many bytes into it.

        A tensor in a buffer says so itself. One in no buffer shares the bytes of another tensor (its ``view_src``; of
        a name for bytes that has none, its first source), whose address is asked in turn; the tensor at the end of
        that chain owns its bytes, and becomes a memory of its own with a negative number.
        """
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
        """Note for each node, in order, what it reads and what it writes.

        Names for bytes are passed over, since their readers follow their address; but one that is declared to
        lie elsewhere than its source (a graph may say so) is a copy. Leaves and tensors without elements do nothing.
        """
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
                self._write(_Write(node, "CONT", NO_PARAMS, at, place, [self._read(source)]))
                continue
            for op, i in UPDATES.get(node.op, ()):
                state, gradient, params = (_there(node.src[j]) for j in (i, 1, 4))
                reads = self._reads((state, gradient, params))
                self._write(_Write(node, op, NO_PARAMS, at, self.place(state), reads))
            reads = self._reads(node.src[: OPS[node.op].reads])
            self._write(_Write(node, _operation(node), node.params, at, place, reads))

    def _reads(self, operands: Iterable[Tensor | None]) -> list[_Read | None]:
        return [None if s is None else self._read(self.place(s)) for s in operands]

    def _same_bytes(self, place: Place, node: Tensor, below: Tensor) -> bool:
        return place[:2] == self._seen_from(node, below)[:2]

    def _seen_from(self, node: Tensor, below: Tensor) -> Place:
        memory, offset = self._address(below)
        return Place(memory, offset + (node.view_offset if node.view_src is not None else 0), *self.place(node)[2:])

    def _map(self, memory: int) -> Intervals:
        return self.maps.setdefault(memory, Intervals())

    def _read(self, place: Place) -> _Read:
        """Who made the bytes of ``place``: one earlier node, whose result it is a view of, or memory. In the second
        case all earlier nodes that wrote part of it are stored before."""
        if not prod(place.ne):  # nobody writes nothing
            if place.memory < 0:
                self._need_scratch(place)
            return _Read(place, None)
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
        number = len(self.writes)
        self.writes[number] = write
        place = write.place
        ranges = self._map(place.memory)
        write.in_place = OPS[write.node.op].partial
        if write.in_place or not place.type.plain or not is_contiguous(place.type, place.ne, place.nb):
            for writer in ranges.writers(place.offset, place.end):
                if writer is not None and writer != IN_MEMORY:
                    self._store(writer)
            write.stored = True
            if place.memory < 0:
                self._need_scratch(place)
            ranges.assign(place.offset, place.end, None)
        else:
            ranges.assign(place.offset, place.end, number)

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
        roots = []
        for number, write in self.writes.items():
            checkpoint()
            node, at = write.node, write.at
            label = where(at, node)
            src = tuple(None if r is None else self._operand(r, at, label, made, overwritten) for r in write.reads)
            if write.in_place:
                target = Value(EngineOp.LEAF, node.type, node.ne, at=at, place=write.place, node=label)
                value = Value(
                    node.op, node.type, node.ne, (target, *src), node.params, at, place=write.place, node=label
                )
            else:
                value = Value(write.op, node.type, node.ne, src, write.params, at, node=label,
                              store=write.place if write.stored else None)  # fmt: skip
            if write.stored:
                roots.append(value)
                place = write.place
                self.stored_last.setdefault(place.memory, Intervals()).assign(place.offset, place.end, at)
            made[number] = value
        return Traced(tuple(roots), tuple(self.buffers), dict(self.scratch))

    def _overwritten(self) -> set[tuple[int, Place]]:
        """Which places that a node (by position) reads from memory are stored to by that node or a later one: found
        from the last node to the first, so that all stores that are known are such."""
        later: dict[int, Intervals] = {}
        found: set[tuple[int, Place]] = set()
        for at, group in groupby(reversed(self.writes.values()), lambda write: write.at):
            checkpoint()
            writes = list(group)
            for place in (write.place for write in writes if write.stored):
                later.setdefault(place.memory, Intervals()).assign(place.offset, place.end, at)
            for read in (read for write in writes for read in write.reads):
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
        leaf = Value(EngineOp.LEAF, place.type, place.ne, at=at, place=place, node=label)
        if (at, place) in overwritten:
            self.snapshots[place] = Value(EngineOp.SNAPSHOT, place.type, place.ne, (leaf,), at=at, node=label)
            return self.snapshots[place]
        return leaf


UPDATES: dict[str, tuple[tuple[EngineOp, int], ...]] = {
    "OPT_STEP_ADAMW": ((EngineOp.ADAMW_MEAN, 2), (EngineOp.ADAMW_SQUARE, 3)),
}
"""Operations that also change memory of sources: what is computed of each, and which source it is. These are values of
their own, written before the operation reads them; their operands are that source, the gradient and the parameters."""


def _there(source: Tensor | None) -> Tensor:
    if source is None:
        raise GraphError("a source is missing")  # validation has counted them
    return source


def _operation(node: Tensor) -> OpName:
    """The operation of the value that ``node`` makes. Products of integers are not MUL_MAT, which may be computed in
    any dtype."""
    weight = node.src[0] if node.op == "MUL_MAT" else None
    return EngineOp.MUL_MAT_I8 if weight is not None and weight.type is I8 else node.op


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
    return Value(EngineOp.VIEW, base.type, strided.ne, (base,), strided, at, node=label or base.node)


def reshaped(base: Value, ne: Dims, at: int) -> Value:
    """``base`` with another shape of as many elements."""
    nb = contiguous_strides(base.type, ne)
    size = base.type.size
    return view(base, Strided(ne, (1, nb[1] // size, nb[2] // size, nb[3] // size)), at)


def trace(graph: Graph) -> Traced:
    """The values of ``graph``, which has been checked. Raises :class:`GraphError` for a read of bytes that no node
    made."""
    tracer = _Tracer(graph)
    tracer.walk()
    tracer.finish()
    return tracer.values()
