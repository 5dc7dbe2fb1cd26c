"""Whole graphs. Each also runs with memory that nodes share (ggml_gallocr)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.interop.cases.base import F16, F32, Build, Builder, Case
from tests.support import ggml

CASES: list[Case] = []


def graph(name: str, bound: str = "f32") -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        CASES.append(Case("graph", name, build, bound))
        return build

    return add


SILU, GELU, SIGMOID, RELU = (ggml.UNARY.index(op) for op in ("SILU", "GELU", "SIGMOID", "RELU"))


def bias(b: Builder, x: Any, channels: int) -> Any:
    return b.add_inplace(x, b.reshape_4d(b.x(channels), 1, 1, channels, 1))


def group_norm(b: Builder, x: Any, channels: int, groups: int = 4) -> Any:
    scaled = b.mul(b.group_norm(x, groups, 1e-6), b.reshape_4d(b.x(channels, low=0.5), 1, 1, channels, 1))
    return bias(b, scaled, channels)


def layer_norm(b: Builder, x: Any, width: int) -> Any:
    return b.add(b.mul(b.norm(x, 1e-5), b.x(width, low=0.5)), b.x(width))


def linear(b: Builder, x: Any, inner: int, outer: int, type: str = "F32") -> Any:
    return b.add_inplace(b.mul_mat(b.x(inner, outer, type=type, low=-0.2, high=0.2), x), b.x(outer))


def conv(b: Builder, x: Any, inner: int, outer: int, k: int = 3, s: int = 1, type: str = "F32") -> Any:
    kernel = b.x(k, k, inner, outer, type=type, low=-0.2, high=0.2)
    return bias(b, b.conv_2d(kernel, x, s, s, k // 2, k // 2, 1, 1), outer)


def heads(b: Builder, x: Any, n: int) -> Any:
    """[width, tokens, batch] → [width / n, tokens, n, batch], no byte moved."""
    width, tokens, batch = list(x.contents.ne)[:3]
    return b.permute(b.reshape_4d(x, width // n, n, tokens, batch), 0, 2, 1, 3)


def attention(b: Builder, x: Any, y: Any, n: int, flash: bool, type: str = "F32") -> Any:
    """Attention of ``x`` over ``y``, with K and V in f16 when ``flash``, else by two products and a softmax."""
    width, tokens, batch = list(x.contents.ne)[:3]
    inner, scale = y.contents.ne[0], (width // n) ** -0.5
    q = heads(b, linear(b, x, width, width, type), n)
    k = heads(b, linear(b, y, inner, width, type), n)
    v = heads(b, linear(b, y, inner, width, type), n)
    if flash:
        merged = b.prec_f32(b.flash_attn_ext(q, b.cast(k, F16), b.cast(v, F16), None, scale, 0.0, 0.0))
    else:
        weights = b.soft_max_inplace(b.scale_inplace(b.mul_mat(b.cont(k), b.cont(q)), scale))
        merged = b.cont(b.permute(b.mul_mat(b.cont(b.transpose(v)), weights), 0, 2, 1, 3))
    return linear(b, b.reshape_4d(merged, width, tokens, batch, 1), width, width, type)


@graph("conv-block", "f16")
def _(b: Builder) -> Any:
    x = conv(b, b.x(12, 10, 4, 2), 4, 8)
    return b.unary_inplace(group_norm(b, x, 8), SILU)


@graph("conv-f16", "f16")
def _(b: Builder) -> Any:
    return conv(b, b.unary(conv(b, b.x(12, 10, 4, 2), 4, 8, type="F16"), SILU), 8, 4, s=2, type="F16")


@graph("resnet-block", "f16")
def _(b: Builder) -> Any:
    x, embedding = b.x(8, 8, 8, 2), b.x(32, 2)
    h = conv(b, b.unary_inplace(group_norm(b, x, 8), SILU), 8, 16)
    shift = linear(b, b.unary(embedding, SILU), 32, 16)
    h = b.add(h, b.reshape_4d(shift, 1, 1, 16, 2))
    h = conv(b, b.unary_inplace(group_norm(b, h, 16), SILU), 16, 16)
    return b.add_inplace(h, conv(b, x, 8, 16, k=1))


@graph("attention")
def _(b: Builder) -> Any:
    x = b.x(32, 20, 2)
    return b.add_inplace(attention(b, layer_norm(b, x, 32), b.x(48, 7, 2), 4, flash=False), x)


@graph("attention-flash", "f16 sums")
def _(b: Builder) -> Any:
    x = b.x(64, 20, 2)
    return b.add(attention(b, layer_norm(b, x, 64), b.x(48, 7, 2), 4, flash=True), x)


@graph("attention-flash-in-tiles")
def _(b: Builder) -> Any:
    """More queries than ggml's CPU takes one by one: of a tile it rounds nothing."""
    keys, values = (b.x(32, 50, 2, type="F16") for _ in range(2))
    return b.flash_attn_ext(b.x(32, 70, 4), keys, values, b.mask(50, 96, type="F16"), 0.2, 0.0, 0.0)


