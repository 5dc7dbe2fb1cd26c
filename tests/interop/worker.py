"""Runs in a process of its own: ggml's CPU backend and ggml's RPC client, which abort on errors, side by side.

Everything that is compared is a function of ``backends`` (one or more of the same kind) that gives arrays; it runs on
CPU backends first, then on RPC backends of the server under test.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.interop.cases import CASES, REFUSED, Builder, Case
from tests.interop.scenarios import SCENARIOS
from tests.support import ggml

Arrays = list[np.ndarray]


class Outcome(NamedTuple):
    """``error``: the largest normalized mean square error of the results; ``graph``: what was computed."""

    error: float
    graph: str


def start(log: str) -> None:
    """What ggml says before it aborts goes to ``log``: the process that asked shows it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["GGML_NO_BACKTRACE"] = "1"


def run(name: str, endpoint: str, shared_memory: bool = False) -> Outcome:
    """Compute the case or scenario ``name`` on ggml's CPU and at ``endpoint`` (empty: on ggml's CPU again)."""
    lib = ggml.library()
    description: list[str] = []
    work: Callable[[Sequence[int]], Arrays]
    if case := CASES.get(name) or REFUSED.get(name):
        work = lambda backends: compute(name, case, backends[0], shared_memory, description)  # noqa: E731
    else:
        work = SCENARIOS[name]
    backends = [ggml.cpu(), ggml.cpu()]
    expected = work(backends)
    if endpoint:
        devices = lib.ggml_backend_reg_dev_count(lib.ggml_backend_rpc_add_server(endpoint.encode()))
        actual = work([lib.ggml_backend_rpc_init(endpoint.encode(), i) for i in range(devices)])
    else:
        actual = work(backends)
    for backend in backends:
        lib.ggml_backend_free(backend)
    errors = [nmse(theirs, ours) for theirs, ours in zip(expected, actual, strict=True)]
    return Outcome(max(errors), "\n".join(description) or name)


def compute(name: str, case: Case, backend: int, shared_memory: bool, description: list[str]) -> Arrays:
    """The values of the case's results. ``shared_memory``: nodes get memory from ggml's graph allocator, which gives
    memory again that is no longer needed; else each has its own."""
    lib = ggml.library()
    builder = Builder(name)
    built = case.build(builder)
    results = built if isinstance(built, tuple) else (built,)
    graph = builder.nodes.graph(*builder.first, *results)
    for result in results:
        owner = result.contents.view_src  # the allocator must keep the memory, not only the name
        lib.ggml_set_output(owner or result)
    if not description:
        description += [ggml.describe(node) for node in ggml.nodes(graph)]
    for node in ggml.nodes(graph):
        if not lib.ggml_backend_supports_op(backend, node):
            raise ValueError(f"ggml does not support {ggml.describe(node)}")
    inputs = lib.ggml_backend_alloc_ctx_tensors(builder.leaves.pointer, backend)
    for tensor, data in builder.data:
        ggml.write(tensor, data)
    if shared_memory:
        allocator = lib.ggml_gallocr_new(lib.ggml_backend_get_default_buffer_type(backend))
        if not lib.ggml_gallocr_alloc_graph(allocator, graph):
            raise MemoryError("ggml_gallocr_alloc_graph")
    else:
        own = lib.ggml_backend_alloc_ctx_tensors(builder.nodes.pointer, backend)
    status = lib.ggml_backend_graph_compute(backend, graph)
    values = [ggml.values(result) for result in results]
    if shared_memory:
        lib.ggml_gallocr_free(allocator)
    elif own:
        lib.ggml_backend_buffer_free(own)
    if inputs:
        lib.ggml_backend_buffer_free(inputs)
    builder.leaves.free()
    builder.nodes.free()
    if status:
        raise RuntimeError(f"ggml_backend_graph_compute: status {status}")
    return values


def nmse(theirs: np.ndarray, ours: np.ndarray) -> float:
    """‖theirs - ours‖² / ‖theirs‖² in float64; infinite when they are not infinite or NaN in the same places."""
    a, b = theirs.astype(np.float64), ours.astype(np.float64)
    odd = ~np.isfinite(a)
    if a.shape != b.shape or not np.array_equal(a[odd], b[odd], equal_nan=True) or not np.isfinite(b[~odd]).all():
        return float("inf")
    a, b = np.where(odd, 0, a), np.where(odd, 0, b)
    difference, size = float(((a - b) ** 2).sum()), float((a**2).sum())
    return difference / size if size else difference


def guarded(name: str, *arguments: Any) -> Outcome:
    """:func:`run`, with the case's name in whatever it raises."""
    try:
        return run(name, *arguments)
    except Exception as error:
        raise RuntimeError(f"{name}: {error}\n{traceback.format_exc()}") from None
