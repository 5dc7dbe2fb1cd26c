"""torch.autocast around a call of a module, and within one: which operations have their operands cast, and to what.

torch casts for the kind of device that a tensor is on. Tensors without numbers are on none, so that what torch does is
done here again while a module is captured: by torch's own lists, of which :data:`LISTS` has what can be lowered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

Tensor = torch.Tensor


class Lists(NamedTuple):
    """Operations whose operands become narrow, and those that have float32."""

    narrow: frozenset[str]
    wide: frozenset[str]


_PRODUCTS = frozenset({
    "addbmm", "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "convolution", "linear", "linalg_vecdot", "matmul", "mm", "prelu", "_prelu_kernel",
    "scaled_dot_product_attention",
})  # fmt: skip

LISTS = {
    "cpu": Lists(_PRODUCTS, frozenset({
        "_fft_c2c", "_fft_c2r", "_fft_r2c", "polar", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
        "replication_pad2d", "replication_pad3d", "view_as_complex",
    })),
    "cuda": Lists(_PRODUCTS | {"addmv", "mv"}, frozenset({
        "_softmax", "_log_softmax", "cumsum", "exp", "expm1", "group_norm", "layer_norm", "linalg_vector_norm", "log",
        "log1p", "log2", "log10", "logsumexp", "native_group_norm", "native_layer_norm", "norm", "pow", "prod",
        "reciprocal", "rms_norm", "rsqrt", "softplus", "sum", "tan", "upsample_bicubic2d", "upsample_bilinear2d",
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    })),
}  # fmt: skip
"""Kind of device → what is cast there."""


def dtype(kind: str) -> torch.dtype | None:
    """What autocast, where it is on for a kind of device, makes of operands of products."""
    known = torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if known and torch.is_autocast_enabled(kind) else None


def cast(
    kind: str, narrow: torch.dtype | None, name: str, operands: Any, to: Callable[[Tensor, torch.dtype], Tensor]
) -> Any:
    """The operands of an operation as autocast gives them to it, where it is on for ``narrow``; ``to`` makes them of
    another dtype."""
    if narrow is None or kind not in LISTS:
        return operands
    lists = LISTS[kind]
    wanted = narrow if name in lists.narrow else torch.float32 if name in lists.wide else None
    if wanted is None:
        return operands

    def as_wanted(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (wanted, torch.float64):
            return value
        return to(value, wanted)

    return tree_map(as_wanted, operands)


def contexts(kind: str) -> tuple[type, Callable[[], Any]]:
    """torch.autocast for modules that ask for the kind of device of a tensor, which has none while it is captured; and
    what transformers enters there in its place, where it only switches autocast off."""

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(kind if device_type == "meta" else device_type, *args, **kwargs)

    def off() -> Any:
        return contextlib.nullcontext() if dtype(kind) is None else torch.autocast(kind, enabled=False)

    return Autocast, off
