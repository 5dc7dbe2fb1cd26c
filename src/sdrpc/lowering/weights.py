"""A module's parameters and buffers as weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import UsageError
from ..ggml.types import BF16, F16, F32
from ..ggml.weight import Weight, Whole
from .capture import tensors_of

TYPES = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
"""Dtypes that weights keep; others are sent as F32."""


def weights_of(module: nn.Module) -> Iterator[Weight]:
    """A module's parameters and buffers as weights; floats narrower or wider than F32, F16 and BF16 become F32."""
    for name, tensor in tensors_of(module).items():
        data = Whole(functools.partial(_data, name, tensor))
        yield Weight(name, TYPES.get(tensor.dtype, F32), tuple(tensor.shape), data)


def _data(name: str, tensor: torch.Tensor) -> memoryview:
    if tensor.is_meta:
        raise UsageError(
            f"parameter {name} has no numbers: it is on the meta device, as after enable_sequential_cpu_offload(), "
            "which an offloaded module does not need"
        )
    kept = tensor.detach().resolve_neg()
    kept = kept if tensor.dtype in TYPES else kept.float()
    return kept.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
