"""Deferred arithmetic: operations on arrays of a device, and the small graphs that become of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..device import Buffer
from ..ggml import build
from ..ggml.params import Unary
from ..ggml.tensor import OUTPUT, Graph, Tensor
from ..ggml.types import F32
from .elsewhere import Array
from .run import Place


@dataclass(eq=False)
class Node:
    """An array on the device: at a place, or an operation on operands, which are nodes, numbers or numpy's arrays."""

    shape: tuple[int, ...]
    place: Place | None = None
    op: str = ""
    operands: tuple[Any, ...] = ()
    handle: Callable[[], object] = lambda: None

    @property
    def wanted(self) -> bool:
        """Whether somebody can still ask for its numbers."""
        return self.handle() is not None


class Line(NamedTuple):
    """A tensor of a small graph: a leaf (``op`` empty) or an operation on the tensors of earlier lines, by number."""

    op: str
    shape: tuple[int, ...]
    operands: tuple[int, ...]
    place: tuple[int, int] | None
    """The key of a buffer and an offset."""


class GraphWriter:
    """A graph that is being made of nodes. Its lines say all that decides it but two kinds of operands: single numbers,
    which are told in ``numbers``, each ``step`` bytes behind the last, and arrays of this process, for which ``slot``
    gives places by their sizes."""

    def __init__(self, numbers: Buffer, step: int, slot: Callable[[int], Place]) -> None:
        self._table, self._step, self._slot = numbers, step, slot
        self._lines: list[Line] = []
        self._line_of: dict[Node, int] = {}
        self._places: dict[Node, Place] = {}
        self.numbers: list[float] = []
        self.arrays: list[tuple[Place, Array]] = []
        """Those of this process that are operands, and the places that they have until the graph has run."""
        self.buffers: dict[int, Buffer] = {}
        """Those that the graph uses, by key."""

    @property
    def lines(self) -> tuple[Line, ...]:
        return tuple(self._lines)

    @property
    def table(self) -> Array:
        """The numbers as they are to be in their buffer."""
        table = np.zeros((len(self.numbers), self._step // 4), np.float32)
        table[:, 0] = self.numbers
        return table

    def store(self, node: Node, place: Place) -> None:
        """Compute ``node`` and write it to ``place``."""
        if node in self._line_of:  # it was an operand before, and is written nowhere
            self.copy(node, place)
        else:
            self._places[node] = place
            self._line(node)

    def copy(self, node: Node, place: Place) -> None:
        """Write ``node`` to ``place``, beside where it is or belongs."""
        self._add("CONT", node.shape, (self._line(node),), place)

    def _line(self, node: Node) -> int:
        waiting = [node]
        while waiting:
            now = waiting[-1]
            below = [each for each in now.operands if isinstance(each, Node) and each not in self._line_of]
            if now in self._line_of:
                waiting.pop()
            elif now.place is not None:
                self._line_of[now] = self._add("", now.shape, (), now.place)
                waiting.pop()
            elif below:
                waiting += below
            else:
                operands = tuple(self._operand(each) for each in now.operands)
                self._line_of[now] = self._add(now.op, now.shape, operands, self._places.get(now))
                waiting.pop()
        return self._line_of[node]

    def _operand(self, operand: Any) -> int:
        if isinstance(operand, Node):
            return self._line_of[operand]
        if isinstance(operand, np.ndarray):
            place = self._slot(operand.nbytes)
            self.arrays.append((place, operand))
            return self._add("", operand.shape, (), place)
        at = len(self.numbers) * self._step
        self.numbers.append(float(operand))
        return self._add("", (1,), (), (self._table, at))

    def _add(self, op: str, shape: tuple[int, ...], operands: tuple[int, ...], place: Place | None) -> int:
        at = None
        if place is not None:
            buffer, offset = place
            self.buffers[buffer.key] = buffer
            at = buffer.key, offset
        self._lines.append(Line(op, shape, operands, at))
        return len(self._lines) - 1


def ranked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` with at most four dimensions, as ggml has them: films have one more, and the first ones become one."""
    return shape if len(shape) <= 4 else (prod(shape[:-3]), *shape[-3:])


def graph_of(lines: Sequence[Line]) -> Graph:
    """The graph that ``lines`` describe."""
    tensors: list[Tensor] = []
    nodes: list[Tensor] = []
    for op, shape, operands, place in lines:
        sources = [tensors[number] for number in operands]
        if not op:
            assert place is not None  # noqa: S101
            tensors.append(build.leaf(F32, *reversed(ranked(shape)), buffer=place[0], offset=place[1]))
            continue
        if op == "CONT":
            tensor = build.cont(sources[0], *sources[0].ne)
        elif op in ("NEG", "ABS"):
            tensor = build.node("UNARY", *sources, params=Unary(op))
        elif op == "MEAN":
            nodes.append(build.reshape(sources[0], sources[0].elements))
            tensor = build.node("MEAN", nodes[-1])
        else:
            tensor = build.node(op, *sources)
        if place is not None:
            tensor = replace(tensor, buffer=place[0], offset=place[1], flags=OUTPUT)
        tensors.append(tensor)
        nodes.append(tensor)
    return Graph(tuple(nodes))
