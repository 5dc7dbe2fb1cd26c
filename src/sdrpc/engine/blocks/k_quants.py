"""K-quants: super-blocks of 256 elements in groups of 16 or 32, whose scales are numbers of few bits themselves.

The docstring of each reader gives the bytes of a block, in order, and what an element is: ``d`` is the block's scale,
``q`` the element's code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import quotient
from .bits import Blocks, as_bytes, as_half, half, pack_planes, planes, shaped
from .search import LEAST, affine, in_order, inverse, nearest, peak, refined, root, symmetric


def _read(levels: Tensor, scales: Tensor, leasts: Tensor | None = None) -> Tensor:
    """[n, groups, k] levels times the scales of groups, less the leasts: [n, 256]."""
    scaled = levels.float() * scales[..., None]
    return (scaled if leasts is None else scaled.sub_(leasts[..., None])).flatten(1)


def _columns(x: Tensor, k: int) -> Tensor:
    """[n, 256] → [k, n groups]: what the searches want."""
    return x.reshape(-1, k).T.contiguous()


def _requantized(x: Tensor, scales: Tensor, leasts: Tensor | None, bounds: tuple[int, int], found: Tensor) -> Tensor:
    """[n, 256] → levels [n, groups, k] for scales and leasts as they were rounded; where a scale became zero, those
    that the search found, [k, n groups]."""
    kept = found.T.reshape(*scales.shape, -1)
    groups = x.reshape(kept.shape)
    raised = groups if leasts is None else groups + leasts[..., None]
    levels = nearest(raised / scales[..., None]).clamp(*bounds)
    return torch.where(scales[..., None] == 0, kept, levels)


# scales of four bits: Q2_K


def read_q2_k(b: Blocks) -> Tensor:
    """16 bytes: scale (low half) and least m (high half) of each 16 elements | 64 bytes of two bits an element | d f16
    | dm f16: d · scale · q - dm · m. Of each 32 bytes the lowest two bits are 32 elements, the next two the next 32
    …"""
    levels = planes(shaped(b[:, 16:80], 2, 32), 2).reshape(-1, 16, 16)
    return _read(levels, half(b[:, 80:82]) * (b[:, :16] & 15).float(), half(b[:, 82:84]) * (b[:, :16] >> 4).float())


def write_q2_k(x: Tensor) -> Blocks:
    columns = _columns(x, 16)
    scale, least, found = affine(columns, 3, columns.abs(), -0.5, 16, absolute=True)
    (d, scales), (low, leasts) = (_positive(s.reshape(-1, 16), 15) for s in (scale, least))
    levels = _requantized(x, half(d) * scales, half(low) * leasts, (0, 3), found)
    packed = torch.stack((scales, leasts), 1).int()
    return torch.cat((pack_planes(packed, 4), pack_planes(levels.reshape(-1, 2, 4, 32), 2).flatten(1), d, low), 1)


def _positive(scales: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """[n, groups] scales, none below zero, as bytes of a float16 and levels up to ``top`` that it scales."""
    largest = scales.amax(1, keepdim=True).clamp(min=0) + 0.0
    return as_half(quotient(largest, top)), (nearest(inverse(largest, top) * scales) & 255).float()


# scales of six bits: Q3_K, Q4_K, Q5_K


def read_q3_k(b: Blocks) -> Tensor:
    """32 bytes: bit j of byte i is the third bit of element 32 j + i | 64 bytes of two bits, as in Q2_K | 12 bytes: 16
    scales of six bits, first their low halves, then the two bits above | d f16: d (scale - 32) (q - 4)."""
    low, high = planes(b[:, 96:104], 4).flatten(1), planes(b[:, 104:108], 2).flatten(1)
    scales = half(b[:, 108:]) * ((low | (high << 4)).float() - 32)
    levels = planes(shaped(b[:, 32:96], 2, 32), 2).flatten(1, 2) | planes(b[:, :32], 1) << 2
    return _read(levels.reshape(-1, 16, 16).float() - 4, scales)


def write_q3_k(x: Tensor) -> Blocks:
    scale, found = refined(_columns(x, 16), 4)
    scales = scale.reshape(-1, 16)
    by = inverse(peak(scales, 1), -32)
    d = as_half(inverse(by))
    codes = torch.where(by == 0, 0, nearest(by * scales).to(torch.int8).clamp(-32, 31).int() + 32)
    levels = 4 + _requantized(x, half(d) * (codes - 32), None, (-4, 3), found)
    levels = levels.reshape(-1, 8, 32)
    return torch.cat((
        pack_planes(levels >> 2, 1), pack_planes((levels & 3).reshape(-1, 2, 4, 32), 2).flatten(1),
        pack_planes(shaped(codes & 15, 2, 8), 4), pack_planes(shaped(codes >> 4, 4, 4), 2), d,
    ), 1)  # fmt: skip


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and leasts of Q4_K and Q5_K from their twelve bytes."""
    d, m, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((d & 63, (both & 15) | ((d >> 2) & 48)), -1)
    leasts = torch.cat((m & 63, (both >> 4) | ((m >> 2) & 48)), -1)
    return scales.float(), leasts.float()


