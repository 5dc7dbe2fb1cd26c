"""What our server refuses, by the words that its log then has."""

from __future__ import annotations

from tests.interop.cases.base import Case

REFUSED: dict[str, Case] = {
    "padding 15 of 4 elements": Case("POOL_1D", "", lambda b: b.pool_1d(b.x(4), 0, 20, 7, 15)),
    "POOL_2D.*POOL_1D": Case(
        "POOL_1D", "", lambda b: b.pool_1d(b.pool_2d(b.x(4, 4), 0, 20, 3, 7, 2, 15, 0), 0, 20, 7, 15)
    ),
}
