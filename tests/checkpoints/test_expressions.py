"""Expressions over tensors: each against numpy on the numbers, for every type, in whole and in any range of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc.checkpoints import expressions as e
from sdrpc.checkpoints import foreign
from sdrpc.checkpoints.numbers import unpacked
from sdrpc.errors import CheckpointError
from sdrpc.ggml.types import NUMPY_DTYPES, TYPES, Type
from sdrpc.ggml.weight import Origin, View, Weight, Whole

UNREADABLE = {"Q8_1", "Q8_K", "Q1_0", "Q2_0"}
"""Types that the gguf library does not unpack."""
PLAIN = [name for name, kind in TYPES.items() if kind.plain]
BLOCKS = [name for name, kind in TYPES.items() if not kind.plain and name not in UNREADABLE]
WRITABLE = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


few = settings(max_examples=30)
"""Each is drawn for two sizes of buffers; the gguf library takes its time for some types."""


def numbers(w: Weight) -> np.ndarray:
    """What the bytes mean, as float64 (whole numbers as they are): blocks of ggml's by the gguf library."""
    data = np.frombuffer(w.data(), np.uint8)
    assert data.size == w.nbytes
    if w.type.name in NUMPY_DTYPES:
        return data.view(NUMPY_DTYPES[w.type.name]).reshape(w.shape)
    if not data.size:
        return np.zeros(w.shape)
    if (read := foreign.READ.get(w.type.name)) is not None:
        return read(data.reshape(-1, w.type.size)).reshape(w.shape)
    rows = data.reshape(*w.shape[:-1], -1)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[w.type.name]).reshape(w.shape)


def random(seed: int, type: Type, shape: Sequence[int], name: str = "w") -> Weight:
    """A tensor in memory whose numbers are finite and small."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape, dtype=int))
    if type.name in NUMPY_DTYPES:
        data = (rng.normal(size=size) * 100).astype(NUMPY_DTYPES[type.name]).tobytes()
    elif type.name == "BF16":
        data = (rng.normal(size=size).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:  # any bytes are blocks; where they may hold an exponent, no exponent is large
        blocks = rng.integers(0, 256, (size // type.block, type.size), np.uint8) & 0x3F
        if type.name == "MXFP8":
            blocks[:, 0] |= 0x40  # nor so small that BF16 would round what it is made of
        if type.name == "I8_CONVROT":  # a scale of 2^-15 … 2^-1: sums are the same in any order
            blocks[:, :3], blocks[:, 3] = 0, blocks[:, 3] | 0x38
        data = blocks.tobytes()
    return Weight(name, type, tuple(shape), View(memoryview(data)), Origin("f", name), "m.gguf")


def made(w: Weight) -> Weight:
    """The same tensor without a view of all its bytes: in pieces of odd sizes."""

    def pieces(start: int = 0, stop: int | None = None, /) -> Any:
        data = w.data()[start:stop]
        for at in range(0, len(data), 37):
            yield data[at : at + 37]

    return Weight(w.name, w.type, w.shape, pieces, w.origin, w.file)


@st.composite
def weights(draw: st.DrawFn, least: int = 1, kinds: Sequence[str] = (*PLAIN, *BLOCKS)) -> Weight:
    kind = TYPES[draw(st.sampled_from(kinds))]
    dims = draw(st.lists(st.integers(1, 4), min_size=least, max_size=4))
    dims[-1] *= kind.block
    w = random(draw(st.integers(0, 99)), kind, dims)
    return made(w) if draw(st.booleans()) else w


@pytest.fixture(autouse=True, params=["large buffers", "small buffers"])
def buffers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results when everything is made in several pieces."""
    if request.param == "small buffers":
        for name, size in (("BUFFER", 2000), ("NUMBERS", 512), ("DIRECT", 300)):
            monkeypatch.setattr(e, name, size)


