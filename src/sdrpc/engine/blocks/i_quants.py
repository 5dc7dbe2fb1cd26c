"""I-quants: blocks whose codes are entries of a table. IQ4 has sixteen numbers; IQ1 to IQ3 have grids, of which an
entry gives four or eight elements at once, and signs.

The grids are the gguf library's: ``gguf.quants.IQ2_XXS.grid`` and so on. The docstring of each reader gives the bytes
of a block, in order; ``d`` is the block's scale. Seven signs stand for eight: the last makes the number of minus signs
even.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from .bits import (
    Blocks,
    as_bytes,
    as_half,
    constants,
    half,
    pack_planes,
    planes,
    reinterpret,
    shaped,
    table,
    unpack,
    words,
)
from .search import LEAST, best, in_order, inverse, nearest, peak

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_ZERO = 8
"""The position of what is nearest to zero."""
IQ4_BETWEEN = tuple((a + b) / 2 for a, b in pairwise(IQ4))
IQ1_SHIFT = 0.125
"""By how much IQ1's grid is moved up or down (IQ1S_DELTA)."""


@cache
def grid(name: str, device: torch.device) -> Tensor:
    """The grid of the type called ``name``: [entries, 4 or 8] of float32."""
    from gguf import quants  # not needed by most

    quant = getattr(quants, name)
    quant.init_grid()
    return torch.tensor(quant.grid, dtype=torch.float32, device=device).reshape(quant.grid_shape)


@cache
def signs(device: torch.device) -> Tensor:
    """[256, 8] of 1 and -1: what the bits of a byte mean as signs."""
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    return 1 - 2 * unpack(codes, 1).float()


def _even(codes: Tensor) -> Tensor:
    """Seven bits of signs → byte: the eighth makes the number of minus signs even."""
    parity = unpack(codes.to(torch.uint8), 1).sum(-1) & 1
    return codes | (parity << 7)


