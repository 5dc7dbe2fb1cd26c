"""Validates untrusted graphs, in full, before any of their bytes is touched.

:func:`check` takes a graph from any peer. When it returns, every tensor lies inside its buffer, aligned to
its elements; nodes read what exists before them; operands, parameters and results fit the table of operations; output
strides don't overlap; names for bytes agree with the bytes that they name. The contents of tensors (row indices, for
one) are not checked here: kernels check them when they read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ..errors import GraphError, UnsupportedOperation
from .memory_planner import last_uses
from .ops import ALIASES, OPS, destination, infer
from .params import Permute, View
from .rules.base import injective
from .rules.copies import permuted
from .tensor import Dims, Graph, Tensor, extent, root

KNOWN_OPS = frozenset(OPS)
MAX_BYTES = 1 << 40
"""Default bound of what a graph's own values may take at one time: practically none, for trusted graphs."""

Place = tuple[object, int]
"""Where a tensor's bytes begin: a buffer's key, or the node that owns managed memory, and an offset."""


def check(
    graph: Graph,
    sizes: Mapping[int, int],
    *,
    managed: bool = True,
    max_bytes: int = MAX_BYTES,
    ops: frozenset[str] = KNOWN_OPS,
) -> None:
    """Check ``graph``, whose buffers have these ``sizes`` in bytes by key.

    ``managed``: nodes may live in no buffer; what they need at one time may not exceed ``max_bytes``. ``ops`` are the
    operations that are allowed. Raises :class:`GraphError` for the first thing that is invalid, and
    :class:`UnsupportedOperation`, naming all of them, if some nodes are valid but can't be computed.
    """
    positions: dict[Tensor, int] = {}
    unsupported: dict[str, list[str]] = {}
    for leaf in graph.leaves:
        try:
            _check_leaf(leaf, sizes)
        except GraphError as error:
            raise GraphError(error.reason, f"leaf {leaf!r}") from None
    known = set(graph.leaves)
    for position, node in enumerate(graph.nodes):
        try:
            _check_order(node, positions, known)
            _check_memory(node, sizes, managed, max_bytes)
            if node.op not in ops:
                raise UnsupportedOperation("operation not supported")
            infer(node.op, node.params, node.src, node.type, node.ne)
            if node.op in ALIASES:
                _check_alias(node)
            else:
                _check_written(node)
        except UnsupportedOperation as error:
            unsupported.setdefault(f"{node.op}: {error.reason}", []).append(where(position, node))
        except GraphError as error:
            raise GraphError(error.reason, where(position, node)) from None
        positions[node] = position
    if unsupported:
        raise UnsupportedOperation("; ".join(f"{what} ({_some(nodes)})" for what, nodes in unsupported.items()))
    if managed:
        _check_peak(graph, max_bytes)


def where(position: int, node: Tensor) -> str:
    """How messages name a node."""
    return f"node {position} ({node.op}{f' {node.name!r}' if node.name else ''})"


def place(tensor: Tensor) -> Place:
    """Where the bytes begin: two tensors with the same place share their first byte."""
    return (tensor.buffer, tensor.offset) if tensor.buffer else root(tensor)


def _some(nodes: list[str], shown: int = 3) -> str:
    more = f" and {len(nodes) - shown} more" if len(nodes) > shown else ""
    return ", ".join(nodes[:shown]) + more


def _check_order(node: Tensor, positions: Mapping[Tensor, int], leaves: set[Tensor]) -> None:
    if node in positions:
        raise GraphError(f"is node {positions[node]} already")
    for source in (*node.src, node.view_src):
        if source is not None and source not in positions and source not in leaves:
            raise GraphError(f"reads {source!r}, which is computed later")


def _check_leaf(leaf: Tensor, sizes: Mapping[int, int]) -> None:
    _check_layout(leaf)
    if not leaf.buffer:
        raise GraphError("lives in no buffer")
    _check_inside(leaf, sizes)


def _check_memory(node: Tensor, sizes: Mapping[int, int], managed: bool, max_bytes: int) -> None:
    _check_layout(node)
    if node.buffer:
        _check_inside(node, sizes)
    elif not managed or (node.op == "NONE" and node.view_src is None):
        raise GraphError("lives in no buffer")
    if (source := node.view_src) is not None:
        end = node.view_offset + extent(node.type, node.ne, node.nb)
        if node.view_offset < 0 or end > source.nbytes:
            raise GraphError(f"bytes {node.view_offset} to {end} of {source!r}, which has {source.nbytes}")
        if source.view_src is not None:  # ggml flattens names of names; a long chain would also be slow to follow
            raise GraphError(f"its source {source!r} is itself a name for other bytes")
        if source.type != node.type:
            raise GraphError(f"{node.type} over bytes of {source.type}")
        if node.buffer != source.buffer or (node.buffer and node.offset != source.offset + node.view_offset):
            raise GraphError(f"is not where its source {source!r} is")
    elif not node.buffer:
        dense = _dense(node)
        if extent(node.type, node.ne, node.nb) != dense:
            raise GraphError(f"strides {list(node.nb)} of {list(node.ne)} leave holes")
        if dense > max_bytes:
            raise GraphError(f"needs {dense} bytes; {max_bytes} are allowed")


