"""Torch tensors as ggml values: shapes of any rank, broadcasting both ways, slices, permutations.

A :class:`Value` keeps the torch shape beside a ggml tensor. A tensor of up to four dimensions has the reversed shape as
``ne`` and may be strided; of more dimensions the leading ones are merged and the tensor is dense, so that everything
works for every rank. Numbers are F32; integers are I32 where they index rows and F32 where they are computed with
(exact up to 2^24); truth values are F32 zeros and ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ..device import Target
from ..errors import CaptureError
from ..ggml import build
from ..ggml.ops import OPS
from ..ggml.params import NO_PARAMS, Concat, MulMat, Params, Permute, Scale, Unary
from ..ggml.tensor import Dims, Tensor, contiguous_strides, root
from ..ggml.types import F32, I32, NUMPY_DTYPES, Type

Shape = tuple[int, ...]
MOVES = frozenset(op.name for op in OPS.values() if op.moves)
"""Operations that move elements of any type."""

REPEATED_FROM = 256
"""Constants of so many elements that are all the same are one element, repeated by the device."""

Kind = str
"""What the numbers of a value are: ``f`` floats, ``i`` integers, ``b`` truth values."""


@dataclass(frozen=True, eq=False)
class Value:
    """A torch tensor while it is lowered. ``array`` are its numbers when they are known already."""

    tensor: Tensor
    shape: Shape
    kind: Kind = "f"
    array: np.ndarray | None = None

    @property
    def scalar(self) -> float | None:
        """The number of a known value that is the same everywhere."""
        return float(self.array.flat[0]) if self.array is not None and is_uniform(self.array) else None


@dataclass(frozen=True, eq=False)
class Complex:
    """A tensor of complex numbers while it is lowered: its parts, of one shape."""

    real: Value
    imaginary: Value

    @property
    def shape(self) -> Shape:
        return self.real.shape


def is_uniform(array: np.ndarray) -> bool:
    """Whether an array is one number, or one number in all places without memory for each (``np.broadcast_to``)."""
    return array.size == 1 or (
        array.size > 0 and all(n == 1 or step == 0 for n, step in zip(array.shape, array.strides, strict=True))
    )


def dims_of(shape: Shape) -> Dims:
    """``ne`` of a shape: reversed, the dimensions before the last three merged."""
    padded = (1, 1, 1, *shape)
    return padded[-1], padded[-2], padded[-3], prod(padded[:-3])


def broadcast(*shapes: Shape) -> Shape:
    """The common shape of ``shapes`` by torch's rules (torch has made sure that there is one)."""
    return tuple(np.broadcast_shapes(*shapes))


