"""A captured module as a value: the graph, and what its leaves and outputs mean. Also as bytes, for a cache on disk.

Tensors live nowhere yet; :mod:`sdrpc.runtime.run` places them on a device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from typing import Any

import numpy as np

from ..errors import GraphError
from ..ggml import serialize
from ..ggml.tensor import Graph, Tensor
from ..ggml.types import NUMPY_DTYPES

Shape = tuple[int, ...]

MAGIC = b"sdrpc lowered 1\n"
DIGEST_BYTES = 32
MAX_NAME = 1 << 12
MAX_RANK = 64


@dataclass(frozen=True)
class Input:
    """What a caller passes. ``dtype`` is torch's name for it (``float16``, ``int64`` …); ``leaves`` receive its
    numbers, each as its own type: integers may be wanted both as I32 and as F32, unread inputs by no leaf."""

    name: str
    dtype: str
    shape: Shape
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Parameter:
    """A weight that the graph reads, by the name of the module's parameter; ``shape`` is the module's."""

    name: str
    shape: Shape
    leaf: Tensor


@dataclass(frozen=True, eq=False)
class Constant:
    """A leaf whose numbers belong to the graph."""

    leaf: Tensor
    array: np.ndarray


@dataclass(frozen=True, eq=False)
class Output:
    """A result: what ``source`` holds after the run, or the numbers themselves where they depend on no input."""

    dtype: str
    shape: Shape
    source: Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Lowered:
    """A module, or one of its methods, for inputs of certain shapes and weights of certain types."""

    graph: Graph
    inputs: tuple[Input, ...]
    weights: tuple[Parameter, ...]
    constants: tuple[Constant, ...]
    outputs: tuple[Output, ...]


def result_dtype(dtype: str) -> np.dtype[Any]:
    """How numpy holds results of a torch dtype: floats as float32, integers as int64."""
    floats = dtype.startswith(("float", "bfloat"))
    return np.dtype("<f4" if floats else "?" if dtype == "bool" else "<i8")


def to_bytes(lowered: Lowered) -> bytes:
    """``lowered`` as bytes that :func:`from_bytes` takes.

    magic | blake2b of the rest (32 bytes) | sizes of table and graph (u64 each) | table (JSON) | graph | arrays
    """
    place = {tensor: i for i, tensor in enumerate(lowered.graph.tensors)}
    arrays = [constant.array for constant in lowered.constants]
    outputs = []
    for output in lowered.outputs:
        known = isinstance(output.source, np.ndarray)
        outputs.append([output.dtype, output.shape, None if known else place[output.source]])  # type: ignore[index]
        arrays += [output.source.astype(result_dtype(output.dtype))] if isinstance(output.source, np.ndarray) else []
    table = json.dumps(
        {
            "inputs": [[i.name, i.dtype, i.shape, [place[leaf] for leaf in i.leaves]] for i in lowered.inputs],
            "weights": [[w.name, w.shape, place[w.leaf]] for w in lowered.weights],
            "constants": [[c.array.shape, place[c.leaf]] for c in lowered.constants],
            "outputs": outputs,
        },
        separators=(",", ":"),
    ).encode()
    graph = serialize.encode(lowered.graph)
    sizes = len(table).to_bytes(8, "little") + len(graph).to_bytes(8, "little")
    body = b"".join([sizes, table, graph, *(np.ascontiguousarray(array).tobytes() for array in arrays)])
    return MAGIC + blake2b(body, digest_size=DIGEST_BYTES).digest() + body


def from_bytes(data: bytes) -> Lowered:
    """What :func:`to_bytes` wrote. Raises :class:`GraphError` for anything else."""
    start = len(MAGIC) + DIGEST_BYTES
    body = memoryview(data)[start:]
    whole = data[: len(MAGIC)] == MAGIC and data[len(MAGIC) : start] == blake2b(body, digest_size=DIGEST_BYTES).digest()
    _need(whole and len(body) >= 16, "header")
    table_size, graph_size = (int.from_bytes(body[i : i + 8], "little") for i in (0, 8))
    _need(16 + table_size + graph_size <= len(body), "size")
    try:
        table = json.loads(bytes(body[16 : 16 + table_size]))
    except (ValueError, RecursionError) as error:
        raise GraphError(f"a lowered module that is no JSON: {error}") from None
    graph = serialize.decode(body[16 + table_size : 16 + table_size + graph_size])
    return _lowered(table, graph, body[16 + table_size + graph_size :])


def _lowered(table: Any, graph: Graph, rest: memoryview) -> Lowered:
    _need(isinstance(table, dict) and set(table) == {"inputs", "weights", "constants", "outputs"}, "table")
    reader = _Reader(graph, rest)
    result = Lowered(
        graph,
        tuple(
            Input(reader.text(name), reader.text(dtype), reader.shape(shape), reader.leaves(leaves, shape))
            for name, dtype, shape, leaves in reader.rows(table["inputs"], 4)
        ),
        tuple(
            Parameter(reader.text(name), reader.shape(shape), reader.leaf(leaf, shape))
            for name, shape, leaf in reader.rows(table["weights"], 3)
        ),
        tuple(_constant(reader, shape, leaf) for shape, leaf in reader.rows(table["constants"], 2)),
        tuple(_output(reader, *row) for row in reader.rows(table["outputs"], 3)),
    )
    _need(not reader.rest, "length")
    return result


def _constant(reader: _Reader, shape: Any, place: Any) -> Constant:
    leaf = reader.leaf(place, shape)
    _need(leaf.type.name in NUMPY_DTYPES, "constant")
    return Constant(leaf, reader.array(NUMPY_DTYPES[leaf.type.name], reader.shape(shape)))


def _output(reader: _Reader, dtype: Any, shape: Any, place: Any) -> Output:
    name, size = reader.text(dtype), reader.shape(shape)
    if place is None:
        return Output(name, size, reader.array(result_dtype(name), size))
    node = reader.tensor(place, size)
    _need(node.is_output and node.type.name in NUMPY_DTYPES, "output")
    return Output(name, size, node)


class _Reader:
    """The parts of a table, checked; ``rest`` are the bytes of arrays that were not read yet."""

    def __init__(self, graph: Graph, rest: memoryview) -> None:
        self.tensors = graph.tensors
        self.leaf_count = len(graph.leaves)
        self.rest = rest

    def rows(self, rows: Any, length: int) -> Iterator[list[Any]]:
        _need(isinstance(rows, list), "list")
        for row in rows:
            _need(isinstance(row, list) and len(row) == length, "row")
            yield row

    def text(self, value: Any) -> str:
        _need(isinstance(value, str) and len(value) <= MAX_NAME, "name")
        return str(value)

    def shape(self, value: Any) -> Shape:
        _need(isinstance(value, list | tuple) and len(value) <= MAX_RANK, "shape")
        _need(all(n.__class__ is int and 0 <= n < 1 << 40 for n in value), "shape")
        return tuple(value)

    def tensor(self, place: Any, shape: Any) -> Tensor:
        """The tensor at a position, which holds as many elements as ``shape`` and lies densely."""
        _need(place.__class__ is int and 0 <= place < len(self.tensors), "position")
        found: Tensor = self.tensors[place]
        _need(found.elements == prod(self.shape(shape)) and found.contiguous, "shape")
        return found

    def leaf(self, place: Any, shape: Any) -> Tensor:
        found = self.tensor(place, shape)
        _need(place < self.leaf_count, "leaf")
        return found

    def leaves(self, places: Any, shape: Any) -> tuple[Tensor, ...]:
        _need(isinstance(places, list), "list")
        found = tuple(self.leaf(place, shape) for place in places)
        _need(all(leaf.type.name in NUMPY_DTYPES for leaf in found), "input")
        return found

    def array(self, dtype: np.dtype[Any], shape: Shape) -> np.ndarray:
        size = prod(shape) * dtype.itemsize
        _need(size <= len(self.rest), "length")
        data, self.rest = self.rest[:size], self.rest[size:]
        return np.frombuffer(bytes(data), dtype).reshape(shape)


def _need(truth: bool, what: str) -> None:
    if not truth:
        raise GraphError(f"a damaged lowered module: wrong {what}")
