"""Random weights, and the number formats that files store them in.

A format is named as in the files: F32, F16, BF16, F8_E4M3, F8_E5M2, or one of ggml's types in blocks (Q8_0, Q4_K …).
"""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray
from torch import Tensor

from sdrpc.checkpoints.numbers import in_rows

from . import formats
from .names import Shape

PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTEGERS = {"I64": torch.int64, "I8": torch.int8, "U8": torch.uint8}


def random_weight(name: str, shape: Shape, seed: int) -> Tensor:
    """Float32 numbers that depend on nothing but the arguments, and keep what flows through a model near one.

    Matrices and kernels are normal with a variance of one over their inputs; the weights of norms lie around one,
    biases around zero, and so do SD 3's positions, of variance one. T5 does not scale its scores by the root of a
    head's width (64), so its queries are small.
    """
    number = int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(shape, generator=generator)
    if name.endswith("pos_embed"):
        return values
    if name.endswith(("mel_basis", "filter")):  # shares of frequencies, and of what is near
        return values.abs_().div_(values.sum(-1, keepdim=True))
    if name.endswith(("act.alpha", "act.beta")):  # logarithms
        return values.mul_(0.2)
    if len(shape) > 1:
        values *= values[0].numel() ** -0.5
        if name.startswith("vocoder.") and name.endswith("conv_out.weight"):  # blocks that add up to more than one
            values *= 1 / 16
        return values.mul_(1 / 8) if name.endswith("SelfAttention.q.weight") else values
    return values.mul_(0.2).add_(0.0 if name.endswith("bias") else 1.0)


MIXED = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "F16", "BF16",
)  # fmt: skip
"""What quantized files of diffusion models consist of, by what is left of a tensor's importance."""


class Stored(NamedTuple):
    """A tensor as a file holds it: format, shape of numbers, and bytes (uint8, any shape)."""

    type: str
    shape: Shape
    data: NDArray[np.uint8]


def stored_type(type: str, shape: Shape, name: str = "") -> str:
    """The format that a tensor of ``shape`` has in a file of ``type``.

    F8 and blocks are for matrices and kernels (formats of several tensors for some matrices,
    :func:`.formats.fits`): beside F8, vectors are BF16; beside blocks they are F32, and matrices
    whose rows are no whole number of blocks F16, as converters do it.
    """
    if type in ("F32", "F16", "BF16"):
        return type
    if type in formats.FORMATS:
        return "F16" if len(shape) > 1 else "F32"
    if type in PLAIN:
        return type if len(shape) > 1 else "BF16"
    if len(shape) < 2:
        return "F32"
    if type == "mixed":
        fitting = [kind for kind in MIXED if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0]
        return fitting[int.from_bytes(sha256(name.encode()).digest()[:4], "little") % len(fitting)]
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    return type if shape[-1] % block == 0 else "F16"


def encoded(values: Tensor, type: str, name: str) -> Stored:
    """``values`` in the format ``type``. K-quants, which the gguf library can't write, get random blocks of the same
    spread instead, which depend on ``name``; :func:`decoded` says in every case which numbers the file holds."""
    shape = tuple(values.shape)
    if type in PLAIN or type in INTEGERS:
        dtype = {**PLAIN, **INTEGERS}[type]
        data = values.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
    elif type in _RANDOM:
        data = _random_blocks(shape, type, float(values.std()), name)
    else:
        kind = GGMLQuantizationType[type]
        data = quants.quantize(in_rows(values.contiguous().numpy(), GGML_QUANT_SIZES[kind][0]), kind)
    return Stored(type, shape, data)


def as_stored(tensor: Tensor) -> Stored:
    """A tensor of one of torch's dtypes that files have."""
    kind = next(name for name, dtype in {**PLAIN, **INTEGERS}.items() if dtype == tensor.dtype)
    return Stored(kind, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def decoded(stored: Stored) -> Tensor:
    """The numbers that a file holds, as float32 (integers as they are)."""
    data = np.ascontiguousarray(stored.data)
    if stored.type in INTEGERS:
        return torch.from_numpy(data).reshape(-1).view(INTEGERS[stored.type]).reshape(stored.shape)
    if stored.type in PLAIN:
        return torch.from_numpy(data).reshape(-1).view(PLAIN[stored.type]).reshape(stored.shape).float()
    kind = GGMLQuantizationType[stored.type]
    rows = quants.dequantize(in_rows(data, GGML_QUANT_SIZES[kind][1]), kind)
    return torch.from_numpy(rows.astype(np.float32, copy=False)).reshape(stored.shape)


def stored_size(type: str, shape: Shape) -> int:
    """Bytes of a tensor in a file."""
    count = int(np.prod(shape, dtype=np.int64))
    if type in PLAIN or type in INTEGERS:
        return count * {**PLAIN, **INTEGERS}[type].itemsize
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    return count // block * size


class _Fields(NamedTuple):
    """Where a block has its F16 factor, where the one of its minimum (if any), and the mean of its small numbers."""

    factor: int
    minimum: int | None = None
    mean: float = 0.0


_RANDOM = {
    "Q2_K": _Fields(80, 82, 1.5),
    "Q3_K": _Fields(108),
    "Q4_K": _Fields(0, 2, 7.5),
    "Q5_K": _Fields(0, 2, 15.5),
    "Q6_K": _Fields(208),
    "IQ4_NL": _Fields(0),
    "IQ4_XS": _Fields(0),
}


def _random_blocks(shape: Shape, type: str, spread: float, name: str) -> NDArray[np.uint8]:
    """Blocks of random bytes, shape (…, bytes of a row), whose numbers have about the standard deviation ``spread``."""
    fields = _RANDOM[type]
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    random = np.random.default_rng(list(sha256(name.encode()).digest()))
    blocks = random.integers(0, 256, (int(np.prod(shape)) // block, size), np.uint8)
    _fill(blocks, fields, 1.0)
    sample = quants.dequantize(in_rows(blocks[:4096], size), GGMLQuantizationType[type])
    _fill(blocks, fields, spread / float(sample.std()))
    return blocks.reshape(*shape[:-1], -1)


def _fill(blocks: NDArray[np.uint8], fields: _Fields, factor: float) -> None:
    """Set the factors of all blocks; that of the minimum brings the mean to about zero."""

    def half(value: float) -> NDArray[np.uint8]:
        return np.frombuffer(np.array(value, "<f2").tobytes(), np.uint8)

    blocks[:, fields.factor : fields.factor + 2] = half(factor)
    if fields.minimum is not None:
        blocks[:, fields.minimum : fields.minimum + 2] = half(factor * fields.mean)