class Emitter:
    """Makes nodes for one graph, each only once: the same operation on the same tensors is the same node."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.prec = 0
        """ggml_prec of the products, convolutions and attention that are made now."""
        self.nodes: list[Tensor] = []
        self.floats: dict[Tensor, Tensor] = {}
        """Input leaf of integers → its twin that receives the same numbers as F32."""
        self.arrays: dict[Tensor, np.ndarray] = {}
        """Constant leaf → its numbers."""
        self._seen: dict[Hashable, Tensor] = {}
        self._constants: dict[tuple[str, Shape, bytes], Tensor] = {}

    # nodes

    def _once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        found = self._seen.get(key)
        if found is None:
            found = self._seen[key] = make()
            self.nodes.append(found)
        return found

    def node(
        self, op: str, *src: Tensor | None, params: Params = NO_PARAMS, ne: Dims | None = None, type: Type | None = None
    ) -> Tensor:
        """``op`` applied to tensors. Raises :class:`CaptureError` when the target does not have it."""
        if op not in self.target.ops:
            raise CaptureError(f"needs {op}, which {self.target.name} devices don't have")
        return self._once((op, src, params, ne, type), lambda: build.node(op, *src, params=params, ne=ne, type=type))

    def constant(self, array: np.ndarray, kind: Kind | None = None, type: Type | None = None) -> Value:
        """A leaf that holds ``array``: F32, or I32 for integers, unless ``type`` says otherwise."""
        kind = kind or {"b": "b", "i": "i", "u": "i"}.get(array.dtype.kind, "f")
        stored = type or (I32 if kind == "i" else F32)
        if array.size >= REPEATED_FROM and stored == F32 and is_uniform(array):
            one = self.constant(array.reshape(-1)[:1].reshape((1,) * array.ndim), kind, stored)
            return replace(self.expand(one, tuple(array.shape)), array=array)
        numbers = _narrow(array, stored)
        key = (stored.name, array.shape, numbers.tobytes())
        leaf = self._constants.get(key)
        if leaf is None:
            leaf = self._constants[key] = build.leaf(stored, *dims_of(array.shape))
            self.arrays[leaf] = numbers
        return Value(leaf, tuple(array.shape), kind, array)

    # what the numbers are

    def f32(self, value: Value) -> Value:
        """``value`` with an F32 tensor."""
        if value.tensor.type == F32:
            return value
        if value.array is not None:
            return Value(self.constant(value.array, type=F32).tensor, value.shape, value.kind, value.array)
        return Value(self._as_float(value.tensor), value.shape, value.kind)

    def _as_float(self, tensor: Tensor) -> Tensor:
        """The tensor's numbers as F32. What only moves an input's integers is applied to the input's floats."""
        source = tensor.src[0] if tensor.op in MOVES else None
        if tensor in self.floats or source is None or tensor.type.size != F32.size:  # strides count bytes
            return self.floats.get(tensor) or self.node("CPY", tensor, type=F32)
        floats = self._as_float(source)
        view_src = tensor.view_src and root(floats)[0]
        moved = replace(tensor, type=F32, src=(floats, *tensor.src[1:]), view_src=view_src)
        return self._once((tensor, F32), lambda: moved)

    def i32(self, value: Value) -> Value:
        """``value`` with an I32 tensor (rounded towards zero)."""
        if value.tensor.type == I32:
            return value
        return Value(self.node("CPY", self.contiguous(value).tensor, type=I32), value.shape, "i")

    # the same numbers in another shape

    def contiguous(self, value: Value) -> Value:
        if value.tensor.contiguous:
            return value
        return Value(self.node("CONT", value.tensor), value.shape, value.kind, value.array)

    def dense(self, value: Value) -> Value:
        """F32 in the layout that element-wise operations take: native backends differ in which strides they take, and
        look at that of a dimension of one element, too."""
        value = self.f32(value)
        if self.target.managed:
            return value
        dense = self.contiguous(value).tensor
        if dense.nb != contiguous_strides(dense.type, dense.ne):
            source = dense
            dense = self._once(("RESHAPE", source, source.ne), lambda: build.reshape(source, *source.ne))
        return Value(dense, value.shape, value.kind, value.array)

    def reshape(self, value: Value, shape: Shape) -> Value:
        ne = dims_of(shape)
        array = None if value.array is None else value.array.reshape(shape)
        if value.tensor.ne == ne and (len(shape) <= 4 or value.tensor.contiguous):
            return Value(value.tensor, shape, value.kind, array)
        source = self.contiguous(value).tensor
        while source.op == "RESHAPE" and source.src[0] is not None:
            source = source.src[0]
        if source.ne != ne:
            origin = source
            source = self._once(("RESHAPE", origin, ne), lambda: build.reshape(origin, *ne))
        return Value(source, shape, value.kind, array)

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        """Dimension ``order[i]`` of ``value`` becomes dimension i, as in torch."""
        rank = len(value.shape)
        shape = tuple(value.shape[i] for i in order)
        if rank > 4:
            return self._permute_many(value, order, shape)
        axes = [0, 1, 2, 3]
        for to, source in enumerate(order):
            axes[rank - 1 - source] = rank - 1 - to
        array = None if value.array is None else value.array.transpose(order)
        return Value(self._permuted(value.tensor, axes), shape, value.kind, array)

    def _permuted(self, tensor: Tensor, axes: Sequence[int]) -> Tensor:
        source = tensor
        if tensor.op == "PERMUTE" and isinstance(tensor.params, Permute) and tensor.src[0] is not None:
            source, axes = tensor.src[0], [axes[axis] for axis in tensor.params]
        if list(axes) == [0, 1, 2, 3]:
            return source
        w, x, y, z = axes
        return self._once(("PERMUTE", source, w, x, y, z), lambda: build.permute(source, w, x, y, z))

    def _permute_many(self, value: Value, order: Sequence[int], shape: Shape) -> Value:
        """More than four dimensions: exchange neighbouring blocks, (before, a, b, after), until all are in place."""
        current = list(range(len(order)))
        sizes = list(value.shape)
        for to, wanted in enumerate(order):
            at = current.index(wanted)
            if prod(sizes[to:at]) != 1 and sizes[at] != 1:
                blocks = prod(sizes[:to]), prod(sizes[to:at]), sizes[at], prod(sizes[at + 1 :])
                value = self.contiguous(self.permute(self.reshape(value, blocks), (0, 2, 1, 3)))
            current.insert(to, current.pop(at))
            sizes.insert(to, sizes.pop(at))
        return self.reshape(value, shape)

    def transpose(self, value: Value, a: int, b: int) -> Value:
        order = list(range(len(value.shape)))
        order[a], order[b] = order[b], order[a]
        return self.permute(value, order)

    def slice(self, value: Value, dim: int, start: int, length: int, step: int = 1) -> Value:
        """``length`` elements of dimension ``dim`` from ``start``, every ``step``-th."""
        shape = (*value.shape[:dim], length, *value.shape[dim + 1 :])
        if shape == value.shape:
            return value
        if len(shape) > 4:
            flat = (prod(shape[:dim]), value.shape[dim], prod(shape[dim + 1 :]))
            return self.reshape(self.slice(self.reshape(value, flat), 1, start, length, step), shape)
        if step != 1 and dim == len(shape) - 1:  # rows can't have gaps: each element becomes a row
            rows = self.reshape(value, (prod(value.shape[:-1]), value.shape[-1], 1))
            return self.reshape(self.slice(rows, 1, start, length, step), shape)
        axis = len(shape) - 1 - dim
        source, start = _within(value.tensor, axis, start, length + (length - 1) * (step - 1))
        if source.ne[axis] == length:
            return Value(source, shape, value.kind)
        ne, nb = list(source.ne), list(source.nb)
        offset = start * nb[axis]
        ne[axis], nb[axis] = length, nb[axis] * step
        key = ("VIEW", source, tuple(ne), tuple(nb), offset)
        tensor = self._once(key, lambda: build.view(source, *ne, nb=tuple(nb[1:]), offset=offset))
        return Value(tensor, shape, value.kind)

    def expand(self, value: Value, shape: Shape) -> Value:
        """``value`` repeated to ``shape`` where it has dimensions of one element (or lacks dimensions)."""
        value = self.reshape(value, (1,) * (len(shape) - len(value.shape)) + value.shape)
        if value.shape == shape:
            return value
        if len(shape) <= 4:
            return self._repeat(value, shape)
        for dim, n in enumerate(shape):
            if value.shape[dim] != n:
                grown = (*value.shape[:dim], n, *value.shape[dim + 1 :])
                blocks = prod(grown[:dim]), 1, prod(grown[dim + 1 :])
                repeated = self._repeat(self.reshape(value, blocks), (blocks[0], n, blocks[2]))
                value = self.reshape(repeated, grown)
        return value

    def _repeat(self, value: Value, shape: Shape) -> Value:
        return Value(self.node("REPEAT", self.contiguous(value).tensor, ne=dims_of(shape)), shape, value.kind)

    def concat(self, values: Sequence[Value], dim: int) -> Value:
        """Values one after the other along ``dim``; all other dimensions are equal."""
        values = [value for value in values if value.shape[dim]]
        if any(value.tensor.type != values[0].tensor.type for value in values):
            values = [self.f32(value) for value in values]
        shape = values[0].shape
        total = (*shape[:dim], sum(value.shape[dim] for value in values), *shape[dim + 1 :])
        if len(shape) > 4:
            flat = [self.reshape(v, (prod(shape[:dim]), v.shape[dim], prod(shape[dim + 1 :]))) for v in values]
            return self.reshape(self.concat(flat, 1), total)
        tensor = self.contiguous(values[0]).tensor
        for value in values[1:]:
            tensor = self.node("CONCAT", tensor, self.contiguous(value).tensor, params=Concat(len(shape) - 1 - dim))
        return Value(tensor, total, values[0].kind)

    # arithmetic

    def unary(self, op: str, value: Value) -> Value:
        """An element-wise function: one of ggml's operations, or the name of one of its UNARY operations."""
        value = self.dense(value)
        tensor = (
            self.node(op, value.tensor)
            if op in ("SQR", "SQRT", "LOG", "SIN", "COS")
            else self.node("UNARY", value.tensor, params=Unary(op))
        )
        return Value(tensor, value.shape)

    def scale(self, value: Value, factor: float, bias: float = 0.0) -> Value:
        """``value * factor + bias``."""
        if factor == 1 and bias == 0:
            return value
        value = self.dense(value)
        return Value(self.node("SCALE", value.tensor, params=Scale(factor, bias)), value.shape, value.kind)

    def binary(self, op: str, a: Value, b: Value) -> Value:
        """ADD, SUB, MUL or DIV with torch's broadcasting; ggml repeats only the second operand."""
        shape = broadcast(a.shape, b.shape)
        kind = "f" if "f" in (a.kind, b.kind) or op == "DIV" else "i"
        if len(shape) > 4 and a.shape != b.shape:
            a, b = self.expand(a, shape), self.expand(b, shape)
        if op in ("ADD", "MUL") and prod(a.shape) < prod(b.shape):
            a, b = b, a
        a = self.dense(self.expand(self.f32(a), shape))
        b = self.dense(b)
        return Value(self.node(op, a.tensor, b.tensor), shape, kind)

    def mul_mat(self, a: Value, b: Value) -> Value:
        """a […, M, K] and b [… , N, K] → [… , N, M]: b times a transposed, a repeated over b's leading dimensions."""
        tensor = self.node("MUL_MAT", self._rows(a).tensor, self._rows(self.f32(b)).tensor, params=MulMat(self.prec))
        return Value(tensor, (*b.shape[:-1], a.shape[-2]))

    def _rows(self, value: Value) -> Value:
        """``value`` with dense rows: what products ask of their operands."""
        return value if value.tensor.nb[0] == value.tensor.type.size else self.contiguous(value)


def _within(tensor: Tensor, axis: int, start: int, length: int) -> tuple[Tensor, int]:
    """Where ``length`` elements of ``tensor`` from ``start`` on along ``axis`` come from: if that is one of several
    tensors that were joined there, that one, and where they begin in it."""
    while tensor.op == "CONCAT" and isinstance(tensor.params, Concat) and tensor.params.dim == axis:
        first, second = tensor.src[:2]
        if first is None or second is None:
            break
        if start + length <= first.ne[axis]:
            tensor = first
        elif start >= first.ne[axis]:
            tensor, start = second, start - first.ne[axis]
        else:
            break
    return tensor, start


def _narrow(array: np.ndarray, type: Type) -> np.ndarray:
    """``array`` as ``type``; finite numbers stay finite (masks hold the smallest number of a wider type)."""
    dtype = NUMPY_DTYPES[type.name]
    if array.dtype.kind == "f" and dtype.itemsize < array.dtype.itemsize:
        limit = np.finfo(dtype).max
        array = np.where(np.isfinite(array), np.clip(array, -limit, limit), array)
    return np.ascontiguousarray(array).astype(dtype)
