"""Tensors of formats that keep numbers and scales apart, as tensors of one type: in blocks with their scales in them.

Each function takes the bytes of the numbers (a weight of I8) and what scales them, and gives a weight of a type of
blocks wherever whole blocks make its rows, so that it stays as small as it is on the way and on the device; otherwise
one of F16, or of BF16 where F16 would overflow or lose too much. Nothing but scales of tensors and rows is read before
the bytes are asked for; they are made piece by piece.

All raise :class:`CheckpointError`, which names the file and the tensor, for shapes that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from ..errors import CheckpointError
from ..ggml.codebooks import E2M1, NORMAL4, PARTS_OF_TWELVE
from ..ggml.types import BF16, F16, F32, TYPES, Type
from ..ggml.weight import Before, Pieces, Weight, joined_origin
from .expressions import BUFFER, NUMBERS, Made, cast, joined, reshape, whole_array
from .foreign import float8, hadamard, pairs
from .numbers import converter

Parts = Callable[[int, int], Sequence[np.ndarray]]
"""Rows i to j → the parts of their blocks, each uint8 [rows, blocks a row, bytes]; dimensions of one stand for many."""
Values = Callable[[int, int], np.ndarray]
"""Rows i to j → their numbers, float32."""

LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "I8": 128.0}
F16_RANGE = (2.0**-8, 65504.0)
"""The largest scaled number lies in this range if F16 holds the tensor about as precisely as 8 bits did; else BF16."""
CODEBOOKS = {"nf4": ("NF4", NORMAL4), "fp4": ("FP4", PARTS_OF_TWELVE)}
"""bitsandbytes' formats → the type, and the numbers that its codes stand for."""
ROTATIONS = (4, 16, 64, 256, 1024, 4096)
"""Sizes of groups that ConvRot rotates together."""
SQUARE = 128
"""Rows and columns that have a scale together in files of fp8 as DeepSeek's and Qwen's, the last ones fewer."""
TILE_ROWS, TILE_COLUMNS = 128, 4
"""Scales of blocks lie in tiles as tensor cores read them (cuBLAS: 1-D block scaling factors layout)."""


def plain8(raw: Weight, format: str) -> Weight:
    """8-bit floats as they are."""
    held = TYPES[format]
    if raw.shape and raw.shape[-1] % held.block == 0:
        return replace(raw, type=held)
    table = _table(format, 1.0, F16)
    return _derived(raw, F16, raw.shape, _looked_up(raw, table), (), _why_plain(format, raw, held))