@graph("attention-quantized", "quantized")
def _(b: Builder) -> Any:
    return attention(b, b.x(256, 9, 1), b.x(256, 9, 1), 4, flash=False, type="Q8_0")


@graph("transformer-block", "f16 sums")
def _(b: Builder) -> Any:
    x, context = b.x(32, 24, 2), b.x(48, 7, 2)
    x = b.add(attention(b, layer_norm(b, x, 32), layer_norm(b, x, 32), 2, flash=True), x)
    x = b.add(attention(b, layer_norm(b, x, 32), context, 2, flash=False), x)
    gated = linear(b, layer_norm(b, x, 32), 32, 128)
    row = gated.contents.nb
    value = b.view_4d(gated, 64, 24, 2, 1, row[1], row[2], row[3], 0)
    gate = b.cont(b.view_4d(gated, 64, 24, 2, 1, row[1], row[2], row[3], 64 * 4))
    return b.add(linear(b, b.mul(value, b.unary_inplace(gate, GELU)), 64, 32), x)


@graph("causal-text-encoder", "f16")
def _(b: Builder) -> Any:
    x = b.add(b.get_rows(b.x(32, 100), b.indices(100, 12)), b.x(32, 12))
    for _ in range(2):
        h = layer_norm(b, x, 32)
        q, k, v = (heads(b, linear(b, h, 32, 32), 2) for _ in range(3))
        scores = b.diag_mask_inf_inplace(b.scale(b.mul_mat(b.cont(k), b.cont(q)), 0.25), 0)
        h = b.mul_mat(b.cont(b.transpose(v)), b.soft_max_inplace(scores))
        h = b.reshape_4d(b.cont(b.permute(h, 0, 2, 1, 3)), 32, 12, 1, 1)
        x = b.add(x, linear(b, h, 32, 32))
        h = b.unary_inplace(linear(b, layer_norm(b, x, 32), 32, 64), ggml.UNARY.index("GELU_QUICK"))
        x = b.add(x, linear(b, h, 64, 32))
    return layer_norm(b, x, 32)


@graph("down-up-skip", "f16")
def _(b: Builder) -> Any:
    skip = conv(b, b.x(8, 8, 4, 1), 4, 8)
    down = b.unary(conv(b, skip, 8, 8, s=2), SILU)
    up = conv(b, b.interpolate(down, 8, 8, 8, 1, 0), 8, 8)
    return conv(b, b.concat(up, skip, 2), 16, 4)


@graph("timestep-mlp")
def _(b: Builder) -> Any:
    h = linear(b, b.timestep_embedding(b.x(3, low=0, high=999), 32, 10000), 32, 64)
    return linear(b, b.unary_inplace(h, SILU), 64, 64)


@graph("in-place-chain")
def _(b: Builder) -> Any:
    x = b.scale(b.x(16, 9), 2.0)
    for step in range(12):
        x = (b.add_inplace, b.mul_inplace)[step % 2](x, b.x(16))
        x = b.unary_inplace(x, (SIGMOID, RELU, SILU)[step % 3])
    return x


@graph("old-value-read-through-another-name")
def _(b: Builder) -> Any:
    x = b.scale(b.x(16, 8), 3.0)
    before = b.cont(b.view_4d(x, 8, 8, 1, 1, 64, 512, 512, 0))
    after = b.add_inplace(x, b.x(16))
    return b.add(b.view_4d(after, 8, 8, 1, 1, 64, 512, 512, 32), before), b.cont(b.transpose(x))


@graph("in-place-on-a-view")
def _(b: Builder) -> Any:
    x = b.scale(b.x(16, 8), 3.0)
    half = b.view_4d(x, 8, 8, 1, 1, 64, 512, 512, 32)
    changed = b.unary_inplace(half, RELU)
    return b.add(changed, b.x(8)), b.scale(x, 0.5)


