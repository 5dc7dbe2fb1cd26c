"""What ggml's RPC client asks our server to compute: a table of single operations and whole graphs.

Each case builds its graph with ggml's own C API; the worker computes it twice, on ggml's CPU backend and on our server,
and compares what the case returns. Cases are found by name, so that a process of its own can run them.
"""

from __future__ import annotations

from tests.interop.cases import attention, copies, elementwise, graphs, images, products, rows  # noqa: F401 (they add cases)
from tests.interop.cases.base import BOUNDS, TABLE, Builder, Case
from tests.interop.cases.refused import REFUSED

__all__ = ["BOUNDS", "CASES", "GRAPHS", "OPERATIONS", "REFUSED", "Builder", "Case"]

CASES: dict[str, Case] = dict(TABLE)
GRAPHS: tuple[str, ...] = tuple(name for name, c in CASES.items() if c.op == "graph")
OPERATIONS: tuple[str, ...] = tuple(name for name in CASES if name not in GRAPHS)