def check(data: st.DataObject, got: Weight, wanted: np.ndarray, type: Type | None) -> None:
    """Shape, type and numbers; any range of bytes is that of the whole."""
    assert got.shape == wanted.shape
    assert got.file == "m.gguf"
    if type is not None:
        assert got.type == type
    expected = wanted.astype(np.float16) if got.type.name == "F16" and wanted.dtype != np.float16 else wanted
    np.testing.assert_array_equal(numbers(got), expected)
    whole = bytes(got.data())
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    assert b"".join(got.pieces(start, stop)) == whole[start:stop]


def kept(w: Weight, *ends: int) -> Type:
    """The type of a part of the last dimension."""
    return unpacked(w.type) if any(end % w.type.block for end in ends) else w.type


def ends(data: st.DataObject, size: int, block: int) -> tuple[int, int]:
    """A range, often of whole blocks."""
    unit = data.draw(st.sampled_from([1, block]))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, size // unit)] * 2)))
    return start * unit, stop * unit


@few
@given(st.data(), weights())
def test_rows(data: st.DataObject, w: Weight) -> None:
    last = len(w.shape) == 1
    start, stop = ends(data, w.shape[0], w.type.block if last else 1)
    kind = kept(w, start, stop) if last and (start, stop) != (0, w.shape[0]) else w.type
    check(data, e.rows(w, start, stop), numbers(w)[start:stop], kind)


@few
@given(st.data(), weights(2))
def test_columns(data: st.DataObject, w: Weight) -> None:
    last = len(w.shape) == 2
    start, stop = ends(data, w.shape[1], w.type.block if last else 1)
    kind = kept(w, start, stop) if last and (start, stop) != (0, w.shape[1]) else w.type
    check(data, e.columns(w, start, stop), numbers(w)[:, start:stop], kind)


@few
@given(st.data(), weights())
def test_split_and_concat(data: st.DataObject, w: Weight) -> None:
    dim = data.draw(st.integers(-len(w.shape), len(w.shape) - 1))
    size, last = w.shape[dim], dim in (-1, len(w.shape) - 1)
    a, b = ends(data, size, w.type.block if last else 1)
    sizes = (a, b - a, size - b)
    parts = e.split(w, sizes, dim)
    kind = kept(w, a, b) if last else w.type
    for part, wanted in zip(parts, np.split(numbers(w), [a, b], dim), strict=True):
        check(data, part, wanted, kind)
    order = data.draw(st.permutations(range(3)))
    joined = np.concatenate([numbers(parts[i]) for i in order], dim)
    check(data, e.concat([parts[i] for i in order], dim), joined, kind)