@graph("in-place-on-an-input")
def _(b: Builder) -> Any:
    x = b.x(16, 8)
    y = b.add_inplace(x, b.x(16, 8))
    z = b.mul_inplace(y, b.x(16))
    return z, x


@graph("kv-cache")
def _(b: Builder) -> Any:
    cache = b.x(32, 24, type="F32")
    for step in range(3):
        rows = linear(b, b.x(16, 4), 16, 32)
        written = b.cpy(rows, b.view_4d(cache, 32, 4, 1, 1, 128, 512, 512, 128 * (5 + 4 * step)))
        b.first.append(written)
    keys = b.view_4d(cache, 32, 20, 1, 1, 128, 2560, 2560, 0)
    return b.soft_max(b.mul_mat(keys, b.x(32, 3))), cache


@graph("kv-cache-f16", "f16 sums")
def _(b: Builder) -> Any:
    keys, values = b.x(32, 64, type="F16"), b.x(32, 64, type="F16")
    for cache in (keys, values):
        rows = linear(b, b.x(16, 4), 16, 32)
        b.first.append(b.cpy(rows, b.view_4d(cache, 32, 4, 1, 1, 64, 256, 256, 64 * 9)))
    k, v = (b.view_4d(cache, 32, 32, 1, 1, 64, 2048, 2048, 0) for cache in (keys, values))
    return b.prec_f32(b.flash_attn_ext(b.x(32, 3), k, v, b.mask(32, 32, type="F16"), 0.2, 0.0, 0.0)), keys, values


@graph("kv-cache-set-rows", "f16")
def _(b: Builder) -> Any:
    cache = b.x(32, 24, type="F16")
    rows = linear(b, b.x(16, 4), 16, 32)
    written = b.set_rows(cache, rows, b.indices(24, 4, type="I64", unique=True))
    return b.mul_mat(written, b.x(32, 3)), cache


def quantized_cache(b: Builder, type: str) -> Any:
    """Keys and values go into rows of blocks that attention reads in the same graph."""
    keys, values = b.x(64, 64, 2, type=type), b.x(64, 64, 2, type=type)
    for cache in (keys, values):
        rows = b.reshape_4d(linear(b, b.x(16, 8), 16, 64), 64, 4, 2, 1)
        b.first.append(b.set_rows(cache, rows, b.indices(64, 4, type="I64", unique=True)))
    nb = list(keys.contents.nb)
    k, v = (b.view_4d(cache, 64, 32, 2, 1, *nb[1:], 0) for cache in (keys, values))
    return b.flash_attn_ext(b.x(64, 3, 4), k, v, b.mask(32, 32, type="F16"), 0.2, 0.0, 0.0), keys, values


for cached in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"):
    graph(f"kv-cache-{cached}", "quantized")(partial(quantized_cache, type=cached))


@graph("blocks-between-nodes", "exact")
def _(b: Builder) -> Any:
    """Values in blocks: copied, joined, written over and read again."""
    q8 = ggml.TYPES["Q8_0"]
    made = b.cast(b.scale(b.x(64, 6, 4), 2.0), q8)
    turned = b.cont(b.permute(made, 0, 2, 1, 3))
    joined = b.concat(turned, b.dup(turned), 0)
    before = b.cast(joined, F32)
    b.first += [before, b.set_rows(joined, b.scale(before, -0.5), b.indices(4, 4, 6, type="I32", unique=True))]
    nb = list(joined.contents.nb)
    b.first.append(b.cpy(b.x(32, 2, 6, type="Q8_0"), b.view_4d(joined, 32, 2, 6, 1, *nb[1:], nb[0] * 2)))
    picked = b.get_rows(joined, b.indices(4, 3, 6))
    return picked, b.cast(joined, F32), before, b.cast(b.add(made, b.x(64, 6, 4)), F32)


@graph("padded-mask")
def _(b: Builder) -> Any:
    padded = b.scale(b.x(16, 8), 0.0)
    b.first.append(b.cpy(b.x(10, 6), b.view_4d(padded, 10, 6, 1, 1, 64, 384, 384, 0)))
    return b.soft_max_ext(b.x(16, 8, 2), padded, 1.0, 0.0), padded