def _pack_six_bits(scales: Tensor, leasts: Tensor) -> Tensor:
    scales, leasts = scales.to(torch.uint8), leasts.to(torch.uint8)
    d, d_last, m, m_last = scales[:, :4], scales[:, 4:], leasts[:, :4], leasts[:, 4:]
    return torch.cat((d | (d_last >> 4 << 6), m | (m_last >> 4 << 6), (d_last & 15) | (m_last << 4)), 1)


def read_q4_k(b: Blocks) -> Tensor:
    """d f16 | dm f16 | 12 bytes: scale and least m of each 32 elements (:func:`_six_bits`) | 128 bytes: d · scale · q -
    dm · m. Of each 32 bytes the low halves are 32 elements, the high halves the next 32."""
    scales, leasts = _six_bits(b[:, 4:16])
    levels = planes(shaped(b[:, 16:], 4, 32), 4).flatten(1, 2)
    return _read(levels, half(b[:, :2]) * scales, half(b[:, 2:4]) * leasts)


def read_q5_k(b: Blocks) -> Tensor:
    """d f16 | dm f16 | 12 bytes of scales and leasts, as in Q4_K | 32 bytes: bit j of byte i is the fifth bit of
    element 32 j + i | 128 bytes as in Q4_K."""
    scales, leasts = _six_bits(b[:, 4:16])
    levels = planes(shaped(b[:, 48:], 4, 32), 4).flatten(1, 2) | planes(b[:, 16:48], 1) << 4
    return _read(levels, half(b[:, :2]) * scales, half(b[:, 2:4]) * leasts)


def _write_six_bits(x: Tensor, top: int, start: float, trials: int) -> tuple[Tensor, Tensor]:
    """The first 16 bytes of Q4_K and Q5_K, and the levels [n, 8, 32]."""
    columns = _columns(x, 32)
    weights = root(quotient(in_order(columns * columns), 32)) + columns.abs()
    scale, least, found = affine(columns, top, weights, start, trials, absolute=False)
    (d, scales), (low, leasts) = (_positive(s.reshape(-1, 8), 63) for s in (scale, least))
    scales, leasts = scales.clamp(max=63), leasts.clamp(max=63)
    levels = _requantized(x, half(d) * scales, half(low) * leasts, (0, top), found)
    return torch.cat((d, low, _pack_six_bits(scales, leasts)), 1), levels


def write_q4_k(x: Tensor) -> Blocks:
    head, levels = _write_six_bits(x, 15, -1.0, 21)
    return torch.cat((head, pack_planes(levels.reshape(-1, 4, 2, 32), 4).flatten(1)), 1)


def write_q5_k(x: Tensor) -> Blocks:
    head, levels = _write_six_bits(x, 31, -0.5, 16)
    low = pack_planes((levels & 15).reshape(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat((head, pack_planes(levels >> 4, 1), low), 1)


# scales of eight bits: Q6_K


def read_q6_k(b: Blocks) -> Tensor:
    """128 bytes: low four bits | 64 bytes: two bits above | 16 scales, int8, each of 16 elements | d f16: d · scale ·
    (q - 32). For each 128 elements there are 64 bytes of low bits, whose low halves come first, and 32 bytes of high
    bits: the lowest two are those of the first 32 elements, and so on."""
    low = planes(shaped(b[:, :128], 2, 64), 4).reshape(-1, 8, 32)
    high = planes(shaped(b[:, 128:192], 2, 32), 2).flatten(1, 2)
    scales = half(b[:, 208:]) * b[:, 192:208].view(torch.int8).float()
    return _read((low | (high << 4)).reshape(-1, 16, 16).float() - 32, scales)


STEPS = tuple(step for step in range(-9, 10) if step)


def write_q6_k(x: Tensor) -> Blocks:
    columns = _columns(x, 16)
    scale, found = symmetric(columns, 32, columns * columns, STEPS)
    scales = scale.reshape(-1, 16)
    largest = peak(scales, 1)
    zero = largest.abs() < LEAST
    by = torch.where(zero, 0.0, inverse(largest, -128))
    d = as_half(inverse(by))
    codes = nearest(by * scales).clamp(max=127)
    levels = 32 + _requantized(x, half(d) * codes, None, (-32, 31), found)
    levels = torch.where(zero[..., None], 0, levels).reshape(-1, 2, 4, 32)
    low = pack_planes((levels & 15).reshape(-1, 2, 2, 64), 4).flatten(1)
    high = pack_planes(levels >> 4, 2).flatten(1)
    return torch.cat((low, high, as_bytes(codes.to(torch.int8)), d), 1)


READ = {"Q2_K": read_q2_k, "Q3_K": read_q3_k, "Q4_K": read_q4_k, "Q5_K": read_q5_k, "Q6_K": read_q6_k}
WRITE = {"Q2_K": write_q2_k, "Q3_K": write_q3_k, "Q4_K": write_q4_k, "Q5_K": write_q5_k, "Q6_K": write_q6_k}
