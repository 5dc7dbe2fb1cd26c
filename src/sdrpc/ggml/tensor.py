"""Tensors and graphs as immutable values.

``ne`` are the numbers of elements per dimension, the fastest first (a torch shape is ``ne`` reversed); ``nb`` are byte
strides. A tensor lives ``offset`` bytes into a buffer that is known by its key, or nowhere (``buffer`` 0): then it is a
value that only the graph's own nodes read, and the device finds room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from .params import NO_PARAMS, Params
from .types import Type

MAX_DIMS = 4
MAX_SRC = 10
OUTPUT = 2
"""Tensor flag GGML_TENSOR_FLAG_OUTPUT: the client will read this node."""

Dims = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor of a graph: a leaf (op NONE), another name for bytes, or the result of an operation.

    Compared by identity, so that it can be a key. ``view_src`` and ``view_offset`` say which tensor's bytes it shares.
    """

    type: Type
    ne: Dims
    nb: Dims
    op: str = "NONE"
    params: Params = NO_PARAMS
    src: tuple[Tensor | None, ...] = ()
    view_src: Tensor | None = None
    view_offset: int = 0
    buffer: int = 0
    offset: int = 0
    flags: int = 0
    name: str = ""

    def __repr__(self) -> str:
        return f"{self.op}:{self.type}{list(self.ne)}{f' {self.name!r}' if self.name else ''}"

    @property
    def elements(self) -> int:
        return prod(self.ne)

    @property
    def nbytes(self) -> int:
        """Bytes from the first to behind the last element."""
        return extent(self.type, self.ne, self.nb)

    @property
    def contiguous(self) -> bool:
        return is_contiguous(self.type, self.ne, self.nb)

    @property
    def is_output(self) -> bool:
        return bool(self.flags & OUTPUT)


@dataclass(frozen=True)
class Graph:
    """Nodes in the order of execution. Whatever they read that is no node is a leaf."""

    nodes: tuple[Tensor, ...]

    @cached_property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that nodes read or share bytes with and that are no nodes, in order of first use."""
        known = set(self.nodes)
        found: dict[Tensor, None] = {}
        for node in self.nodes:
            for tensor in sources(node):
                if tensor not in known:
                    found.setdefault(tensor)
        return tuple(found)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.leaves + self.nodes


def sources(tensor: Tensor) -> Iterator[Tensor]:
    """All tensors that ``tensor`` refers to: its operands and the one whose bytes it shares."""
    for source in tensor.src:
        if source is not None:
            yield source
    if tensor.view_src is not None:
        yield tensor.view_src


def root(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor that owns the bytes of ``tensor``, and how far into them it begins."""
    offset = 0
    while tensor.view_src is not None:
        tensor, offset = tensor.view_src, offset + tensor.view_offset
    return tensor, offset


def rewrite(graph: Graph, changes: Callable[[Tensor], Mapping[str, Any]]) -> Graph:
    """The graph with the fields that ``changes`` names replaced in each tensor, and all references following.

    Leaves and nodes keep their order, so that ``zip(old.tensors, new.tensors)`` tells what became of what.
    """
    new: dict[Tensor, Tensor] = {leaf: replace(leaf, **changes(leaf)) for leaf in graph.leaves}
    for node in graph.nodes:
        src = tuple(source and new[source] for source in node.src)
        view_src = node.view_src and new[node.view_src]
        new[node] = replace(node, **{"src": src, "view_src": view_src, **changes(node)})
    return Graph(tuple(new[node] for node in graph.nodes))


def contiguous_strides(type: Type, ne: Dims) -> Dims:
    """The byte strides of a dense tensor. Raises :class:`ValueError` when rows are no whole number of blocks."""
    if ne[0] % type.block:
        raise ValueError(f"{ne[0]} elements a row are no whole number of {type}'s blocks of {type.block}")
    nb1 = type.row_bytes(ne[0])
    nb2 = nb1 * ne[1]
    return type.size, nb1, nb2, nb2 * ne[2]


def is_contiguous(type: Type, ne: Dims, nb: Dims) -> bool:
    """Whether the elements lie densely in order; the stride of a dimension of one element does not matter."""
    expected = type.size
    for i in range(MAX_DIMS):
        if ne[i] != 1 and nb[i] != expected and not (i == 0 and ne[0] == type.block):
            return False
        expected = type.row_bytes(ne[0]) if i == 0 else expected * ne[i]
    return True


def extent(type: Type, ne: Dims, nb: Dims) -> int:
    """Bytes from the first to behind the last element (ggml_nbytes)."""
    if not all(ne):
        return 0
    row = (ne[0] - 1) * nb[0] + type.size if type.block == 1 else type.row_bytes(ne[0])
    return row + (ne[1] - 1) * nb[1] + (ne[2] - 1) * nb[2] + (ne[3] - 1) * nb[3]


def dims(*ne: int) -> Dims:
    """``ne`` filled up with ones to four dimensions."""
    padded = (*ne, 1, 1, 1, 1)
    return padded[0], padded[1], padded[2], padded[3]
