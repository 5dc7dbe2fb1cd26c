"""What the rules let through, the engine computes: windows, paddings and sizes with any parameters."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sdrpc.engine import LocalDevice
from sdrpc.engine.dtypes import shape_of
from sdrpc.engine.operations import EngineOp
from sdrpc.engine.ops import KERNELS, images
from sdrpc.engine.values import Value
from sdrpc.errors import GraphError
from sdrpc.ggml.build import leaf, node
from sdrpc.ggml.ops import OPS
from sdrpc.ggml.params import Conv2D
from sdrpc.ggml.tensor import dims
from sdrpc.ggml.types import F32
from tests.engine.compare import Leaves, check

LARGEST = 20_000
"""Elements of a result that is worth computing here."""

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "IM2COL": ((3, 2, 3, 4), (6, 5, 3, 2)), "CONV_2D": ((3, 2, 3, 4), (6, 5, 3, 2)),
    "CONV_2D_DW": ((3, 2, 1, 3), (6, 5, 3, 2)), "CONV_TRANSPOSE_2D": ((3, 2, 4, 3), (6, 5, 3, 2)),
    "IM2COL_3D": ((3, 2, 2, 6), (6, 5, 4, 4)), "CONV_3D": ((3, 2, 2, 6), (6, 5, 4, 4)),
    "CONV_TRANSPOSE_1D": ((3, 2, 4), (6, 4)), "COL2IM_1D": ((12, 5),), "POOL_1D": ((7, 3, 2),), "POOL_2D": ((7, 6, 2),),
    "UPSCALE": ((5, 4, 2),), "WIN_PART": ((3, 5, 4),), "PAD": ((5, 4, 3, 2),), "PAD_REFLECT_1D": ((5, 3),),
    "ROLL": ((4, 4, 4, 4),), "TRI": ((4, 4, 2),),
}  # fmt: skip
USUAL: dict[str, tuple[int, ...]] = {
    "op": (0, 1), "is_2d": (1,), "channels": (2,), "batch": (2,), "outputs": (3,), "padding": (0,), "dilation": (1,),
    "mode": (0, 1, 2, 256, 257, 258, 513, 769), "across": (3, 2), "down": (2,), "size": (2, 3), "circular": (0, 1),
    "s": (1, 2, 3), "d": (1, 2), "k": (1, 2, 3), "p": (0, 1, 2), "l": (0, 1, 4), "r": (0, 2, 3),
}  # fmt: skip
"""What parameters are by their name, or by its first letter."""
STRANGE = (0, -1, 7, 100, 2**16, 2**29, 2**30, 2**31 - 1, -(2**31))


def parameters(op: str) -> st.SearchStrategy[Any]:
    names = OPS[op].params._fields
    return st.builds(OPS[op].params, *(st.sampled_from(USUAL.get(name) or USUAL[name[0]]) for name in names))


CALLS = st.sampled_from(sorted(SHAPES)).flatmap(lambda op: st.tuples(st.just(op), parameters(op)))
SIZES = st.tuples(st.integers(1, 11), st.integers(1, 9), st.integers(1, 4))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=CALLS, ne=SIZES)
def test_as_the_reference_has_it(exact: LocalDevice, call: tuple[str, Any], ne: tuple[int, ...]) -> None:
    op, params = call
    leaves = Leaves(1)
    src = [leaves.normal(*shape) for shape in SHAPES[op]]
    try:
        made = node(op, *src, params=params, ne=ne if op == "UPSCALE" else None)
    except GraphError:
        assume(False)
    check(exact, leaves, [made], runs=1)


CONVOLUTIONS = st.sampled_from(["IM2COL", "CONV_2D", "CONV_2D_DW", "CONV_3D"])


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=CONVOLUTIONS.flatmap(lambda op: st.tuples(st.just(op), parameters(op))))
def test_what_would_be_padded_much_is_picked(exact: LocalDevice, call: tuple[str, Any]) -> None:
    op, params = call
    leaves = Leaves(1)
    try:
        made = node(op, *(leaves.normal(*shape) for shape in SHAPES[op]), params=params)
    except GraphError:
        assume(False)
    with patch.object(images, "PADDED", 0):
        check(exact, leaves, [made], runs=1)


@settings(max_examples=400, deadline=None)
@given(call=CALLS, ne=SIZES, data=st.data())
def test_strange_parameters(call: tuple[str, Any], ne: tuple[int, ...], data: st.DataObject) -> None:
    """Whatever a peer says: refused, too large to be asked of anybody, or computed in the shape that was said."""
    op, params = call
    for name in data.draw(st.lists(st.sampled_from(params._fields), min_size=1, max_size=4)):
        params = params._replace(**{name: data.draw(st.sampled_from(STRANGE))})
    try:
        made = node(op, *(leaf(F32, *shape) for shape in SHAPES[op]), params=params, ne=ne if op == "UPSCALE" else None)
    except GraphError:
        return
    if not 0 < math.prod(made.ne) <= LARGEST:  # what has no elements is not computed
        return
    src = tuple(Value(EngineOp.LEAF, F32, dims(*shape)) for shape in SHAPES[op])
    result = KERNELS[op].function(
        Value(op, made.type, made.ne, src, params), *(torch.ones(shape_of(v.ne)) for v in src)
    )
    assert result.shape == shape_of(made.ne)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_nine_windows_the_one_in_the_middle_sees_the_image(dtype: torch.dtype) -> None:
    """With as much padding around it as can be said."""
    far = 2**31 - 1
    made = node("CONV_2D", leaf(F32, 3, 3, 2, 8), leaf(F32, 5, 5, 2), params=Conv2D(far, far, far, far, 1, 1))
    src = tuple(Value(EngineOp.LEAF, F32, operand.ne) for operand in made.src if operand is not None)
    rng = torch.Generator().manual_seed(1)
    kernel, x = (torch.randint(-2, 3, shape_of(value.ne), generator=rng).to(dtype) for value in src)
    value = Value("CONV_2D", F32, made.ne, src, made.params)
    wanted = torch.zeros(1, 8, 3, 3)
    wanted[:, :, 1, 1] = (kernel.float() * x[:, :, :3, :3].float()).sum((1, 2, 3))
    for form in (torch.contiguous_format, torch.channels_last):
        found = KERNELS["CONV_2D"].function(value, kernel.contiguous(memory_format=form), x)
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0)
