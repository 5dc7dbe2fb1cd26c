"""What ggml's RPC client asks our server to compute: a table of single operations and whole graphs.

Each case builds its graph with ggml's own C API; the worker computes it twice, on ggml's CPU backend and on our server,
and compares what the case returns. Cases are found by name, so that a process of its own can run them.
"""

from __future__ import annotations

from collections import defaultdict

from tests.interop.cases import (
    attention,
    copies,
    deepseek,
    edges,
    elementwise,
    graphs,
    images,
    products,
    recurrent,
    rows,
    training,
)
from tests.interop.cases.base import BOUNDS, Builder, Case
from tests.interop.cases.refused import REFUSED

__all__ = ["BOUNDS", "CASES", "GRAPHS", "OPERATIONS", "REFUSED", "Builder", "Case"]

CASES: dict[str, Case] = {}
OPERATIONS: defaultdict[str, list[str]] = defaultdict(list)
"""The names of the cases of each operation."""
FAMILIES = (elementwise, rows, attention, copies, products, images, recurrent, deepseek, training, edges, graphs)
for case in (case for family in FAMILIES for case in family.CASES):
    if case.name in CASES:
        raise ValueError(f"two cases are called {case.name}")
    CASES[case.name] = case
    OPERATIONS[case.op].append(case.name)
GRAPHS = OPERATIONS.pop("graph")