@graph("view-of-a-permuted-value")
def _(b: Builder) -> Any:
    x = b.permute(b.scale(b.x(8, 6, 4), 1.5), 1, 0, 2, 3)
    return b.cont(b.view_4d(x, 4, 6, 2, 1, x.contents.nb[1], x.contents.nb[2], x.contents.nb[3], x.contents.nb[0] * 2))


@graph("set-chain")
def _(b: Builder) -> Any:
    x = b.scale(b.x(12, 6), 1.0)
    x = b.set_inplace(x, b.scale(b.x(4, 2), 2.0), 48, 288, 288, 48)
    x = b.acc_inplace(x, b.x(6, 3), 48, 288, 288, 96)
    return b.norm(x, 1e-5)


@graph("many-results")
def _(b: Builder) -> Any:
    x = b.x(32, 6)
    first = b.norm(x, 1e-5)
    return first, b.unary(first, SILU), b.sum_rows(x), b.cont(b.transpose(first)), b.argmax(first)


@graph("unused-results")
def _(b: Builder) -> Any:
    x = b.scale(b.x(32, 6), 1.5)
    b.first += [b.unary(x, SILU), b.mul_mat(b.x(32, 5), x)]
    return b.add(x, b.x(32))


@graph("deep")
def _(b: Builder) -> Any:
    x = b.x(24, 10)
    for _ in range(40):
        x = b.norm(b.add(b.mul_mat(b.x(24, 24), b.unary(x, SILU)), x), 1e-5)
    return x


CUBE = (8, 8, 4, 1)
"""The shape that values of random graphs have."""


def planes(b: Builder, x: Any, first: int) -> Any:
    """Two of the four planes of ``x``."""
    nb = x.contents.nb
    return b.view_4d(x, 8, 8, 2, 1, nb[1], nb[2], nb[3], first * nb[2])


def columns(b: Builder, x: Any, first: int) -> Any:
    """Half of each row of ``x``."""
    nb = x.contents.nb
    return b.view_4d(x, 4, 8, 4, 1, nb[1], nb[2], nb[3], first * nb[0])


def row(b: Builder, x: Any) -> Any:
    """The fourth row of each plane of ``x``."""
    nb = x.contents.nb
    return b.view_4d(x, 8, 1, 4, 1, nb[1], nb[2], nb[3], 3 * nb[1])


def taps(b: Builder, x: Any) -> Any:
    """A convolution with nothing rounded to f16, as IM2COL, a product and a permutation."""
    kernel = b.x(3, 3, 4, 4)
    seen = b.im2col(kernel, x, 1, 1, 1, 1, 1, 1, True, F32)
    product = b.mul_mat(b.reshape_4d(seen, 36, 64, 1, 1), b.reshape_4d(kernel, 36, 4, 1, 1))
    return b.norm(b.reshape_4d(product, *CUBE), 0.1)


def attended(b: Builder, x: Any, y: Any) -> Any:
    weights = b.soft_max_inplace(b.scale_inplace(b.mul_mat(x, y), 0.3))
    return b.mul_mat(b.cont(b.transpose(x)), weights)