def _fields(x: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """[…] integers → […, len(shifts)]"""
    return x[..., None] >> constants(shifts, x.device).to(x.dtype) & mask


def _signed(name: str, scales: Tensor, index: Tensor, minus: Tensor) -> Tensor:
    """[n, groups] scales, [n, entries] of a grid and [n, bytes] of signs → [n, 256]."""
    device = index.device
    picked = grid(name, device)[index.long()].reshape(*scales.shape, -1)
    return (picked * scales[..., None] * signs(device)[minus.long()].reshape(picked.shape)).flatten(1)


def _dwords(x: Tensor) -> Tensor:
    """[…, 4 k] bytes → […, k] int32"""
    return reinterpret(x, torch.int32)


SIGNS_OF_WORD = (0, 7, 14, 21)
"""Where the four signs of seven bits lie in 32 bits, whose last four are the scale."""


def read_iq2_xxs(b: Blocks) -> Tensor:
    """d f16 | for each 32 elements: 4 bytes, entries of the grid, of 8 elements each | 32 bits: four times seven signs,
    and a scale of four bits: d (scale + 1/2) / 4 times the entry."""
    groups = shaped(b[:, 2:], 8, 8)
    word = _dwords(groups[..., 4:])[..., 0]
    scales = half(b[:, :2]) * (0.5 + (word >> 28 & 15)) * 0.25
    return _signed("IQ2_XXS", scales, groups[..., :4].flatten(1), _even(_fields(word, SIGNS_OF_WORD, 127)))


def read_iq3_xxs(b: Blocks) -> Tensor:
    """d f16 | 64 bytes, entries of the grid, of 4 elements each | for each 32 elements 32 bits of signs and scale, as
    in IQ2_XXS: d (scale + 1/2) / 2 times the entry."""
    word = _dwords(b[:, 66:])
    scales = half(b[:, :2]) * (0.5 + (word >> 28 & 15)) * 0.5
    return _signed("IQ3_XXS", scales, b[:, 2:66], _even(_fields(word, SIGNS_OF_WORD, 127)))


def read_iq2_xs(b: Blocks) -> Tensor:
    """d f16 | 32 words of 16 bits, for 8 elements each: entry of the grid (9 bits), signs (7) | 8 bytes: a scale of
    four bits for each 16 elements."""
    word = words(b[:, 2:66])
    scales = half(b[:, :2]) * (0.5 + unpack(b[:, 66:], 4).flatten(1)) * 0.25
    return _signed("IQ2_XS", scales, word & 511, _even(word >> 9))


def read_iq2_s(b: Blocks) -> Tensor:
    """d f16 | 32 bytes: low bits of the entries, of 8 elements each | 32 bytes of signs | 8 bytes: two bits more of
    each entry | 8 bytes: a scale of four bits for each 16 elements."""
    index = b[:, 2:34].int() | unpack(b[:, 66:74], 2).flatten(1).int() << 8
    scales = half(b[:, :2]) * (0.5 + unpack(b[:, 74:], 4).flatten(1)) * 0.25
    return _signed("IQ2_S", scales, index, b[:, 34:66])


def read_iq3_s(b: Blocks) -> Tensor:
    """d f16 | 64 bytes: low bits of the entries, of 4 elements each | 8 bytes: a ninth bit of each | 32 bytes of signs
    | 4 bytes: a scale of four bits for each 32 elements: d (2 scale + 1) times the entry."""
    index = b[:, 2:66].int() | unpack(b[:, 66:74], 1).flatten(1).int() << 8
    scales = half(b[:, :2]) * (1 + 2 * unpack(b[:, 106:], 4).flatten(1))
    return _signed("IQ3_S", scales, index, b[:, 74:106])


def _shifted(name: str, scales: Tensor, index: Tensor, down: Tensor) -> Tensor:
    """[n, groups] scales, [n, 32] entries of a grid and whether each is moved down → [n, 256]."""
    moved = grid(name, index.device)[index.long()] + torch.where(down, -IQ1_SHIFT, IQ1_SHIFT)[..., None]
    return (moved.reshape(*scales.shape, -1) * scales[..., None]).flatten(1)


def read_iq1_s(b: Blocks) -> Tensor:
    """d f16 | 32 bytes: low bits of the entries, of 8 elements each | for each 32 elements a word of 16 bits: three
    bits more of four entries, scale (3 bits), direction of the shift: d (2 scale + 1) (entry ± 1/8)."""
    word = words(b[:, 34:])
    index = b[:, 2:34].int() | _fields(word, (0, 3, 6, 9), 7).flatten(1) << 8
    scales = half(b[:, :2]) * (2 * (word >> 12 & 7) + 1)
    return _shifted("IQ1_S", scales, index, (word >> 15 & 1).bool().repeat_interleave(4, 1))


def read_iq1_m(b: Blocks) -> Tensor:
    """32 bytes: low bits of the entries, of 8 elements each | 16 bytes: for each entry three bits more and the
    direction of its shift | four words of 16 bits: four scales of three bits (of 16 elements each), and four bits of d,
    a float16."""
    word, high = words(b[:, 48:]), unpack(b[:, 32:48], 4).flatten(1).int()
    d = (word >> 12 << constants((0, 4, 8, 12), b.device).int()).sum(1, keepdim=True, dtype=torch.int32)
    scales = half(as_bytes(d.to(torch.int16))) * (2 * _fields(word, (0, 3, 6, 9), 7).flatten(1) + 1)
    return _shifted("IQ1_M", scales, b[:, :32].int() | (high & 7) << 8, high > 7)


def read_iq4_nl(b: Blocks) -> Tensor:
    """d f16 | 16 bytes, halves as in Q4_0: d times an entry of :data:`IQ4`."""
    return half(b[:, :2]) * table(IQ4, planes(b[:, 2:], 4).flatten(1))


def read_iq4_xs(b: Blocks) -> Tensor:
    """d f16 | 16 bits: two bits above of each scale | 4 bytes: low four bits of the 8 scales, of 32 elements each | for
    each 32 elements 16 bytes as in IQ4_NL: d (scale - 32) times an entry of :data:`IQ4`."""
    high = _fields(words(b[:, 2:4])[:, 0], tuple(range(0, 16, 2)), 3)
    low = unpack(b[:, 4:8], 4).flatten(1).int()
    scales = half(b[:, :2]) * ((low | (high << 4)) - 32).float()
    return (scales[..., None] * table(IQ4, planes(shaped(b[:, 8:], 8, 16), 4).flatten(2))).flatten(1)


def _nearest_iq4(x: Tensor) -> Tensor:
    """Positions of the nearest numbers of :data:`IQ4`; between two, the larger one."""
    return torch.bucketize(x, constants(IQ4_BETWEEN, x.device), right=True)


def _iq4_scales(x: Tensor, trials: Tensor) -> Tensor:
    """[k, n] elements, [t, n] inverse scales to try → [n] scales that fit best."""
    w, y = (x * x)[:, None], x[:, None]
    q = table(IQ4, _nearest_iq4(trials * y))
    scale, _ = best(in_order(w * q * y), in_order(w * q * q))
    return torch.where(x.abs().amax(0) < LEAST, 0.0, scale)


def write_iq4_nl(x: Tensor) -> Blocks:
    first = 1 / (peak(x, 1) / IQ4[0])
    scale = _iq4_scales(x.T.contiguous(), first.T)[:, None]
    levels = torch.where(scale == 0, IQ4_ZERO, _nearest_iq4(first * x))
    return torch.cat((as_half(scale), pack_planes(shaped(levels, 2, 16), 4)), 1)


def write_iq4_xs(x: Tensor) -> Blocks:
    groups = x.reshape(-1, 32)
    highest = peak(groups, 1).T
    steps = torch.arange(-7, 8, device=x.device)[:, None] + IQ4[0]
    trials = torch.cat((1 / (-highest / IQ4[0]), steps / highest))
    scales = _iq4_scales(groups.T.contiguous(), trials).reshape(-1, 8)
    d = -peak(scales, 1) / 32
    codes = nearest(inverse(d) * scales).clamp(-32, 31)
    levels = _nearest_iq4(inverse(d * codes)[..., None] * shaped(x, 8, 32))
    codes = codes + 32
    high = pack_planes((codes >> 4).reshape(-1, 2, 4).mT, 2)
    low = pack_planes((codes & 15).reshape(-1, 4, 2).mT, 4)
    return torch.cat((as_half(d), high, low, pack_planes(shaped(levels, 2, 16), 4).flatten(1)), 1)


READ = {
    "IQ2_XXS": read_iq2_xxs, "IQ2_XS": read_iq2_xs, "IQ2_S": read_iq2_s, "IQ3_XXS": read_iq3_xxs,
    "IQ3_S": read_iq3_s, "IQ1_S": read_iq1_s, "IQ1_M": read_iq1_m, "IQ4_NL": read_iq4_nl, "IQ4_XS": read_iq4_xs,
}  # fmt: skip
WRITE = {"IQ4_NL": write_iq4_nl, "IQ4_XS": write_iq4_xs}