@few
@given(st.data(), st.sampled_from(PLAIN), st.sampled_from(["Q8_0", "Q4_K", "MXFP4", "F16", "BF16", "F32"]))
def test_unlike_types_are_joined_as_torch_joins_them(data: st.DataObject, one: str, other: str) -> None:
    a, b = random(1, TYPES[one], (2, 256)), random(2, TYPES[other], (3, 256))
    plain = unpacked(b.type)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    dtypes |= {"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
    common = torch.promote_types(dtypes[one], dtypes[plain.name])
    got = e.concat([a, b])
    assert dtypes[got.type.name] == common
    wanted = [torch.from_numpy(numbers(w).astype(np.float64)).to(common) for w in (a, b)]
    check(data, got, torch.cat(wanted).to(torch.float64 if common != torch.int64 else common).numpy(), None)


@few
@given(st.data(), weights(2))
def test_transpose(data: st.DataObject, w: Weight) -> None:
    w = e.reshape(w, (w.shape[0], int(np.prod(w.shape[1:]))))
    kind = w.type if 1 in w.shape[:1] and w.type.plain else unpacked(w.type)
    check(data, e.transpose(w), numbers(w).T, kind)


@few
@given(st.data(), weights())
def test_permute(data: st.DataObject, w: Weight) -> None:
    order = data.draw(st.permutations(range(len(w.shape))))
    stays = order[-1] == len(order) - 1
    check(data, e.permute(w, order), numbers(w).transpose(order), w.type if stays else unpacked(w.type))


@few
@given(st.data(), weights())
def test_reshape(data: st.DataObject, w: Weight) -> None:
    whole = int(np.prod(w.shape))
    last = data.draw(st.sampled_from([n for n in range(1, whole + 1) if whole % n == 0]))
    wanted = numbers(w).reshape(whole // last, last)
    check(data, e.reshape(w, wanted.shape), wanted, kept(w, last))


@few
@given(st.data(), weights())
def test_swap_halves(data: st.DataObject, w: Weight) -> None:
    if w.shape[0] % 2:
        with pytest.raises(CheckpointError, match=r"m\.gguf: tensor 'w': .* no halves"):
            e.swap_halves(w)
        return
    a, b = np.split(numbers(w), 2)
    check(data, e.swap_halves(w), np.concatenate([b, a]), None if len(w.shape) == 1 else w.type)


def permuted_by_llama_cpp(weights: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py, for models with as many key heads."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


@few
@given(st.data(), st.sampled_from([*PLAIN, *BLOCKS]), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2))
def test_unpermute_heads(data: st.DataObject, name: str, heads: int, half: int, blocks: int) -> None:
    kind = TYPES[name]
    w = random(heads, kind, (heads * 2 * half, blocks * kind.block))
    got = e.unpermute_heads(made(w) if data.draw(st.booleans()) else w, heads)
    check(data, got, numbers(got), kind)
    np.testing.assert_array_equal(permuted_by_llama_cpp(numbers(got), heads), numbers(w))
    bias = random(heads, TYPES["F32"], (heads * 2 * half,))
    got = e.unpermute_heads(bias, heads)
    np.testing.assert_array_equal(permuted_by_llama_cpp(numbers(got), heads), numbers(bias))


@few
@given(st.data(), weights(), st.sampled_from(["F32", "F16", "BF16", "F64"]))
def test_cast(data: st.DataObject, w: Weight, to: str) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[to]
    wanted = torch.from_numpy(numbers(w).copy()).to(dtype)
    check(data, e.cast(w, TYPES[to]), (wanted.float() if to == "BF16" else wanted).numpy(), TYPES[to])


@few
@given(st.data(), weights(kinds=("F32", "F16", "BF16")), st.sampled_from(WRITABLE))
def test_cast_to_blocks(data: st.DataObject, w: Weight, to: str) -> None:
    if w.shape[-1] % 32:
        with pytest.raises(CheckpointError, match="no whole number"):
            e.cast(w, TYPES[to])
        return
    got = e.cast(w, TYPES[to])
    kind = gguf.GGMLQuantizationType[to]
    wanted = gguf.quants.dequantize(gguf.quants.quantize(numbers(w).astype(np.float32), kind), kind)
    check(data, got, wanted, TYPES[to])


def test_bfloat16_is_rounded_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint32)
    bits[:4] = 0x7F800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF
    w = Weight("w", TYPES["F32"], (len(bits),), View(memoryview(bits).cast("B")))
    got = torch.frombuffer(bytearray(e.cast(w, TYPES["BF16"]).data()), dtype=torch.bfloat16)
    wanted = torch.from_numpy(bits.view(np.float32)).bfloat16()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_views_are_the_file_s_own_bytes(kind: str) -> None:
    """Rows, splits, joins, swapped halves and shapes: all at the addresses of the source, nothing copied."""
    w = random(0, TYPES[kind], (8, 512))
    base, row = address(w.data()), w.nbytes // 8
    assert address(e.rows(w, 3, 5).data()) == base + 3 * row
    assert [address(part.data()) for part in e.split(w, (2, 6))] == [base, base + 2 * row]
    assert address(e.reshape(e.rows(w, 2, 4), (2, 2, 256)).data()) == base + 2 * row
    assert address(e.permute(e.reshape(w, (8, 1, 512)), (1, 0, 2)).data()) == base
    assert [address(view) for view in e.swap_halves(w).pieces()] == [base + 4 * row, base]
    joined = e.concat([e.rows(w, 0, 1), e.rows(w, 5, 8)])
    assert [address(view) for view in joined.pieces(1)] == [base + 1, base + 5 * row]
    vector = random(0, TYPES[kind], (512,))
    assert address(e.rows(vector, 256, 512).data()) == address(vector.data()) + vector.nbytes // 2


def test_ranges_read_no_more_than_they_need() -> None:
    """Of a join only the sources that the range touches are asked."""
    asked: list[str] = []

    def source(name: str) -> Weight:
        return Weight(name, TYPES["F32"], (4, 8), Whole(lambda: (asked.append(name), bytes(128))[1]))

    joined = e.concat([source("a"), source("b"), source("c")])
    assert len(b"".join(joined.pieces(130, 200))) == 70
    assert asked == ["b"]


@pytest.mark.parametrize("order", [(1, 0), (1, 2, 0), (2, 1, 0), (1, 0, 2)])
def test_pieces_are_bounded(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e, "BUFFER", 1 << 10)
    shape = (16, 1024) if len(order) == 2 else (2, 512, 64)
    w = random(0, TYPES["F32"], shape)
    got = e.permute(e.cast(w, TYPES["F16"]), order)
    assert max(map(len, got.pieces())) <= 1 << 10
    np.testing.assert_array_equal(numbers(got), numbers(w).transpose(order).astype(np.float16))


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        (lambda w: e.rows(w, 1, 9), "1 to 9 is outside of dimension 0"),
        (lambda w: e.rows(w, -1, 2), "-1 to 2 is outside"),
        (lambda w: e.split(w, (1, 2)), r"can't be split into \[1, 2\]"),
        (lambda w: e.split(w, (1, 3), 2), "no dimension 2"),
        (lambda w: e.concat([w, e.rows(w, 0, 2)], 1), "can't be joined to 'w'"),
        (lambda w: e.transpose(e.reshape(w, (2, 2, 8))), "no matrix"),
        (lambda w: e.permute(w, (0, 0)), "no order"),
        (lambda w: e.reshape(w, (3, 8)), "another number of elements"),
        (lambda w: e.cast(w, TYPES["Q8_0"]), "no whole number of Q8_0's blocks of 32"),
        (lambda w: e.cast(e.reshape(w, (1, 32)), TYPES["Q8_K"]), "no whole number"),
        (lambda w: e.cast(random(0, TYPES["Q8_K"], (2, 256)), TYPES["F32"]), "does not read it"),
        (lambda w: e.cast(random(0, TYPES["F32"], (2, 256)), TYPES["Q4_K"]), "nothing here writes it"),
        (lambda w: e.unpermute_heads(w, 3), "no 3 heads"),
    ],
)
def test_what_does_not_fit_names_file_and_tensor(expression: Callable[[Weight], object], reason: str) -> None:
    with pytest.raises(CheckpointError, match=rf"m\.gguf: tensor 'w': .*{reason}"):
        expression(random(0, TYPES["F32"], (4, 8)))


