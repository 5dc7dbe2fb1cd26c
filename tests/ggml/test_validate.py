"""The spec of foreign graphs: each class of check, with what it lets through."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from sdrpc.errors import GraphError, UnsupportedOperation
from sdrpc.ggml import params as p
from sdrpc.ggml.build import cpy, inplace, leaf, mul_mat, node, permute, reshape, transpose, view
from sdrpc.ggml.memory_planner import place
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import F16, F32, I32, I64, TYPES
from sdrpc.ggml.validate import check
from tests.support.cases import CASES
from tests.support.feed import Feed, graph

SIZES = {1: 1024, 2: 256}
X = leaf(F32, 6, 4, name="x", buffer=1)
ROW = leaf(F32, 6, buffer=1, offset=512)
SUM = replace(node("ADD", X, ROW, name="sum"), buffer=2)


def refused(*nodes: Tensor, reason: str, **options: Any) -> GraphError:
    with pytest.raises(GraphError, match=reason) as caught:
        check(Graph(nodes), SIZES, **options)
    return caught.value


@pytest.mark.parametrize("name", CASES)
def test_sound_graphs_pass_with_and_without_memory(name: str) -> None:
    feed = Feed()
    steps = graph(CASES[name](feed))
    sizes = {key: len(data) for key, data in feed.memory.items()}
    check(steps, sizes)
    placed = place(steps, 32, buffer=99)
    check(placed.graph, {**sizes, 99: placed.size}, managed=False)


def test_nothing_is_a_graph() -> None:
    check(Graph(()), {})


LEAVES: dict[str, tuple[dict[str, Any], str]] = {
    "in no buffer": ({"buffer": 0}, "lives in no buffer"),
    "in a buffer that is not there": ({"buffer": 7}, "buffer 7 does not exist"),
    "fewer than none": ({"ne": (-1, 4, 1, 1)}, r"shape \[-1, 4, 1, 1\]"),
    "negative": ({"ne": (6, -4, 1, 1)}, "shape"),
    "before its buffer": ({"offset": -4}, "bytes -4 to 92 of a buffer of 1024"),
    "past its buffer": ({"offset": 1000}, "bytes 1000 to 1096"),
    "past 2^64": ({"offset": 2**64 - 4}, "of a buffer"),
    "between elements": ({"offset": 2}, "at offset 2"),
    "product over 2^64": ({"ne": (2**31, 2**31, 2**31, 1)}, "of a buffer of"),
    "stride 0": ({"nb": (4, 0, 96, 96)}, "strides"),
    "stride below an element": ({"nb": (2, 24, 96, 96)}, "strides"),
    "stride between elements": ({"nb": (4, 26, 104, 104)}, "strides"),
    "huge stride": ({"nb": (4, 2**31, 96, 96)}, "of a buffer of"),
    "much out of little": ({"ne": (16, 16, 16, 1), "nb": (4, 4, 4, 4)}, "elements in a buffer of 1024"),
    "blocks cut": ({"type": TYPES["Q8_0"]}, "blocks of 32"),
    "blocks apart": ({"type": TYPES["Q8_0"], "ne": (32, 2, 1, 1), "nb": (4, 34, 68, 68)}, "blocks of 34 bytes"),
    "rows between blocks": ({"type": TYPES["Q8_0"], "ne": (32, 2, 1, 1), "nb": (34, 50, 68, 68)}, "strides"),
}


@pytest.mark.parametrize("case", LEAVES)
def test_leaves_lie_in_their_buffer(case: str) -> None:
    changes, reason = LEAVES[case]
    bad = replace(X, **changes)
    error = refused(node("SUM", X), replace(node("SUM", X), src=(bad,)), reason=reason)
    assert error.node.startswith("leaf NONE:")
    assert "'x'" in error.node


def test_the_stride_of_a_dimension_of_one_element_does_not_matter() -> None:
    odd = replace(X, ne=(6, 1, 4, 1), nb=(4, 3, 24, 2**32 - 1))
    check(Graph((node("SUM", odd),)), SIZES)


def test_overlapping_strides_may_be_read_but_not_written() -> None:
    sliding = replace(X, ne=(6, 4, 1, 1), nb=(4, 4, 16, 16))
    check(Graph((node("SQR", sliding),)), SIZES)
    written = replace(inplace("SQR", sliding), nb=sliding.nb)
    refused(written, reason="overlap")


NODES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "past its buffer": (lambda: replace(SUM, offset=168), "bytes 168 to 264 of a buffer of 256"),
    "buffer that is not there": (lambda: replace(SUM, buffer=3), "buffer 3 does not exist"),
    "declared shape": (lambda: replace(SUM, ne=(6, 2, 2, 1)), "declared shape"),
    "declared type": (lambda: replace(mul_mat(X, X), type=F16, nb=(2, 8, 32, 32)), "declared as F16"),
    "broadcast": (lambda: replace(SUM, src=(ROW, X)), "can't broadcast"),
    "source missing": (lambda: replace(SUM, src=(X,)), "number of sources"),
    "too many sources": (lambda: replace(SUM, src=(X, ROW, ROW)), "number of sources"),
    "parameters": (lambda: replace(SUM, params=p.Scale(1.0)), "another operation"),
    "NaN": (lambda: node_like("SCALE", X, p.Scale(float("nan"))), "nan"),
    "leaf among nodes": (lambda: leaf(F32, 4), "lives in no buffer"),
    "holes": (lambda: replace(SUM, buffer=0, nb=(4, 32, 128, 128)), "leave holes"),
    "view past its source": (lambda: replace(view(X, 6, 2), view_offset=56, offset=56), "which has 96"),
    "view before its source": (lambda: replace(view(X, 6, 2), view_offset=-4), "which has 96"),
    "view elsewhere": (lambda: replace(view(X, 6, 2), offset=24), "is not where its source"),
    "view in another buffer": (lambda: replace(view(X, 6, 2), buffer=2), "is not where its source"),
    "view with another parameter": (lambda: replace(view(X, 6, 2), params=p.View(4)), "is not where its source"),
    "view of two things": (lambda: replace(view(X, 6), src=(ROW,)), "is not where its source"),
    "view of nothing": (lambda: replace(view(X, 6), view_src=None), "no source of its bytes"),
    "view of a view": (lambda: replace(view(X, 6), view_src=view(X, 6, 2)), "a name for other bytes"),
    "other type of the same bytes": (lambda: replace(leaf(I32, 6), view_src=ROW, buffer=1, offset=512), "I32 over"),
    "reshape with strides": (lambda: replace(reshape(X, 4, 6), nb=(4, 12, 72, 72)), "strides"),
    "permute with other strides": (lambda: replace(permute(X, 1, 0, 2, 3), nb=(4, 16, 96, 96)), "strides"),
    "transpose with other strides": (lambda: replace(transpose(X), nb=(4, 16, 96, 96)), "strides"),
    "copy beside its destination": (lambda: replace(cpy(X, SUM), view_src=None, offset=96), "its destination"),
    "copy with other strides": (
        lambda: replace(cpy(X, view(leaf(F32, 10, 4, buffer=1), 6, 4)), nb=(4, 24, 96, 96)),
        "its destination",
    ),
    "rows set elsewhere": (
        lambda: node("SET_ROWS", leaf(F32, 6, 2, buffer=1), leaf(I64, 2, buffer=1), X),
        "its destination",
    ),
    "set in place elsewhere": (lambda: node("SET", X, ROW, params=p.SetView(24, 96, 96, 0, 1)), "its destination"),
    "moments with holes": (
        lambda: replace(
            inplace("OPT_STEP_ADAMW", X, X, X, X, leaf(F32, 7, buffer=1)),
            src=(X, X, replace(X, nb=(4, 28, 112, 112)), X, leaf(F32, 7, buffer=1)),
        ),
        "not contiguous",
    ),
    "rows of other shapes": (
        lambda: replace(node("GET_ROWS", X, leaf(I32, 2, buffer=1)), src=(X, leaf(I32, 2, 2, buffer=1))),
        "don't fit",
    ),
}


def node_like(op: str, source: Tensor, params: Any) -> Tensor:
    return replace(node("SQR", source), op=op, params=params)


@pytest.mark.parametrize("case", NODES)
def test_what_a_node_may_not_be(case: str) -> None:
    make, reason = NODES[case]
    bad = make()
    error = refused(SUM, bad, reason=reason)
    assert error.node.startswith(f"node 1 ({bad.op}")


def test_nodes_read_what_is_there_before_them() -> None:
    first = node("SQR", X, name="first")
    second = node("SQR", first, name="second")
    check(Graph((first, second)), SIZES)
    assert refused(second, first, reason="computed later").node == "node 0 (SQR 'second')"
    assert refused(first, first, reason="is node 0 already").node == "node 1 (SQR 'first')"
    refused(first, view(second, 2), second, reason="computed later")


def test_a_chain_may_be_long() -> None:
    chain = [node("SQR", X)]
    for _ in range(20_000):
        chain.append(inplace("SQR", chain[-1]))
    check(Graph(tuple(chain)), SIZES)


def test_devices_that_are_told_where_need_to_be_told() -> None:
    check(Graph((SUM,)), SIZES, managed=False)
    refused(node("SQR", X), reason="lives in no buffer", managed=False)


def test_values_without_memory_have_a_limit() -> None:
    refused(node("UPSCALE", X, params=p.Upscale(0), ne=(10**6, 10**6)), reason="are allowed")
    refused(node("PAD", X, params=p.Pad(0, 2**31 - 1, 0, 2**31 - 1, 0, 0, 0, 0)), reason="are allowed")
    refused(node("REPEAT", X, ne=(6 * 10**9, 4 * 10**9)), reason="are allowed")
    wide = p.Im2Col(1, 1, 2**20, 2**20, 1, 1, 1)
    refused(
        node("IM2COL", leaf(F32, 1, 1, 4, 1, buffer=1), leaf(F32, 1, 1, 4, buffer=1), params=wide), reason="allowed"
    )
    chain = [node("SQR", X)]
    for _ in range(9):
        chain.append(node("SQR", chain[-1]))
    check(Graph(tuple(chain)), SIZES, max_bytes=2 * 96)  # each goes when the next is there
    refused(*chain, reason="need 192 bytes up to here; 191", max_bytes=191)
    check(Graph((*chain, node("ADD", chain[0], chain[-1]))), SIZES, max_bytes=3 * 96)
    refused(*chain, node("ADD", chain[0], chain[-1]), reason="need 288", max_bytes=2 * 96)


def test_all_that_is_unsupported_is_named_at_once() -> None:
    custom = [node_like("CUSTOM", X, p.NO_PARAMS) for _ in range(5)]
    flash = replace(node("SQR", X, name="act"), op="UNARY", params=p.Unary("SWISH"))
    with pytest.raises(UnsupportedOperation) as caught:
        check(Graph((*custom, SUM, flash)), SIZES)
    assert str(caught.value) == (
        "CUSTOM: operation not supported (node 0 (CUSTOM), node 1 (CUSTOM), node 2 (CUSTOM) and 2 more); "
        "UNARY: unary operation SWISH (node 6 (UNARY 'act'))"
    )


def test_what_is_unsupported_hides_nothing_that_is_wrong() -> None:
    custom = node_like("CUSTOM", X, p.NO_PARAMS)
    error = refused(custom, replace(SUM, offset=1000), reason="bytes 1000")
    assert not isinstance(error, UnsupportedOperation)


def test_a_target_may_allow_less() -> None:
    with pytest.raises(UnsupportedOperation, match="MUL_MAT"):
        check(Graph((mul_mat(X, X),)), SIZES, ops=frozenset({"ADD"}))


def test_names_are_quoted() -> None:
    assert "\\x1b[2J" in refused(replace(SUM, offset=999, name="\x1b[2J"), reason="bytes 999").node


def calls(action: Callable[[], object]) -> int:
    """How many functions it calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def chain(length: int) -> Graph:
    """Five nodes for each link."""
    weight, x = leaf(F16, 64, 64, buffer=1), leaf(F32, 64, 8, buffer=2)
    nodes: list[Tensor] = []
    for _ in range(length):
        product = mul_mat(weight, x)
        nodes += [product, view(product, 32, 8), permute(product, 1, 0, 2, 3)]
        x = inplace("ADD", product, product)
        nodes += [reshape(product, 8, 64), x]
    return Graph(tuple(nodes))


def test_many_nodes_take_no_time() -> None:
    """Ten times as many take ten times as long: 0.03 s for 2,500."""
    few, many = (calls(partial(check, chain(length), {1: 10**6, 2: 10**6})) for length in (50, 500))
    assert many <= 10 * few
