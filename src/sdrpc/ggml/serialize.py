"""Graphs as bytes, for caches on disk, and their digest.

    magic (15 bytes) | blake2b of the rest (32 bytes) | JSON: {"leaves": count, "tensors": [row, …]}

A row has a tensor's fields; references are positions of earlier rows. What a leaf refers to is left out: it is memory
that exists. Nothing in such bytes is trusted: :func:`decode` gives a graph or raises :class:`GraphError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Any, get_type_hints

from ..errors import GraphError
from .ops import params_of
from .params import CLASSES, Params
from .tensor import MAX_DIMS, MAX_SRC, Dims, Graph, Tensor
from .types import TYPES

MAGIC = b"sdrpc graph 1\n\0"
DIGEST_BYTES = 32
MAX_TENSORS = 1 << 20
MAX_NAME = 1 << 10
WORD = 1 << 31
LONG = 1 << 63

Row = list[Any]


def encode(graph: Graph) -> bytes:
    """``graph`` as bytes that are the same in every process."""
    body = _body(graph, names=True)
    return MAGIC + _hash(body) + body


def digest(graph: Graph) -> str:
    """A strong hash, in hex, of all that ``graph`` does: types, layouts, operations, references, places; not names."""
    return _hash(_body(graph, names=False)).hex()


def decode(data: bytes | bytearray | memoryview) -> Graph:
    """The graph in ``data``. Raises :class:`GraphError` for whatever :func:`encode` did not make."""
    view = memoryview(data)
    start = len(MAGIC) + DIGEST_BYTES
    body = view[start:]
    if bytes(view[: len(MAGIC)]) != MAGIC or bytes(view[len(MAGIC) : start]) != _hash(body):
        raise GraphError("damaged, or no encoded graph")
    try:
        table = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise GraphError(f"an encoded graph that is no JSON: {error}") from None
    return _graph(table)


def _hash(data: bytes | memoryview) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def _body(graph: Graph, names: bool) -> bytes:
    rows = {tensor: i for i, tensor in enumerate(graph.tensors)}
    leaves = len(graph.leaves)
    table = {"leaves": leaves, "tensors": [_row(t, rows, i < leaves, names) for t, i in rows.items()]}
    return json.dumps(table, separators=(",", ":")).encode()


def _row(t: Tensor, rows: dict[Tensor, int], is_leaf: bool, names: bool) -> Row:
    place = [t.buffer, t.offset, t.flags, t.name if names else ""]
    if is_leaf:
        return [t.type.name, t.ne, t.nb, "NONE", (), (), None, 0, *place]
    sources = [None if source is None else rows[source] for source in t.src]
    view_src = None if t.view_src is None else rows[t.view_src]
    return [t.type.name, t.ne, t.nb, t.op, t.params, sources, view_src, t.view_offset, *place]


def _graph(table: Any) -> Graph:
    _need(isinstance(table, dict) and set(table) == {"leaves", "tensors"}, "table")
    rows, leaves = table["tensors"], table["leaves"]
    _need(isinstance(rows, list) and len(rows) <= MAX_TENSORS, "tensors")
    _need(_is_int(leaves, 0, len(rows) + 1), "leaves")
    tensors: list[Tensor] = []
    for row in rows:
        tensors.append(_tensor(row, tensors))
    _need(not any(tensor.src or tensor.view_src for tensor in tensors[:leaves]), "leaf")
    return Graph(tuple(tensors[leaves:]))


def _tensor(row: Any, before: list[Tensor]) -> Tensor:
    _need(isinstance(row, list) and len(row) == 12, "row")
    type_name, ne, nb, op, params, src, view_src, view_offset, buffer, offset, flags, name = row
    _need(isinstance(type_name, str) and type_name in TYPES, "type")
    _need(isinstance(op, str) and 0 < len(op) <= MAX_NAME, "operation")
    _need(isinstance(name, str) and len(name) <= MAX_NAME, "name")
    _need(isinstance(src, list) and len(src) <= MAX_SRC, "sources")
    _need(_is_int(flags, -WORD, WORD), "flags")
    for value in (view_offset, buffer, offset):
        _need(_is_int(value, 0, LONG), "place")
    earlier = partial(_earlier, before=before)
    return Tensor(
        TYPES[type_name], _dims(ne), _dims(nb), op, _params(op, params), tuple(map(earlier, src)),
        view_src=earlier(view_src), view_offset=view_offset, buffer=buffer, offset=offset, flags=flags, name=name,
    )  # fmt: skip


def _need(truth: bool, what: str) -> None:
    if not truth:
        raise GraphError(f"an encoded graph with a wrong {what}")


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value < high  # not bool


def _dims(values: Any) -> Dims:
    _need(isinstance(values, list) and len(values) == MAX_DIMS, "shape")
    _need(all(_is_int(value, 0, LONG) for value in values), "shape")
    return values[0], values[1], values[2], values[3]


def _earlier(index: Any, before: list[Tensor]) -> Tensor | None:
    if index is None:
        return None
    _need(_is_int(index, 0, len(before)), "reference")
    found: Tensor = before[index]
    return found


_CHECKS: dict[type, Callable[[Any], bool]] = {
    int: lambda value: _is_int(value, -WORD, WORD),
    float: lambda value: type(value) is float or _is_int(value, -WORD, WORD),
    str: lambda value: isinstance(value, str) and len(value) <= MAX_NAME,
}
_FIELDS: dict[type, tuple[Callable[[Any], bool], ...]] = {
    cls: tuple(_CHECKS[hint] for hint in get_type_hints(cls).values()) for cls in CLASSES
}


def _params(op: str, values: Any) -> Params:
    cls = params_of(op)
    checks = _FIELDS[cls]
    _need(isinstance(values, list) and len(values) == len(checks), "parameter")
    _need(all(check(value) for check, value in zip(checks, values, strict=True)), "parameter")
    return cls(*values)
