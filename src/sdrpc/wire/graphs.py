"""GRAPH_COMPUTE's payload ↔ :class:`sdrpc.ggml.tensor.Graph`.

    device u32 | uid u64 (from 8.0) | n_nodes u32 | node ids u64[n_nodes] | n_tensors u32 | rpc_tensor[n_tensors]

Tensors refer to each other by ids that the client chose. What is checked here is structure: that counts and sizes
agree, ids are unique and known, numbers of operations and types exist in the dialect, and every node comes after the
nodes that it reads. Whether the operations make sense is :mod:`sdrpc.ggml.validate`'s to say.

A tensor that is no node is memory that exists, whatever operation once filled it: it becomes a leaf, and what it refers
to is not followed. (A scheduler that splits a graph over devices sends the whole ancestry of each part.) So does a node
that is not marked as COMPUTE: a branch that the client has not chosen this time.

One node may read itself: ggml makes a cast as a CPY whose destination, source 1, is the result. Here that is a CPY with
one operand. A CONCAT with a tensor without elements is here the copy that it is, a CONT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..device import Bytes
from ..errors import GraphError, LocalProtocolError, RemoteProtocolError, UnsupportedOperation
from ..ggml import fork, params
from ..ggml.dialect import Dialect
from ..ggml.ops import ALIASES, params_of
from ..ggml.tensor import MAX_SRC, Dims, Graph, Tensor, contiguous_strides
from ..ggml.types import Type
from .records import Columns, Record, columns, encode_records, is_name_length, record_bytes

DEVICE = Struct("<I")
DEVICE_AND_UID = Struct("<IQ")
COUNT = Struct("<I")
ID_BYTES = 8
WORD = 1 << 32
COMPUTE = 16
"""Tensor flag GGML_TENSOR_FLAG_COMPUTE: nodes without it are passed over (3.6.0 does not know it)."""

Resolve = Callable[[int, int], tuple[int, int]]
"""A server's (buffer handle, data address) → (buffer key, offset). Raises RemoteProtocolError for what is not there."""
Locate = Callable[[int, int], tuple[int, int]]
"""A client's (buffer key, offset) → (buffer handle, data address)."""


class Received(NamedTuple):
    """A graph as it came, on the device with this number."""

    device: int
    graph: Graph


class Parts(NamedTuple):
    """A payload taken apart: nothing but counts and sizes is checked. ``uid`` is 0 where the dialect has none;
    ``body`` is all that follows it."""

    device: int
    uid: int
    body: Bytes
    node_ids: NDArray[np.uint64]
    tensors: Bytes
    name_length: int  # 0 when there is no tensor to tell it


def _head(dialect: Dialect) -> Struct:
    return DEVICE_AND_UID if dialect.has_graph_uids else DEVICE


def split(payload: Bytes, dialect: Dialect) -> Parts:
    """Take a payload apart by its two counts. Raises :class:`RemoteProtocolError` when they don't fit its size."""
    view, size, head = memoryview(payload), len(payload), _head(dialect)
    first = head.size + COUNT.size
    if size < first + COUNT.size:
        raise RemoteProtocolError(f"GRAPH_COMPUTE: {size} bytes are too few")
    device, uid = (*head.unpack_from(view), 0)[:2]
    (n_nodes,) = COUNT.unpack_from(view, head.size)
    at = first + ID_BYTES * n_nodes
    if size < at + COUNT.size:
        raise RemoteProtocolError(f"GRAPH_COMPUTE: {n_nodes} nodes in {size} bytes")
    (n_tensors,) = COUNT.unpack_from(view, at)
    tensors = view[at + COUNT.size :]
    name_length = 0
    if n_tensors or len(tensors):
        record, rest = divmod(len(tensors), n_tensors) if n_tensors else (0, 1)
        name_length = record - record_bytes(0)
        if rest or not is_name_length(name_length):
            raise RemoteProtocolError(f"GRAPH_COMPUTE: {n_tensors} tensors in {len(tensors)} bytes")
    return Parts(device, uid, view[head.size :], np.frombuffer(view[first:at], "<u8"), tensors, name_length)


def meanings(parts: Parts, dialects: Sequence[Dialect]) -> list[tuple[Dialect, ...]]:
    """``dialects`` grouped by what the numbers of operations and types in a graph mean in them, in their order."""
    if len(dialects) == 1:
        return [tuple(dialects)]
    used: tuple[list[int], ...] = ([], [])
    if parts.name_length:
        table = columns(parts.tensors, parts.name_length)
        used = tuple(np.unique(table[field]).tolist() for field in ("op", "type"))
    groups: dict[object, list[Dialect]] = {}
    for dialect in dialects:
        ops = tuple(dialect.ops[number] if number < len(dialect.ops) else None for number in used[0])
        types = tuple(dialect.types.get(number) for number in used[1])
        groups.setdefault((ops, types, dialect.unary_ops, dialect.glu_ops), []).append(dialect)
    return [tuple(group) for group in groups.values()]


