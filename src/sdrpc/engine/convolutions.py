"""The convolutions that GPUs compute. cuDNN tries its algorithms for one when it first runs, which for a model takes
seconds; a server that starts has it do that for those that were computed before, while it imports what else it needs.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from math import prod
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MOST = 256
"""Convolutions that are remembered: a model has some fifty for each size of picture."""
MOST_ELEMENTS = 1 << 28
"""Of an image or a kernel that is tried."""
DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}

Pair = tuple[int, int]


class Convolution(NamedTuple):
    """What decides which algorithm is the fastest, beside the device. ``together``: whether a pixel's channels lie
    together in the kernel, and so in the image."""

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: Pair
    padding: Pair
    dilation: Pair
    dtype: str
    together: bool


_noted: OrderedDict[Convolution, None] = OrderedDict()
_lock = Lock()


def conv_2d(image: Tensor, kernel: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """torch's convolution, which is remembered where a GPU has computed it."""
    result = F.conv2d(image, kernel, bias, stride, padding, dilation)
    if image.is_cuda:
        together = kernel.is_contiguous(memory_format=torch.channels_last)
        shapes = tuple(image.shape), tuple(kernel.shape)
        _note(Convolution(*shapes, stride, padding, dilation, str(kernel.dtype), together))
    return result


def _note(convolution: Convolution) -> None:
    with _lock:
        _noted[convolution] = None
        _noted.move_to_end(convolution)
        if len(_noted) > MOST:
            _noted.popitem(last=False)


def noted() -> list[Convolution]:
    """Those that this process has computed, the last :data:`MOST`."""
    with _lock:
        return list(_noted)


def encode(convolutions: Iterable[Convolution]) -> bytes:
    """As a file, of the last :data:`MOST`."""
    return json.dumps(list(convolutions)[-MOST:]).encode()


def decode(data: bytes) -> list[Convolution]:
    """What :func:`encode` made. Raises :class:`ValueError` for anything else."""
    try:
        return [_read(*each) for each in json.loads(data)[:MOST]]
    except (TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"no convolutions: {error}") from error


def _read(
    image: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    dtype: str,
    together: bool,
) -> Convolution:
    counts = (image, 4, 1), (kernel, 4, 1), (stride, 2, 1), (padding, 2, 0), (dilation, 2, 1)
    for numbers, length, least in counts:
        whole = all(type(number) is int and least <= number <= MOST_ELEMENTS for number in numbers)
        if len(numbers) != length or not whole or prod(numbers) > MOST_ELEMENTS:
            raise ValueError(f"no sizes of a convolution: {numbers}")
    if dtype not in DTYPES or type(together) is not bool:
        raise ValueError(f"no convolution in {dtype}")
    stride_, padding_, dilation_ = ((numbers[0], numbers[1]) for numbers in (stride, padding, dilation))
    return Convolution(tuple(image), tuple(kernel), stride_, padding_, dilation_, dtype, together)


def try_out(convolution: Convolution, device: torch.device) -> None:
    """Compute it, of zeros. Raises what torch does."""
    image, kernel, stride, padding, dilation, dtype, together = convolution
    order = torch.channels_last if together else torch.contiguous_format
    x, k = (torch.zeros(shape, dtype=DTYPES[dtype], device=device).to(memory_format=order) for shape in (image, kernel))
    F.conv2d(x, k, None, stride, padding, dilation)
