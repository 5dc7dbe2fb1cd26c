"""Rotations, softmax and attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from tests.interop.cases.base import ODD, Builder, Case, shape


def _soft_max() -> Iterator[Case]:
    for ne in ((16, 2, 3, 2), (77, 77, 2, 1), (1, 5, 1, 1), (1025, 3, 1, 1)):
        yield Case("SOFT_MAX", shape(*ne), lambda b, n=ne: b.soft_max(b.x(*n, low=-9, high=9)))
    for kind, scale, bias in itertools.product(("F32", "F16"), (1.0, 0.125), (0.0, 8.0)):
        yield Case("SOFT_MAX", f"mask{kind}-scale{scale}-bias{bias}", lambda b, t=kind, s=scale, m=bias: b.soft_max_ext(
            b.x(24, 6, 12, 2, low=-4, high=4), b.mask(24, 6, type=t), s, m))  # fmt: skip
    yield Case("SOFT_MAX", "mask-heads", lambda b: b.soft_max_ext(b.x(16, 4, 4, 2), b.mask(16, 4, 2, 1), 1.0, 0.0))
    yield Case("SOFT_MAX", "mask-batch", lambda b: b.soft_max_ext(b.x(16, 4, 4, 2), b.mask(16, 4, 1, 2), 0.5, 0.0))
    yield Case("SOFT_MAX", "mask-rows", lambda b: b.soft_max_ext(b.x(16, 4, 3), b.mask(16, 8, type="F16"), 1.0, 0.0))
    yield Case("SOFT_MAX", "scale", lambda b: b.soft_max_ext(b.x(*ODD, low=-9, high=9), None, 0.3, 0.0))
    yield Case("SOFT_MAX", "inplace", lambda b: b.soft_max_inplace(b.x(*ODD, low=-9, high=9)))
    yield Case("SOFT_MAX", "mask-inplace", lambda b: b.soft_max_ext_inplace(b.x(16, 4, 3), b.mask(16, 4), 2.0, 0.0))


def _rope() -> Iterator[Case]:
    def rope(b: Builder, x: Any, dims: int, mode: int, call: str = "rope_ext", factors: Any = None, base: float = 1e4,
             scale: float = 1.0, attention: float = 1.0) -> Any:  # fmt: skip
        positions = b.indices(512, x.contents.ne[2])
        return getattr(b, call)(x, positions, factors, dims, mode, 512, base, scale, 0.0, attention, 32.0, 1.0)

    for mode, label in ((0, "normal"), (2, "neox")):
        yield Case("ROPE", f"{label}-all", lambda b, m=mode: rope(b, b.x(64, 4, 10, 2), 64, m))
        yield Case("ROPE", f"{label}-part", lambda b, m=mode: rope(b, b.x(80, 4, 7), 32, m))
        yield Case("ROPE", f"{label}-scaled", lambda b, m=mode: rope(b, b.x(64, 4, 7), 64, m, base=5e5, scale=0.25))
        yield Case("ROPE", f"{label}-attention", lambda b, m=mode: rope(b, b.x(64, 4, 7), 64, m, attention=1.25))
        yield Case("ROPE", f"{label}-factors", lambda b, m=mode: rope(
            b, b.x(64, 4, 7), 64, m, factors=b.x(32, low=0.9, high=2)))  # fmt: skip
        yield Case("ROPE", f"{label}-F16", lambda b, m=mode: rope(b, b.x(64, 4, 7, type="F16"), 64, m), "f16")
        yield Case("ROPE", f"{label}-view", lambda b, m=mode: rope(b, b.part(64, 4, 7, 2), 64, m))
        yield Case("ROPE", f"{label}-inplace", lambda b, m=mode: rope(b, b.x(64, 4, 7), 64, m, "rope_ext_inplace"))


def _attention() -> Iterator[Case]:
    def flash(
        b: Builder,
        head: int = 64,
        to: int = 0,
        heads: int = 4,
        kv_heads: int = 0,
        queries: int = 5,
        keys: int = 77,
        batch: int = 1,
        type: str = "F16",
        masked: bool = False,
        bias: float = 0.0,
        softcap: float = 0.0,
        permuted: bool = False,
        precise: bool = True,
    ) -> Any:
        to, kv_heads = to or head, kv_heads or heads
        make = (lambda *ne, **o: b.shuffled(*ne, axes=(0, 2, 1, 3), **o)) if permuted else b.x
        q = make(head, queries, heads, batch)
        k, v = make(head, keys, kv_heads, batch, type=type), make(to, keys, kv_heads, batch, type=type)
        mask = b.mask(keys, -(-queries // 32) * 32, type="F16") if masked else None
        result = b.flash_attn_ext(q, k, v, mask, head**-0.5, bias, softcap)
        return b.prec_f32(result) if precise else result

    for kind, bound in (
        ("F32", "f16"),
        ("F16", "f16 sums"),
        ("BF16", "bf16"),
        ("Q8_0", "quantized"),
        ("Q4_0", "quantized"),
    ):
        yield Case("FLASH_ATTN_EXT", kind, lambda b, t=kind: flash(b, type=t), bound)
        yield Case("FLASH_ATTN_EXT", f"{kind}-mask", lambda b, t=kind: flash(b, type=t, masked=True, keys=64), bound)
    for head in (32, 40, 80, 128, 160, 256):
        yield Case("FLASH_ATTN_EXT", f"head{head}", lambda b, h=head: flash(b, head=h, heads=2), "f16 sums")
    yield Case("FLASH_ATTN_EXT", "grouped", lambda b: flash(b, heads=8, kv_heads=2, queries=3), "f16 sums")
    yield Case("FLASH_ATTN_EXT", "alibi", lambda b: flash(b, heads=12, masked=True, bias=8.0, keys=32), "f16 sums")
    yield Case("FLASH_ATTN_EXT", "softcap", lambda b: flash(b, softcap=10.0), "f16 sums")
    yield Case("FLASH_ATTN_EXT", "batch", lambda b: flash(b, batch=3), "f16 sums")
    yield Case("FLASH_ATTN_EXT", "permuted", lambda b: flash(b, permuted=True, batch=2), "f16 sums")
    yield Case("FLASH_ATTN_EXT", "permuted-F32", lambda b: flash(b, permuted=True, type="F32"), "f16")
    yield Case("FLASH_ATTN_EXT", "values-wider", lambda b: flash(b, head=64, to=128), "f16 sums")
    yield Case("FLASH_ATTN_EXT", "one-query", lambda b: flash(b, queries=1, keys=512), "f16 sums")
    yield Case("FLASH_ATTN_EXT", "default-precision", lambda b: flash(b, precise=False), "f16 sums")


CASES = [*_soft_max(), *_rope(), *_attention()]
