"""What four bits mean in types whose numbers no formula gives, float32 in the order of the codes."""

from __future__ import annotations

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Floats of a sign, two bits of exponent and one of mantissa (OCP MX)."""

NORMAL4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""bitsandbytes' NF4: quantiles of the normal distribution (QLoRA, arXiv:2305.14314)."""

_OF_TWELVE = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
PARTS_OF_TWELVE = (*(x / 12 for x in _OF_TWELVE), *(-x / 12 for x in _OF_TWELVE))
"""bitsandbytes' FP4: sign, two bits of exponent, one of mantissa; the largest is 1."""