def scaled8(raw: Weight, format: str, scale: Weight) -> Weight:
    """Floats of 8 bits (or I8), each times the scale of the tensor, of its row, or of its square."""
    if _has_squares(raw, scale):
        return _in_squares(raw, format, scale)
    factors = _factors(raw, scale)
    target = _plain_for(format, factors)
    if not prod(raw.shape):
        return replace(raw, type=target)
    count, row = len(factors), prod(raw.shape) // max(len(factors), 1)
    held = _scaled_type(format, row, factors)
    if held is None or target == BF16:
        return _unpacked8(raw, format, factors, target, scale)
    heads = factors.astype("<f2" if held.name == "Q8_0" else "<f4").view(np.uint8).reshape(count, 1, -1)
    if count == 1 and raw.shape:  # one scale: rows as they lie, so that pieces are small
        count, row = prod(raw.shape[:-1]), raw.shape[-1]
        if row % held.block:
            count, row = prod(raw.shape) // held.block, held.block
        heads = np.broadcast_to(heads, (count, 1, heads.shape[-1]))

    def parts(first: int, last: int) -> Sequence[np.ndarray]:
        numbers = joined(raw.pieces, first * row, last * row)
        return heads[first:last], numbers.reshape(last - first, row // held.block, held.block)

    flat = _in_blocks(raw, held, (count, row), parts, [scale])
    return reshape(flat, raw.shape)


def _has_squares(raw: Weight, scale: Weight) -> bool:
    if len(raw.shape) != 2 or prod(scale.shape) < 2 or scale.shape == (raw.shape[0], 1):
        return False
    return scale.shape == tuple(-(-size // SQUARE) for size in raw.shape)


def _in_squares(raw: Weight, format: str, scale: Weight) -> Weight:
    """Each :data:`SQUARE` rows and columns times a scale."""
    (rows, columns), factors = raw.shape, _floats(raw, scale).reshape(scale.shape)
    target, held = _plain_for(format, factors), _scaled_type(format, columns, factors)
    if held is not None and target == F16:
        kind, block = np.dtype("<f2" if held.name == "Q8_0" else "<f4"), held.block
        heads = np.repeat(factors.astype(kind), SQUARE // block, 1)[:, : columns // block, None].view(np.uint8)

        def parts(first: int, last: int) -> Sequence[np.ndarray]:
            numbers = joined(raw.pieces, first * columns, last * columns)
            return heads[np.arange(first, last) // SQUARE], numbers.reshape(last - first, columns // block, block)

        return _in_blocks(raw, held, (rows, columns), parts, [scale])
    meant, square = _meant(format), np.arange(columns) // SQUARE

    def values(first: int, last: int) -> np.ndarray:
        codes = joined(raw.pieces, first * columns, last * columns).reshape(last - first, columns)
        found: np.ndarray = meant[codes] * factors[np.arange(first, last) // SQUARE][:, square]
        return found

    what = _why_plain(f"{format} in squares", raw, _blocks_for(format))
    return _of_values(raw, target, (rows, columns), columns, values, [scale], what)


def mxfp8(raw: Weight, scale: Weight) -> Weight:
    """Floats of 8 bits (E4M3), each 32 of a row times a power of two, of which there is the exponent."""
    rows, columns = _matrix(raw, 32)
    held, at = TYPES["MXFP8"], _tiled(raw, scale, rows, columns // 32)

    def parts(first: int, last: int) -> Sequence[np.ndarray]:
        numbers = joined(raw.pieces, first * columns, last * columns)
        return at(first, last)[..., None], numbers.reshape(last - first, columns // 32, 32)

    return _in_blocks(raw, held, (rows, columns), parts, [scale])


def nvfp4(raw: Weight, scale: Weight, whole: Weight) -> Weight:
    """Floats of 4 bits (E2M1), two in a byte, the first one in its high half; each 16 of a row times a scale (E4M3),
    and all times ``whole`` (F32)."""
    if whole.type != F32 or prod(whole.shape) != 1:
        raise _error(raw, f"has a scale of its tensor {whole.type} {list(whole.shape)}; one F32 number is understood")
    rows, half = _matrix(raw, 8)
    held, at, factor = TYPES["NVFP4_SCALED"], _tiled(raw, scale, rows, half // 8), whole_array(whole)
    if half % 32:
        return _nvfp4_unpacked(raw, at, float(factor.view("<f4")[0]), [scale, whole])

    def parts(first: int, last: int) -> Sequence[np.ndarray]:
        numbers = joined(raw.pieces, first * half, last * half)
        scales = at(first, last).reshape(last - first, -1, 4)
        return factor.reshape(1, 1, 4), scales, numbers.reshape(last - first, half // 32, 32)

    return _in_blocks(raw, held, (rows, 2 * half), parts, [scale, whole])


def _nvfp4_unpacked(raw: Weight, at: Callable[[int, int], np.ndarray], factor: float, sources: list[Weight]) -> Weight:
    rows, half = raw.shape
    numbers = np.array(E2M1, np.float32)

    def values(first: int, last: int) -> np.ndarray:
        codes = pairs(joined(raw.pieces, first * half, last * half)).reshape(last - first, half // 8, 16)
        scales = np.float32(factor) * float8("F8_E4M3")[at(first, last)]
        found: np.ndarray = scales[..., None] * numbers[codes]
        return found

    return _of_values(raw, F16, (rows, 2 * half), 2 * half, values, sources, f"nvfp4 in rows of {2 * half}")


def rotated8(raw: Weight, scale: Weight, group: int) -> Weight:
    """I8 times the scale of its row, in rows of which each ``group`` numbers were rotated (ConvRot)."""
    if group not in ROTATIONS:
        raise _error(raw, f"has rotated groups of {group} numbers; there are {', '.join(map(str, ROTATIONS))}")
    rows, columns = _matrix(raw, group)
    factors = _factors(raw, scale)
    heads = np.broadcast_to(factors.astype("<f4").view(np.uint8).reshape(-1, 1, 4), (rows, 1, 4))
    target = _plain_for("I8", factors)
    if group == TYPES["I8_CONVROT"].block and target == F16:

        def parts(first: int, last: int) -> Sequence[np.ndarray]:
            numbers = joined(raw.pieces, first * columns, last * columns)
            return heads[first:last], numbers.reshape(last - first, columns // group, group)

        return _in_blocks(raw, TYPES["I8_CONVROT"], (rows, columns), parts, [scale])
    each = np.broadcast_to(factors, rows)

    def values(first: int, last: int) -> np.ndarray:
        numbers = joined(raw.pieces, first * columns, last * columns).view(np.int8)
        scaled = numbers.reshape(last - first, columns) * each[first:last, None]
        turned: np.ndarray = scaled.reshape(-1, group) @ hadamard(group)
        return turned

    what = f"I8 with ConvRot in groups of {group}"
    if group == TYPES["I8_CONVROT"].block:
        what = _why_plain("I8 with ConvRot", raw, TYPES["I8_CONVROT"])
    return _of_values(raw, target, (rows, columns), columns, values, [scale], what)


def four_bits(
    raw: Weight, kind: str, shape: tuple[int, ...], size: int, absmax: Values, book: np.ndarray, sources: list[Weight]
) -> Weight:
    """bitsandbytes' codes, two in a byte, the first one in its high half, for numbers of ``book``; each ``size`` of
    them, across rows, times one of ``absmax``."""
    held, usual = TYPES[CODEBOOKS[kind][0]], np.array(CODEBOOKS[kind][1], np.float32)
    count = prod(shape)
    if not count or prod(raw.shape) * raw.type.size * 2 != count or count % size:
        reason = f"has {prod(raw.shape) * raw.type.size * 2} numbers in blocks of {size}, which are no {list(shape)}"
        raise _error(raw, reason)
    if np.array_equal(book, usual) and size % held.block == 0:
        each = size // held.block

        def parts(first: int, last: int) -> Sequence[np.ndarray]:
            scales = np.repeat(absmax(first // each, -(-last // each)), each)[first % each :][: last - first]
            numbers = joined(raw.pieces, first * 32, last * 32)
            return scales.astype("<f4").view(np.uint8).reshape(-1, 1, 4), numbers.reshape(-1, 1, 32)

        return reshape(_in_blocks(raw, held, (count // held.block, held.block), parts, sources), shape)

    def values(first: int, last: int) -> np.ndarray:
        codes = pairs(joined(raw.pieces, first * size // 2, last * size // 2)).reshape(last - first, size)
        found: np.ndarray = absmax(first, last)[:, None] * book[codes]
        return found

    which = "" if np.array_equal(book, usual) else " of other numbers"
    return _of_values(raw, F16, shape, size, values, sources, f"{kind} in blocks of {size}{which}")


def _factors(raw: Weight, scale: Weight) -> np.ndarray:
    """The scales, float32: one, or one for each row."""
    per_row = bool(raw.shape) and scale.shape in ((raw.shape[0],), (raw.shape[0], 1))
    if prod(scale.shape) != 1 and not per_row:
        raise _strange(raw, scale)
    return _floats(raw, scale)


def _floats(raw: Weight, scale: Weight) -> np.ndarray:
    if scale.type not in (F32, F16, BF16):
        raise _strange(raw, scale)
    factors: np.ndarray = whole_array(cast(scale, F32)).view("<f4")
    return factors


def _strange(raw: Weight, scale: Weight) -> CheckpointError:
    known = f"one F32 number, one for each row or one for each {SQUARE}×{SQUARE} numbers are understood"
    return _error(raw, f"has scales {scale.type} {list(scale.shape)}; {known}")


def _meant(format: str) -> np.ndarray:
    """What each of the 256 codes means, float32."""
    return np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32) if format == "I8" else float8(format)


def _plain_for(format: str, factors: np.ndarray) -> Type:
    """The plain type for numbers of ``format`` times ``factors``."""
    largest = LARGEST[format] * float(np.max(np.abs(factors), initial=0.0))
    return F16 if F16_RANGE[0] <= largest <= F16_RANGE[1] else BF16


def _scaled_type(format: str, row: int, factors: np.ndarray) -> Type | None:
    """The type of blocks for rows of ``row`` numbers with such scales, if there is one. ggml's Q8_0 has scales in F16:
    it is as good as its numbers, which have 8 bits, where these keep 11 bits of the largest one."""
    held = _blocks_for(format)
    if row % held.block:
        return None
    if format == "I8":
        with np.errstate(over="ignore"):  # infinite is too far off
            narrow = factors.astype(np.float16).astype(np.float32)
        if not np.max(np.abs(narrow - factors)) <= np.max(np.abs(factors)) * 2.0**-11:
            return None
    return held


def _blocks_for(format: str) -> Type:
    return TYPES["Q8_0"] if format == "I8" else TYPES[f"{format}_SCALED"]


def _unpacked8(raw: Weight, format: str, factors: np.ndarray, target: Type, scale: Weight) -> Weight:
    why = _why_plain(format, raw, _blocks_for(format))
    if len(factors) == 1 and format != "I8":
        looked_up = _looked_up(raw, _table(format, float(factors[0]), target))
        return _derived(raw, target, raw.shape, looked_up, [scale], why)
    rows = raw.shape[0] if raw.shape else 1
    row, each = prod(raw.shape[1:]), np.broadcast_to(factors, rows)
    numbers = _meant(format)

    def values(first: int, last: int) -> np.ndarray:
        codes = joined(raw.pieces, first * row, last * row)
        found: np.ndarray = numbers[codes].reshape(last - first, row) * each[first:last, None]
        return found

    return _of_values(raw, target, raw.shape, row, values, [scale], why)


def _table(format: str, scale: float, target: Type) -> np.ndarray:
    """The bits of each of the 256 numbers times the scale."""
    with np.errstate(all="ignore"):
        scaled = (float8(format) * np.float32(scale)).astype(np.float32)
    return converter(F32, target)(scaled.view(np.uint8)).view("<u2")


def _looked_up(raw: Weight, table: np.ndarray) -> Pieces:
    total = prod(raw.shape)

    def make(first: int, last: int) -> np.ndarray:
        found: np.ndarray = table[joined(raw.pieces, first, last)]
        return found

    return Made(2 * total, 2, NUMBERS, make)


def _matrix(raw: Weight, unit: int) -> tuple[int, int]:
    """The shape of a matrix whose rows are whole ``unit`` numbers."""
    if len(raw.shape) != 2 or raw.shape[1] % unit or 0 in raw.shape:
        raise _error(raw, f"is {list(raw.shape)}, which is no matrix with rows of whole {unit} bytes")
    return raw.shape[0], raw.shape[1]


def _tiled(raw: Weight, scale: Weight, rows: int, columns: int) -> Callable[[int, int], np.ndarray]:
    """Scales of ``rows`` × ``columns`` blocks, bytes, of rows i to j: they lie in tiles, with others that fill these
    up."""
    high, wide = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    if scale.type.size != 1 or prod(scale.shape) != high * wide * TILE_ROWS * TILE_COLUMNS:
        wanted = [high * TILE_ROWS, wide * TILE_COLUMNS]
        raise _error(raw, f"has scales of blocks {scale.type} {list(scale.shape)}, not of one byte {wanted}")
    across = np.arange(columns)
    across = across // TILE_COLUMNS * (TILE_ROWS * TILE_COLUMNS) + across % TILE_COLUMNS

    def at(first: int, last: int) -> np.ndarray:
        row = np.arange(first, last)
        begin, end = first // TILE_ROWS * wide * 512, -(-last // TILE_ROWS) * wide * 512
        down = row // TILE_ROWS * (wide * 512) + row % 32 * 16 + row % TILE_ROWS // 32 * 4
        found: np.ndarray = joined(scale.pieces, begin, end)[(down - begin)[:, None] + across]
        return found

    return at


def _in_blocks(raw: Weight, held: Type, shape: tuple[int, int], parts: Parts, sources: Sequence[Weight]) -> Weight:
    """A matrix whose blocks consist of ``parts``."""
    rows, columns = shape
    blocks, size = columns // held.block, held.row_bytes(columns)

    def make(first: int, last: int) -> np.ndarray:
        made = np.empty((last - first, blocks, held.size), np.uint8)
        at = 0
        for part in parts(first, last):
            made[..., at : at + part.shape[-1]] = part
            at += part.shape[-1]
        return made

    pieces = Made(rows * size, max(size, 1), max(1, BUFFER // max(size, 1)), make)
    return _derived(raw, held, shape, pieces, sources)


def _of_values(
    raw: Weight, target: Type, shape: tuple[int, ...], row: int, values: Values, sources: Sequence[Weight], format: str
) -> Weight:
    """A tensor of a plain type, of the numbers of its rows of ``row``; ``format``: what no type holds."""
    encode = converter(F32, target)

    def make(first: int, last: int) -> np.ndarray:
        with np.errstate(all="ignore"):
            made = np.ascontiguousarray(values(first, last), np.float32)
        return encode(made.reshape(-1).view(np.uint8))

    size = target.size * row
    pieces = Made(target.size * prod(shape), max(size, 1), max(1, NUMBERS // max(row, 1)), make)
    return _derived(raw, target, shape, pieces, sources, format)


def _derived(
    raw: Weight, type: Type, shape: tuple[int, ...], pieces: Pieces, sources: Sequence[Weight], format: str = ""
) -> Weight:
    origin = joined_origin(type.name, [raw.origin, *(source.origin for source in sources)])
    stored = raw.nbytes + sum(source.nbytes for source in sources)
    before = Before(format, 8 * stored / max(prod(shape), 1)) if format else None
    return Weight(raw.name, type, shape, pieces, origin, raw.file, before)


def _why_plain(format: str, raw: Weight, held: Type) -> str:
    """What of a file ``held`` does not hold: rows that are no whole blocks, or else such scales."""
    columns = raw.shape[-1] if raw.shape else 1
    return f"{format} " + (f"in rows of {columns}" if columns % held.block else "with scales that F16 does not hold")


def _error(raw: Weight, reason: str) -> CheckpointError:
    return CheckpointError(raw.file, reason, raw.name)