def decode_graph(payload: Bytes | Parts, dialect: Dialect, resolve: Resolve) -> Received:
    """The graph in a payload, which may be taken apart already; its tensors are placed by ``resolve``, which is asked
    once per tensor that nodes use.

    Raises :class:`RemoteProtocolError` naming the tensor to blame. Strides that were cut to 32 bits are restored where
    the tensor is dense.
    """
    parts = payload if isinstance(payload, Parts) else split(payload, dialect)
    device, node_ids, block, name_length = parts.device, parts.node_ids, parts.tensors, parts.name_length
    if not name_length:
        if len(node_ids):
            raise RemoteProtocolError(f"GRAPH_COMPUTE: {len(node_ids)} nodes but no tensor")
        return Received(device, Graph(()))
    table = columns(block, name_length)
    nodes, references = _link(table, node_ids, dialect)
    _check_numbers(table, dialect)
    nodes = nodes[_computed(table["flags"][nodes], dialect)]
    nothing = _joins_nothing(table, references, dialect)
    references[nothing] = -1
    nodes = nodes[_wanted(table, nodes, references, dialect)]
    copies: NDArray[np.bool_] = np.any(nothing, axis=1)
    return Received(device, Graph(_build(table, nodes, references, copies, dialect, resolve)))


def _computed(flags: NDArray[np.int32], dialect: Dialect) -> NDArray[np.bool_]:
    """Which of the nodes with these flags are to be computed: all of them where the client marks none."""
    marked: NDArray[np.bool_] = flags & COMPUTE != 0
    return marked if dialect.marks_computed or marked.any() else ~marked


def _joins_nothing(table: Columns, references: NDArray[np.int64], dialect: Dialect) -> NDArray[np.bool_]:
    """Which references are operands without elements of a CONCAT."""
    empty = np.append((table["ne"] == 0).any(1), False)  # the last one answers for "no reference"
    joins: NDArray[np.bool_] = empty[references] & (table["op"] == dialect.op_numbers["CONCAT"])[:, None]
    joins[:, MAX_SRC] = False  # its view_src
    return joins


def _wanted(
    table: Columns, nodes: NDArray[np.int64], references: NDArray[np.int64], dialect: Dialect
) -> NDArray[np.bool_]:
    """All nodes but those that no other node refers to and that mean nothing: results without elements, which ggml
    passes over, and names for bytes in no buffer. (Of a view of another device's memory a scheduler sends the name,
    although what is read here is a copy.)"""
    names = (table["buffer"] == 0) & np.isin(table["op"], [dialect.op_numbers[op] for op in ALIASES])
    idle = names | (table["ne"] == 0).any(1)
    wanted = np.ones(len(nodes), bool)
    if idle[nodes].any():
        used = np.zeros(len(table) + 1, bool)  # the last one answers for "no reference"
        for position in range(len(nodes) - 1, -1, -1):
            row = nodes[position]
            wanted[position] = used[row] or not idle[row]
            if wanted[position]:
                used[references[row]] = True
    return wanted


def _fail(table: Columns, row: int, reason: str) -> RemoteProtocolError:
    name = bytes(table["name"][row]).split(b"\0", 1)[0].decode("utf-8", "replace")
    return RemoteProtocolError(f"GRAPH_COMPUTE: tensor {row} {name!r}: {reason}")