STEPS: tuple[Callable[[Builder, Any, Any], Any], ...] = (
    # values of their own
    lambda b, x, y: b.add(x, y),
    lambda b, x, y: b.sub(x, b.mean(y)),
    lambda b, x, y: b.norm(b.mul(x, y), 0.1),
    lambda b, x, y: b.norm(b.mul_mat(x, y), 0.1),
    lambda b, x, y: b.soft_max(b.add(x, y)),
    lambda b, x, y: b.unary(x, SILU),
    lambda b, x, y: b.group_norm(b.sub(x, y), 2, 0.1),
    lambda b, x, y: b.glu(b.concat(x, y, 0), ggml.GLU.index("REGLU"), False),
    lambda b, x, y: b.pool_2d(b.interpolate(b.add(x, y), 16, 16, 4, 1, 0), 1, 2, 2, 2, 2, 0, 0),
    lambda b, x, y: taps(b, x),
    lambda b, x, y: attended(b, x, y),
    # names and moves
    lambda b, x, y: b.cont(b.permute(x, 1, 0, 2, 3)),
    lambda b, x, y: b.cont_4d(b.permute(x, 1, 2, 0, 3), *CUBE),
    lambda b, x, y: b.add(y, b.permute(x, 1, 0, 2, 3)),
    lambda b, x, y: b.concat(planes(b, x, 1), planes(b, y, 0), 2),
    lambda b, x, y: b.concat(columns(b, x, 2), columns(b, y, 4), 0),
    lambda b, x, y: b.repeat(row(b, x), y),
    lambda b, x, y: b.reshape_4d(b.get_rows(b.reshape_4d(x, 8, 32, 1, 1), b.indices(32, 32)), *CUBE),
    lambda b, x, y: b.reshape_4d(x, 8, 4, 8, 1),
    # over bytes that have a name
    lambda b, x, y: b.scale_inplace(x, 0.75),
    lambda b, x, y: b.add_inplace(x, y),
    lambda b, x, y: b.mul_inplace(x, b.x(8)),
    lambda b, x, y: b.unary_inplace(x, SIGMOID),
    lambda b, x, y: b.norm_inplace(x, 0.1),
    lambda b, x, y: b.diag_mask_zero_inplace(x, 2),
    lambda b, x, y: b.unary_inplace(planes(b, x, 1), RELU),
    lambda b, x, y: b.unary_inplace(columns(b, x, 1), SILU),
    lambda b, x, y: b.add_inplace(planes(b, x, 0), planes(b, y, 2)),
    lambda b, x, y: b.cpy(planes(b, x, 0), planes(b, y, 2)),
    lambda b, x, y: b.cpy(b.scale(x, 0.5), y),
    lambda b, x, y: b.cpy(columns(b, x, 0), columns(b, y, 4)),
    lambda b, x, y: b.set_inplace(x, b.x(4, 3, 2), 32, 256, 1024, 256 + 32 + 8),
    lambda b, x, y: b.acc_inplace(x, b.x(8, 2, 4), 32, 256, 1024, 96),
    lambda b, x, y: b.set_rows(x, b.x(8, 3, 4), b.indices(8, 3, 4, type="I64", unique=True)),
)


def random_graph(b: Builder) -> Any:
    """Any operations on any values so far, in place or not, through any views. A name that was written over in place
    is read again: it stands for the bytes as they are by then."""
    pool = [b.scale(b.x(*CUBE), 1.0) for _ in range(2)] + [b.x(*CUBE)]
    for _ in range(40):
        x, y = (pool[b.rng.integers(len(pool))] for _ in range(2))
        made = STEPS[b.rng.integers(len(STEPS))](b, x, y)
        b.first.append(made)
        if tuple(made.contents.ne) == CUBE:
            pool.append(made)
    return tuple(pool[-3:])


MIXED_STEPS: tuple[Callable[[Builder, Any, Any], Any], ...] = (
    # between f32 (x) and f16 (h)
    lambda b, x, h: b.cast(x, F16),
    lambda b, x, h: b.cast(h, F32),
    lambda b, x, h: b.cpy(x, h),
    lambda b, x, h: b.cpy(h, x),
    lambda b, x, h: b.cpy(planes(b, x, 0), planes(b, h, 2)),
    lambda b, x, h: b.cpy(planes(b, h, 2), planes(b, x, 0)),
    lambda b, x, h: b.cpy(columns(b, h, 2), columns(b, x, 3)),
    lambda b, x, h: b.cpy(b.permute(x, 1, 0, 2, 3), h),
    lambda b, x, h: b.norm(b.mul_mat(h, x), 0.1),
    lambda b, x, h: b.norm(b.mul_mat(b.cont(b.transpose(h)), x), 0.1),
    lambda b, x, h: b.flash_attn_ext(x, h, h, None, 0.3, 0.0, 0.0),
    lambda b, x, h: b.reshape_4d(b.get_rows(b.reshape_4d(h, 8, 32, 1, 1), b.indices(32, 32)), *CUBE),
    lambda b, x, h: b.set_rows(h, b.x(8, 3, 4), b.indices(8, 3, 4, type="I64", unique=True)),
    lambda b, x, h: b.sub(h, x),
    # f16 alone
    lambda b, x, h: b.add_inplace(h, b.x(8, type="F16")),
    lambda b, x, h: b.unary_inplace(h, SIGMOID),
    lambda b, x, h: b.unary_inplace(planes(b, h, 1), RELU),
    lambda b, x, h: b.concat(planes(b, h, 1), planes(b, h, 0), 2),
    lambda b, x, h: b.cont(b.permute(h, 1, 0, 2, 3)),
    lambda b, x, h: b.repeat(row(b, h), h),
    # f32 alone
    lambda b, x, h: b.add_inplace(x, b.x(8)),
    lambda b, x, h: b.scale_inplace(x, 0.5),
    lambda b, x, h: b.soft_max(x),
)


