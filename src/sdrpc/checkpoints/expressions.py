"""Tensors made of tensors: slices, joins, transpositions, casts, all evaluated while their bytes are sent.

Each function takes weights and gives a weight at once: its type and shape are known without reading anything. Its bytes
come, where that is possible, as views of the source's memory (renaming, slices and joins along the first dimension,
also of quantized tensors); otherwise they are made piece by piece in buffers of at most :data:`BUFFER` bytes, or of one
row of a source where that is more. A type of blocks is kept wherever whole blocks move; where blocks would have to be
broken up, the tensor is unpacked first (:func:`sdrpc.checkpoints.numbers.unpacked`).

All raise :class:`CheckpointError`, which names the file and the tensor, for dimensions that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import lcm, prod

import numpy as np

from ..errors import CheckpointError
from ..ggml.types import F32, Type
from ..ggml.weight import Before, Pieces, View, Weight, joined_origin
from .numbers import Convert, common, converter, unpacked

BUFFER = 16 << 20
"""Bytes that are made at a time."""
NUMBERS = 1 << 21
"""Numbers that are cast at a time: unpacking blocks needs several arrays of 4 bytes a number."""
DIRECT = 1 << 20
"""Bytes from which a strip of a source is passed on as it is; smaller ones are gathered in a buffer."""


def rows(w: Weight, start: int, stop: int) -> Weight:
    """``w[start:stop]``: no bytes move."""
    return _narrow(w, 0, start, stop)


def columns(w: Weight, start: int, stop: int) -> Weight:
    """``w[:, start:stop]``."""
    return _narrow(w, 1, start, stop)


def split(w: Weight, sizes: Sequence[int], dim: int = 0) -> tuple[Weight, ...]:
    """``torch.split(w, sizes, dim)``: parts of one type, which together are all of ``w``."""
    dim = _dimension(w, dim)
    ends = [0, *accumulate(sizes)]
    if min(sizes, default=0) < 0 or ends[-1] != w.shape[dim]:
        raise _error(w, f"{list(w.shape)} can't be split into {list(sizes)} along dimension {dim}")
    if dim == len(w.shape) - 1 and any(end % w.type.block for end in ends):
        w = _made_plain(w, "in rows that are split within blocks")
    return tuple(_narrow(w, dim, start, stop) for start, stop in pairwise(ends))


def chunk(w: Weight, count: int) -> tuple[Weight, ...]:
    """``torch.chunk(w, count)``: equal parts along the first dimension."""
    return split(w, [w.shape[_dimension(w, 0)] // count] * count)


def concat(ws: Sequence[Weight], dim: int = 0) -> Weight:
    """``torch.cat(ws, dim)``, named as the first one. Unlike types are cast to a common one."""
    if not ws:
        raise CheckpointError("the model", "nothing to join")
    first = ws[0]
    dim = _dimension(first, dim)
    for w in ws:
        if len(w.shape) != len(first.shape) or _without(w.shape, dim) != _without(first.shape, dim):
            reason = f"{list(w.shape)} can't be joined to {first.name!r}, {list(first.shape)}, along dimension {dim}"
            raise _error(w, reason)
    ws = [cast(w, common(w.type for w in ws)) for w in ws]
    if len(ws) == 1:
        return ws[0]
    shape = (*first.shape[:dim], sum(w.shape[dim] for w in ws), *first.shape[dim + 1 :])
    strides = [_run(w, dim) for w in ws]
    strips = tuple(_Strip(w.pieces, stride, 0, stride) for w, stride in zip(ws, strides, strict=True))
    made = _Strips(prod(first.shape[:dim]), strips)
    return replace(ws[0], shape=shape, pieces=made, origin=joined_origin(f"joined along {dim}", [w.origin for w in ws]))


def swap_halves(w: Weight) -> Weight:
    """The second half of dimension 0 before the first: (scale, shift) ↔ (shift, scale)."""
    half = w.shape[_dimension(w, 0)] // 2
    if half * 2 != w.shape[0]:
        raise _error(w, f"{w.shape[0]} rows have no halves")
    first, second = split(w, (half, half))
    return concat((second, first))


def transpose(w: Weight) -> Weight:
    """A matrix with its rows as columns."""
    if len(w.shape) != 2:
        raise _error(w, f"{list(w.shape)} is no matrix to transpose")
    return permute(w, (1, 0))


def permute(w: Weight, order: Sequence[int]) -> Weight:
    """``torch.permute(w, order)``: dimension i of the result is dimension ``order[i]`` of ``w``."""
    order = tuple(dim + len(w.shape) if dim < 0 else dim for dim in order)
    if sorted(order) != list(range(len(w.shape))):
        raise _error(w, f"{list(order)} is no order of the dimensions of {list(w.shape)}")
    shape = tuple(w.shape[dim] for dim in order)
    moving = [dim for dim in order if w.shape[dim] != 1]  # dimensions of 1 are anywhere
    if moving == sorted(moving):
        return reshape(w, shape)
    if order[-1] != len(order) - 1:
        w = _made_plain(w, "in columns")
    row = w.nbytes // shape[0] if shape[0] else 0
    if row > BUFFER:
        rest = _without(w.shape, order[0])
        inner = [dim - (dim > order[0]) for dim in order[1:]]
        slices = (reshape(_narrow(w, order[0], i, i + 1), rest) for i in range(shape[0]))
        return reshape(concat([permute(part, inner) for part in slices]), shape)
    units = (*w.shape[:-1], w.shape[-1] // w.type.block)
    make = _Permuted(w.pieces, units, order, _unit(w.type))
    origin = w.origin and w.origin.made(f"{list(w.shape)} permuted to {list(order)}")
    return replace(
        w, shape=shape, pieces=Made(w.nbytes, max(row, 1), max(1, BUFFER // max(row, 1)), make), origin=origin
    )


def reshape(w: Weight, shape: Sequence[int]) -> Weight:
    """The same numbers in the same order in another shape. Blocks that would cross its rows are unpacked."""
    shape = tuple(shape)
    if min(shape, default=0) < 0 or prod(shape) != prod(w.shape):
        raise _error(w, f"{list(w.shape)} has another number of elements than {list(shape)}")
    if not shape or shape[-1] % w.type.block:
        w = _made_plain(w, f"in rows of {shape[-1] if shape else 1}")
    return replace(w, shape=shape)


def _made_plain(w: Weight, how: str) -> Weight:
    """The tensor in plain numbers, which knows that it was in blocks, ``how`` no blocks can be."""
    if w.type.plain:
        return w
    return replace(cast(w, unpacked(w.type)), before=Before(f"{w.type} {how}", 8 * w.type.size / w.type.block))


def cast(w: Weight, type: Type) -> Weight:
    """The same numbers in another type, rounded to nearest."""
    if type == w.type:
        return w
    if (w.shape[-1] if w.shape else 1) % type.block:
        raise _error(w, f"{list(w.shape)} has rows that are no whole number of {type}'s blocks of {type.block}")
    try:
        convert = converter(w.type, type)
    except ValueError as error:
        raise _error(w, str(error)) from error
    unit = lcm(w.type.block, type.block)
    made = converted(w.pieces, convert, w.type.row_bytes(unit), type.row_bytes(unit), unit, prod(w.shape))
    return replace(w, type=type, pieces=made, origin=w.origin and w.origin.made(type.name), before=None)


def plus(w: Weight, number: float) -> Weight:
    """``w + number``, as F32."""
    w = cast(w, F32)

    def add(numbers: np.ndarray) -> np.ndarray:
        summed: np.ndarray = numbers.view(np.float32) + np.float32(number)
        return summed

    made = converted(w.pieces, add, F32.size, F32.size, 1, prod(w.shape))
    return replace(w, pieces=made, origin=w.origin and w.origin.made(f"plus {number}"))


def converted(source: Pieces, convert: Convert, read: int, made: int, numbers: int, total: int) -> Pieces:
    """``convert`` over ``total`` numbers: each ``read`` bytes of the source, ``numbers`` of them, become ``made``
    bytes."""

    def make(first: int, last: int) -> np.ndarray:
        return convert(joined(source, first * read, last * read))

    return Made(total // numbers * made, made, max(1, NUMBERS // numbers), make)


def unpermute_heads(w: Weight, heads: int) -> Weight:
    """Rows of a query or key matrix, or of its bias, in the order of transformers' files.

    llama.cpp's converter stores those of architecture ``llama`` with the two halves of each head interleaved
    (convert_hf_to_gguf.py, LlamaModel.permute).
    """
    count, rest = w.shape[_dimension(w, 0)], w.shape[1:]
    if heads < 1 or count % (2 * heads):
        raise _error(w, f"{count} rows are no {heads} heads of two halves")
    dims = range(3, 3 + len(rest))
    apart = permute(reshape(w, (heads, count // heads // 2, 2, *rest)), (0, 2, 1, *dims))
    return reshape(apart, w.shape)


def _narrow(w: Weight, dim: int, start: int, stop: int) -> Weight:
    dim = _dimension(w, dim)
    if not 0 <= start <= stop <= w.shape[dim]:
        raise _error(w, f"{start} to {stop} is outside of dimension {dim} of {list(w.shape)}")
    if (start, stop) == (0, w.shape[dim]):
        return w
    if dim == len(w.shape) - 1 and (start % w.type.block or stop % w.type.block):
        w = cast(w, unpacked(w.type))
    stride = _run(w, dim)
    low, high = (w.type.row_bytes(end * prod(w.shape[dim + 1 :])) for end in (start, stop))
    outer = prod(w.shape[:dim])
    shape = (*w.shape[:dim], stop - start, *w.shape[dim + 1 :])
    if outer == 1 and isinstance(w.pieces, View):
        pieces: Pieces = w.pieces.part(low, high)
    else:
        pieces = _Strips(outer, (_Strip(w.pieces, stride, low, high),))
    origin = w.origin and w.origin.made(f"{list(w.shape)} {start}-{stop} along {dim}")
    return replace(w, shape=shape, pieces=pieces, origin=origin)


@dataclass(frozen=True, slots=True)
class _Strip:
    """Of every ``stride`` bytes of a source those from ``low`` to ``high``."""

    pieces: Pieces
    stride: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class _Strips:
    """``count`` times one strip of each source after the other."""

    count: int
    strips: tuple[_Strip, ...]

    def __call__(self, start: int = 0, stop: int | None = None, /) -> Iterator[memoryview]:
        row = sum(strip.high - strip.low for strip in self.strips)
        stop = self.count * row if stop is None else min(stop, self.count * row)
        if start >= stop:
            return
        largest = max(strip.stride for strip in self.strips)
        if self.count == 1 or largest >= DIRECT:
            for i in range(start // row, -(-stop // row)):
                yield from self._direct(i, start - i * row, stop - i * row)
        else:
            yield from Made(self.count * row, row, max(1, BUFFER // max(largest, row)), self._gathered)(start, stop)

    def _direct(self, i: int, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes ``start`` to ``stop`` of row ``i``; the ends may lie outside of it."""
        at = 0
        for strip in self.strips:
            size = strip.high - strip.low
            low, high = max(start - at, 0), min(stop - at, size)
            if low < high:
                base = i * strip.stride + strip.low
                yield from strip.pieces(base + low, base + high)
            at += size

    def _gathered(self, first: int, last: int) -> np.ndarray:
        parts = []
        for strip in self.strips:
            source = joined(strip.pieces, first * strip.stride, last * strip.stride)
            parts.append(source.reshape(last - first, strip.stride)[:, strip.low : strip.high])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)


