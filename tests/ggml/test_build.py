"""Builders: shapes are the rules', strides are those that ggml would compute."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.errors import GraphError
from sdrpc.ggml import params as p
from sdrpc.ggml.build import cast, cont, cpy, inplace, leaf, mul_mat, node, permute, reshape, transpose, view
from sdrpc.ggml.tensor import contiguous_strides, dims, is_contiguous
from sdrpc.ggml.types import F16, F32, TYPES

SHAPE = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def test_a_leaf_is_dense() -> None:
    weight = leaf(TYPES["Q4_K"], 512, 7, name="w", buffer=3, offset=32)
    assert (weight.ne, weight.nb) == ((512, 7, 1, 1), (144, 288, 2016, 2016))
    assert (weight.buffer, weight.offset, weight.name) == (3, 32, "w")
    with pytest.raises(ValueError, match="blocks"):
        leaf(TYPES["Q4_K"], 500, 7)


def test_mul_mat_follows_ggml() -> None:
    product = mul_mat(leaf(F16, 8, 5), leaf(F32, 8, 3, 2), prec=10, name="out")
    assert (product.type, product.ne, product.name) == (F32, (5, 3, 2, 1), "out")
    assert product.params == p.MulMat(10)
    assert (product.buffer, product.view_src) == (0, None)


def test_nodes_take_what_rules_leave_free() -> None:
    assert node("REPEAT", leaf(F32, 3), ne=(6, 2)).ne == (6, 2, 1, 1)
    assert node("ADD", leaf(F16, 3), leaf(F32, 3), type=F32).type == F32
    assert cont(leaf(F32, 6), 2, 3).ne == (2, 3, 1, 1)
    assert cast(leaf(F32, 6), F16).nb == (2, 12, 12, 12)
    with pytest.raises(GraphError, match="broadcast"):
        node("ADD", leaf(F32, 3), leaf(F32, 2))


@given(SHAPE, st.permutations(range(4)))
def test_permute_moves_dimensions_and_their_strides(ne: list[int], axes: list[int]) -> None:
    source = leaf(F32, *ne)
    moved = permute(source, *axes)
    for i, axis in enumerate(axes):
        assert (moved.ne[axis], moved.nb[axis]) == (source.ne[i], source.nb[i])
    assert moved.view_src is source
    back = permute(moved, *(axes.index(i) for i in range(4)))
    assert (back.ne, back.nb) == (source.ne, source.nb)
    assert back.view_src is source  # the owner of the bytes, not the name that it came from


@given(SHAPE)
def test_transpose_twice_is_nothing(ne: list[int]) -> None:
    source = leaf(F32, *ne)
    twice = transpose(transpose(source))
    assert (twice.ne, twice.nb, twice.view_offset) == (source.ne, source.nb, 0)


@given(SHAPE)
def test_reshape_is_dense(ne: list[int]) -> None:
    flat = reshape(leaf(F32, *ne), leaf(F32, *ne).elements)
    assert is_contiguous(flat.type, flat.ne, flat.nb)
    assert reshape(flat, *ne).nb == contiguous_strides(F32, dims(*ne))


def test_views_as_in_ggml() -> None:
    source = leaf(F32, 6, 5, 4, buffer=1, offset=64)
    row = view(source, 3, offset=8)
    assert (row.nb, row.view_offset, row.buffer, row.offset) == ((4, 12, 12, 12), 8, 1, 72)
    assert view(source, 3, 2).nb == (4, 24, 48, 48)
    assert view(source, 3, 2, 2).nb == (4, 24, 120, 240)
    assert view(source, 3, 2, nb=(48,)).nb == (4, 48, 96, 96)
    inner = view(row, 1, offset=4)
    assert (inner.view_src, inner.view_offset, inner.params) == (source, 12, p.View(4))


@pytest.mark.parametrize("offset", [0, 4, 2**31, 2**32 - 4, 2**32, 5 * 2**32 + 2**31])
def test_view_offsets_are_two_signed_words(offset: int) -> None:
    low, high = view(leaf(F32, 1), 1, offset=offset).params
    assert (low & 0xFFFFFFFF) + (high << 32) == offset
    assert -(2**31) <= low < 2**31


def test_what_writes_over_memory_is_a_name_for_it() -> None:
    cache = leaf(F16, 4, 8, buffer=1)
    part = view(cache, 4, 2, offset=16)
    written = cpy(leaf(F32, 4, 2), part)
    assert (written.type, written.ne, written.view_src, written.view_offset) == (F16, (4, 2, 1, 1), cache, 16)
    x = node("SQR", leaf(F32, 4))
    assert inplace("ADD", x, leaf(F32, 4)).view_src is x
    assert inplace("ADD", leaf(F32, 4), x, into=1).view_src is x
    with pytest.raises(GraphError, match="declared"):
        inplace("ADD", leaf(F32, 4, 2), leaf(F32, 4), into=1)
    with pytest.raises(ValueError, match="no source 1"):
        inplace("SOFT_MAX", x, None, into=1, params=p.SoftMax(1.0))