def _check_layout(tensor: Tensor) -> None:
    """Shape and strides by themselves."""
    block, size, ne, nb = tensor.type.block, tensor.type.size, tensor.ne, tensor.nb
    if ne[0] < 0 or ne[1] < 0 or ne[2] < 0 or ne[3] < 0:
        raise GraphError(f"shape {list(ne)}")
    if ne[0] % block:
        raise GraphError(f"rows of {ne[0]} elements are no whole number of {tensor.type}'s blocks of {block}")
    if block != 1 and nb[0] != size:
        raise GraphError(f"blocks of {size} bytes at a stride of {nb[0]}")
    least = size if ne[0] and ne[1] and ne[2] and ne[3] else 0  # where there are no elements, their distance may be 0
    for n, stride in zip(ne, nb, strict=True):
        # the stride of a dimension of one element is never used
        if n > 1 and (stride < least or stride % size):
            raise GraphError(f"strides {list(nb)} of elements of {size} bytes")


def _dense(tensor: Tensor) -> int:
    ne = tensor.ne
    return tensor.type.row_bytes(ne[0]) * ne[1] * ne[2] * ne[3]


def _check_inside(tensor: Tensor, sizes: Mapping[int, int]) -> None:
    size = sizes.get(tensor.buffer)
    if size is None:
        raise GraphError(f"buffer {tensor.buffer} does not exist")
    offset, end = tensor.offset, tensor.offset + extent(tensor.type, tensor.ne, tensor.nb)
    if offset < 0 or end > size:
        raise GraphError(f"bytes {offset} to {end} of a buffer of {size}")
    if tensor.type.block == 1 and offset % tensor.type.size:
        raise GraphError(f"elements of {tensor.type.size} bytes at offset {offset}")
    if _dense(tensor) > size:  # overlapping strides must not amplify memory
        raise GraphError(f"{list(tensor.ne)} elements in a buffer of {size} bytes")


def _check_alias(node: Tensor) -> None:
    """A name for bytes has the layout and the place that its operation says."""
    source = node.src[0] if node.src else None
    if source is None:  # NONE: whatever its view_src says
        return
    if node.view_src is None:
        raise GraphError("has no source of its bytes")
    shift = 0
    if node.op == "VIEW":
        shift = _view_offset(node)
    elif node.op == "RESHAPE":
        if not node.contiguous:
            raise GraphError(f"strides {list(node.nb)} of a reshaped tensor")
    elif not _same_strides(node.ne, node.nb, _permuted_strides(node, source)):
        raise GraphError(f"strides {list(node.nb)} are not those of its source {source!r}, {list(source.nb)}")
    owner, offset = place(source)
    if place(node) != (owner, offset + shift):
        raise GraphError(f"is not where its source {source!r} is")


def _permuted_strides(node: Tensor, source: Tensor) -> Dims:
    axes = node.params if isinstance(node.params, Permute) else (1, 0, 2, 3)
    return permuted(source.nb, axes)


def _view_offset(node: Tensor) -> int:
    low, high = cast(View, node.params)  # infer has checked the class
    return (low & 0xFFFFFFFF) + (high << 32)


def _same_strides(ne: Dims, nb: Dims, other: Dims) -> bool:
    return all(a == b for n, a, b in zip(ne, nb, other, strict=True) if n > 1)


def _check_written(node: Tensor) -> None:
    if not injective(node.type, node.ne, node.nb):
        raise GraphError(f"writes {list(node.ne)} with strides {list(node.nb)} that overlap")
    for i in OPS[node.op].updates:
        state = node.src[i]
        if state is not None and not injective(state.type, state.ne, state.nb):
            raise GraphError(f"changes {state!r}, whose strides {list(state.nb)} overlap")
    into = destination(node)
    if into is not None and (place(node) != place(into) or not _same_strides(node.ne, node.nb, into.nb)):
        raise GraphError(f"is not where its destination {into!r} is")


def _check_peak(graph: Graph, max_bytes: int) -> None:
    """The most that values in no buffer take at one time, if each goes after its last reader."""
    dying = last_uses(graph)
    live = 0
    for position, node in enumerate(graph.nodes):
        if not node.buffer and node.view_src is None:
            live += _dense(node)
            if live > max_bytes:
                reason = f"the graph's values need {live} bytes up to here; {max_bytes} are allowed"
                raise GraphError(reason, where(position, node))
        live -= sum(_dense(value) for value in dying[position])