def mixed_graph(b: Builder) -> Any:
    """As :func:`random_graph`, of values in f32 and f16 that go over into each other's memory."""
    wide, narrow = [b.scale(b.x(*CUBE), 1.0), b.x(*CUBE)], [b.cast(b.x(*CUBE), F16), b.x(*CUBE, type="F16")]
    for _ in range(40):
        x, h = wide[b.rng.integers(len(wide))], narrow[b.rng.integers(len(narrow))]
        made = MIXED_STEPS[b.rng.integers(len(MIXED_STEPS))](b, x, h)
        b.first.append(made)
        if tuple(made.contents.ne) == CUBE:
            (narrow if made.contents.type == F16 else wide).append(made)
    return (*wide[-2:], *narrow[-2:])


PLATE = (32, 8, 4, 1)
"""The shape that values in blocks have."""


def rows(b: Builder, x: Any, first: int) -> Any:
    """Half of the rows of each plane of ``x``."""
    nb = list(x.contents.nb)
    return b.view_4d(x, 32, 4, 4, 1, *nb[1:], first * nb[1])


def layers(b: Builder, x: Any, first: int) -> Any:
    """Two of the four planes of ``x``."""
    nb = list(x.contents.nb)
    return b.view_4d(x, 32, 8, 2, 1, *nb[1:], first * nb[2])


BLOCK_STEPS: tuple[Callable[[Builder, Any, Any], Any], ...] = (
    # between f32 (x) and blocks (q)
    lambda b, x, q: b.cast(x, q.contents.type),
    lambda b, x, q: b.cast(q, F32),
    lambda b, x, q: b.cpy(x, q),
    lambda b, x, q: b.cpy(q, x),
    lambda b, x, q: b.cpy(layers(b, x, 0), layers(b, q, 2)),
    lambda b, x, q: b.cpy(layers(b, q, 1), layers(b, x, 2)),
    lambda b, x, q: b.cast(b.permute(x, 0, 2, 1, 3), q.contents.type),
    lambda b, x, q: b.cpy(rows(b, q, 3), rows(b, x, 2)),
    lambda b, x, q: b.set_rows(q, b.x(32, 3, 4), b.indices(8, 3, 4, type="I64", unique=True)),
    lambda b, x, q: b.reshape_4d(b.get_rows(b.reshape_4d(q, 32, 32, 1, 1), b.indices(32, 32)), *PLATE),
    lambda b, x, q: b.add(q, x),
    lambda b, x, q: b.add_inplace(q, x),
    # blocks alone
    lambda b, x, q: b.dup(q),
    lambda b, x, q: b.cpy(rows(b, q, 0), rows(b, q, 4)),
    lambda b, x, q: b.concat(layers(b, q, 1), layers(b, q, 0), 2),
    lambda b, x, q: b.concat(rows(b, q, 4), rows(b, q, 0), 1),
    lambda b, x, q: b.cont(b.permute(b.reshape_4d(q, 32, 4, 8, 1), 0, 2, 1, 3)),
    # f32 alone
    lambda b, x, q: b.scale_inplace(x, 0.5),
    lambda b, x, q: b.add_inplace(x, b.x(32)),
)


def block_graph(b: Builder, type: str) -> Any:
    """As :func:`random_graph`, of values in f32 and in blocks."""
    wide = [b.scale(b.x(*PLATE), 1.0), b.x(*PLATE)]
    blocks = [b.cast(b.x(*PLATE), ggml.TYPES[type]), b.x(*PLATE, type=type)]
    for _ in range(40):
        x, q = wide[b.rng.integers(len(wide))], blocks[b.rng.integers(len(blocks))]
        made = BLOCK_STEPS[b.rng.integers(len(BLOCK_STEPS))](b, x, q)
        b.first.append(made)
        if tuple(made.contents.ne) == PLATE:
            (wide if made.contents.type == F32 else blocks).append(made)
    return (*wide[-2:], *blocks[-2:])


CASES += (Case("graph", f"random{seed}", random_graph) for seed in range(40))
CASES += (Case("graph", f"mixed{seed}", mixed_graph, "f16 sums") for seed in range(16))
CASES += (
    Case("graph", f"blocks-{kind}-{seed}", partial(block_graph, type=kind), "exact")
    for kind in ("Q8_0", "Q4_1", "IQ4_NL", "MXFP4")
    for seed in range(4)
)