def _link(
    table: Columns, node_ids: NDArray[np.uint64], dialect: Dialect
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids as row numbers: the nodes' rows, and per row the rows of its ten sources and its view_src (-1 for none)."""
    ids = table["id"].astype(np.uint64)
    if not ids.all():
        raise _fail(table, int(np.argmin(ids)), "id 0")
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    if (same := ordered[1:] == ordered[:-1]).any():
        raise _fail(table, int(order[1:][same][0]), "a second tensor with the same id")

    def rows(wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
        at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        return np.where(ordered[at] == wanted, order[at], -1)

    nodes = rows(node_ids)
    if (nodes < 0).any():
        position = int(np.argmax(nodes < 0))
        raise RemoteProtocolError(f"GRAPH_COMPUTE: node {position} has the unknown id {int(node_ids[position])}")
    used = np.concatenate([table["src"], table["view_src"][:, None]], axis=1)
    references = rows(used)
    if (unknown := (references < 0) & (used != 0)).any():
        row, slot = (int(i) for i in np.argwhere(unknown)[0])
        raise _fail(table, row, f"{_slot(slot)} has the unknown id {int(used[row, slot])}")
    _check_order(table, nodes, references, dialect)
    return nodes, np.where(_cast_to_itself(table, references, dialect), -1, references)


def _slot(slot: int) -> str:
    return f"source {slot}" if slot < MAX_SRC else "view_src"


def _check_order(table: Columns, nodes: NDArray[np.int64], references: NDArray[np.int64], dialect: Dialect) -> None:
    """Each node stands once, behind all nodes that it refers to: so there is no cycle, whatever the depth."""
    position = np.full(len(table) + 1, -1)  # the last one answers for "no reference"
    position[nodes] = np.arange(len(nodes))
    if (twice := position[nodes] != np.arange(len(nodes))).any():
        raise _fail(table, int(nodes[twice][0]), "is a node twice")
    late = position[references[nodes]] >= np.arange(len(nodes))[:, None]
    late &= ~_cast_to_itself(table, references, dialect)[nodes]
    if late.any():
        node, slot = (int(i) for i in np.argwhere(late)[0])
        raise _fail(table, int(nodes[node]), f"{_slot(slot)} is computed later, or is the node itself")


def _cast_to_itself(table: Columns, references: NDArray[np.int64], dialect: Dialect) -> NDArray[np.bool_]:
    """Which references are those of a cast to its own result."""
    own = np.zeros(references.shape, bool)
    own[:, 1] = (references[:, 1] == np.arange(len(table))) & (table["op"] == dialect.op_numbers["CPY"])
    return own


def _check_numbers(table: Columns, dialect: Dialect) -> None:
    if (bad := ~np.isin(table["type"], list(dialect.types))).any():
        row = int(np.argmax(bad))
        raise _fail(table, row, f"type {int(table['type'][row])} does not exist in protocol {dialect.version}")
    numbers = [int(number) for number in np.unique(table["op"]) if number >= len(dialect.ops)]
    if unknown := [number for number in numbers if not fork.may_be(number, dialect)]:
        row = int(np.argmax(np.isin(table["op"], unknown)))
        raise _fail(table, row, f"operations {unknown} do not exist in protocol {dialect.version}")
    types = dialect.types
    blocks = np.array([types[number].block if number in types else 1 for number in range(max(types) + 1)])
    if (bad := table["ne"][:, 0] % blocks[table["type"]] != 0).any():
        row = int(np.argmax(bad))
        raise _fail(table, row, f"{int(table['ne'][row, 0])} elements a row are no whole number of blocks")
    if (bad := (table["buffer"] == 0) & (table["data"] != 0)).any():
        raise _fail(table, int(np.argmax(bad)), "an address in no buffer")


def _build(
    table: Columns,
    nodes: NDArray[np.int64],
    references: NDArray[np.int64],
    copies: NDArray[np.bool_],
    dialect: Dialect,
    resolve: Resolve,
) -> tuple[Tensor, ...]:
    used = np.zeros(len(table) + 1, bool)
    used[nodes] = True
    used[references[nodes]] = True
    is_node = np.zeros(len(table), bool)
    is_node[nodes] = True
    types, ops = dialect.types, dialect.ops
    # Plain lists: a structured array's rows as Python values, converted once per column.
    type_of, op_of, ne_of, nb_of, src_of = (
        array.tolist() for array in (table["type"], table["op"], table["ne"], table["nb"], references)
    )
    buffer_of, data_of, flags_of, offs_of, name_of = (
        table[field].tolist() for field in ("buffer", "data", "flags", "view_offs", "name")
    )
    words_of = table["op_params"].tolist()
    known_params: dict[tuple[int, bytes], params.Params] = {}
    built: list[Tensor | None] = [None] * (len(table) + 1)

    def decode_params(row: int) -> params.Params:
        key = op_of[row], words_of[row]
        if key not in known_params:
            try:
                known_params[key] = params.decode(params_of(ops[key[0]]), key[1], dialect)
            except ValueError as error:
                raise _fail(table, row, str(error)) from error
        return known_params[key]

    def make(row: int) -> Tensor:
        kind, ne, nb = types[type_of[row]], _dims(ne_of[row]), _dims(nb_of[row])
        buffer, offset = resolve(buffer_of[row], data_of[row]) if buffer_of[row] else (0, 0)
        node = is_node[row]
        operands = [built[source] for source in src_of[row][:MAX_SRC]] if node else []
        op = "NONE" if not node else "CONT" if copies[row] else ops[op_of[row]] if op_of[row] < len(ops) else ""
        if op == "CONT":
            operands = [operand for operand in operands if operand is not None]
        while operands and operands[-1] is None:
            operands.pop()
        values = decode_params(row) if op and node and not copies[row] else params.NO_PARAMS
        if not op:
            try:
                op, values = fork.tell(words_of[row], tuple(operands), kind, ne, dialect)
            except GraphError as error:
                raise _fail(table, row, f"operation {op_of[row]}: {error}") from error
        return Tensor(
            type=kind,
            ne=ne,
            nb=_restored(kind, ne, nb),
            op=op,
            params=values,
            src=tuple(operands),
            view_src=built[src_of[row][MAX_SRC]] if node else None,
            view_offset=offs_of[row] if node else 0,
            buffer=buffer,
            offset=offset,
            flags=flags_of[row],
            name=name_of[row].split(b"\0", 1)[0].decode("utf-8", "replace"),
        )

    for row in np.flatnonzero(used[:-1] & ~is_node).tolist():
        built[row] = make(row)
    result = []
    for row in nodes.tolist():
        node = built[row] = make(row)
        result.append(node)
    return tuple(result)


def _dims(values: list[int]) -> Dims:
    a, b, c, d = values
    return a, b, c, d


def _restored(type: Type, ne: Dims, nb: Dims) -> Dims:
    """``nb`` with what the wire cut off at 32 bits, where the tensor is dense; else ``nb`` as it is."""
    dense = contiguous_strides(type, ne)
    return dense if dense[3] >= WORD and all(d % WORD == n for d, n in zip(dense, nb, strict=True)) else nb


def encode_graph(graph: Graph, device: int, dialect: Dialect, name_length: int, locate: Locate, uid: int = 0) -> bytes:
    """The payload that asks ``device`` to compute ``graph``, the same bytes for the same graph and addresses. ``uid``
    is left out where the dialect has none.

    ``locate`` is asked for tensors in a buffer; the others get handle and address 0. ``use_count``, where the dialect
    has it, says how many operands are this tensor (native servers fuse what is used once).

    Raises :class:`UnsupportedOperation`, naming all operations and types that the dialect does not have.
    """
    _check_expressible(graph, dialect)
    ids = {tensor: number for number, tensor in enumerate(graph.tensors, start=1)}
    nodes = set(graph.nodes)
    uses = dict.fromkeys(ids, 0)
    if dialect.has_use_count:
        for node in graph.nodes:
            for source in node.src:
                if source is not None:
                    uses[source] += 1
            uses[node] += _is_cast(node)

    def record(tensor: Tensor) -> Record:
        handle, address = locate(tensor.buffer, tensor.offset) if tensor.buffer else (0, 0)
        node = tensor in nodes
        operands = tensor.src if node else ()
        if node and _is_cast(tensor):
            operands = (*operands, tensor)
        if len(operands) > MAX_SRC:
            raise LocalProtocolError(f"{tensor!r}: {len(operands)} operands; the protocol has room for {MAX_SRC}")
        return Record(
            id=ids[tensor],
            type=dialect.numbers[tensor.type.name],
            buffer=handle,
            ne=tensor.ne,
            nb=_dims([stride % WORD for stride in tensor.nb]),
            op=dialect.op_numbers[tensor.op if node else "NONE"],
            op_params=params.encode(tensor.params if node else params.NO_PARAMS, dialect),
            flags=tensor.flags | COMPUTE if node else tensor.flags,
            src=tuple(0 if operand is None else ids[operand] for operand in operands)
            + (0,) * (MAX_SRC - len(operands)),
            view_src=ids[tensor.view_src] if node and tensor.view_src is not None else 0,
            view_offs=tensor.view_offset if node else 0,
            data=address,
            name=tensor.name.encode(),
            use_count=uses[tensor],
        )

    block = encode_records([record(tensor) for tensor in graph.tensors], name_length)
    node_ids = np.array([ids[node] for node in graph.nodes], "<u8").tobytes()
    head = _head(dialect)
    start = head.pack(*(device, uid)[: 2 if dialect.has_graph_uids else 1])
    return start + COUNT.pack(len(graph.nodes)) + node_ids + COUNT.pack(len(ids)) + block


def _is_cast(node: Tensor) -> bool:
    return node.op == "CPY" and len(node.src) == 1


def _check_expressible(graph: Graph, dialect: Dialect) -> None:
    ops = {node.op for node in graph.nodes} - set(dialect.ops)
    types = {tensor.type.name for tensor in graph.tensors} - set(dialect.numbers)
    if ops or types:
        raise UnsupportedOperation(f"protocol {dialect.version} has no {', '.join(sorted(ops | types))}")