@dataclass(frozen=True, slots=True)
class Made:
    """``size`` bytes in rows of ``row`` bytes. ``make(i, j)`` gives rows i to j; it is asked for at most ``step``."""

    size: int
    row: int
    step: int
    make: Callable[[int, int], np.ndarray]

    def __call__(self, start: int = 0, stop: int | None = None, /) -> Iterator[memoryview]:
        stop = self.size if stop is None else min(stop, self.size)
        while start < stop:
            first = start // self.row
            last = min(first + self.step, -(-stop // self.row))
            made = np.ascontiguousarray(self.make(first, last)).reshape(-1).view(np.uint8)
            base = first * self.row
            yield made.data[start - base : stop - base]
            start = last * self.row


@dataclass(frozen=True, slots=True)
class _Permuted:
    """Rows of a source whose dimensions (``shape``, in units of ``dtype``) are taken in another order."""

    pieces: Pieces
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: np.dtype

    def __call__(self, first: int, last: int) -> np.ndarray:
        """A slice along dimension ``order[0]`` of the source, moved. A source in memory is indexed as a whole; another
        one is read through, a few of its own rows at a time."""
        if self.order[0] == 0:
            return self._source(first, last)
        if isinstance(self.pieces, View):
            part: np.ndarray = self._source(0, self.shape[0])[first:last]
            return part
        made = np.empty((last - first, *(self.shape[dim] for dim in self.order[1:])), self.dtype)
        there = np.moveaxis(made, self.order.index(0), 0)
        step = max(1, BUFFER // (prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            part = self._source(start, stop)[first:last]
            there[start:stop] = np.moveaxis(part, self.order.index(0), 0)
        return made

    def _source(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, their dimensions in the new order."""
        row = prod(self.shape[1:]) * self.dtype.itemsize
        units = joined(self.pieces, start * row, stop * row).view(self.dtype)
        moved: np.ndarray = units.reshape(stop - start, *self.shape[1:]).transpose(self.order)
        return moved


def whole_array(w: Weight) -> np.ndarray:
    """All bytes of a small tensor."""
    return joined(w.pieces, 0, w.nbytes)


def joined(pieces: Pieces, start: int, stop: int) -> np.ndarray:
    """Bytes ``start`` to ``stop`` as one array: a view where they are in one piece."""
    views = list(pieces(start, stop))
    return np.frombuffer(views[0] if len(views) == 1 else b"".join(views), np.uint8)


def _unit(type: Type) -> np.dtype:
    """A block as numpy moves it fastest."""
    return np.dtype(f"u{type.size}") if type.size in (1, 2, 4, 8) else np.dtype((np.void, type.size))


def _run(w: Weight, dim: int) -> int:
    """Bytes of all that has the same indices before ``dim``."""
    return w.type.row_bytes(prod(w.shape[dim:]))


def _dimension(w: Weight, dim: int) -> int:
    found = dim + len(w.shape) if dim < 0 else dim
    if not 0 <= found < len(w.shape):
        raise _error(w, f"{list(w.shape)} has no dimension {dim}")
    return found


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]


def _error(w: Weight, reason: str) -> CheckpointError:
    return CheckpointError(w.file, reason, w.name)
