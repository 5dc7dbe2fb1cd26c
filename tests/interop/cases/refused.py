"""What our server refuses, by the words that its log then has."""

from __future__ import annotations

from tests.interop.cases.base import Case

HUGE = 1 << 30
REFUSED: dict[str, Case] = {
    f"padding {HUGE} of 4 elements": Case("POOL_1D", "", lambda b: b.pool_1d(b.x(4), 0, 4, HUGE, HUGE)),
    "POOL_2D.*POOL_1D": Case(
        "POOL_1D", "", lambda b: b.pool_1d(b.pool_2d(b.x(4, 4), 0, 4, 4, HUGE, HUGE, HUGE, HUGE), 0, 4, HUGE, HUGE)
    ),
}