def test_origins_tell_expressions_apart() -> None:
    a, b = random(0, TYPES["F16"], (4, 4), "a"), random(1, TYPES["F16"], (4, 4), "b")
    other = Weight("a", a.type, a.shape, a.pieces, Origin("another file", "a"))
    made = [
        e.rows(a, 0, 2), e.rows(b, 0, 2), e.columns(a, 0, 2), e.transpose(a), e.cast(a, TYPES["F32"]), e.concat([a, b]),
        e.concat([b, a]), e.concat([a, b], 1), e.concat([other, b]), e.swap_halves(a), e.unpermute_heads(a, 1),
    ]  # fmt: skip
    assert None not in {w.origin for w in made}
    assert len({w.origin for w in made}) == len(made)
    assert e.concat([e.rows(a, 0, 2), b]).origin == e.concat([e.rows(a, 0, 2), b]).origin
    assert e.concat([a, Weight("c", a.type, a.shape, a.pieces)]).origin is None


@pytest.mark.parametrize("name", ["F32", "F16"])
def test_plus(name: str) -> None:
    w = made(random(1, TYPES[name], (3, 5)))
    got = e.plus(w, -1)
    assert (got.type.name, got.shape) == ("F32", (3, 5))
    np.testing.assert_array_equal(numbers(got), numbers(w).astype(np.float32) - np.float32(1))
    assert got.origin not in (w.origin, e.plus(w, 1).origin)
