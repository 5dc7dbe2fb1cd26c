"""Runs in a process of its own: ggml's CPU backend and ggml's RPC client, which abort on errors, side by side.

Everything that is compared is a function of ``backends`` (one or more of the same kind) that gives arrays; it runs on
CPU backends first, then on RPC backends of the server under test.
"""

from __future__ import annotations

import itertools
import math
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from tests.interop.cases import CASES, REFUSED, Builder, Case, drawn
from tests.interop.scenarios import SCENARIOS
from tests.support import ggml

Arrays = list[np.ndarray]


class Signature(NamedTuple):
    """What a case is about: an operation (unary and gated ones by their own names) and its types."""

    op: str
    sources: tuple[str, ...]
    result: str


class Outcome(NamedTuple):
    """``error``: the largest normalized mean square error of the results; ``graph``: what was computed, or why it was
    not; ``signature``: of a case of an operation."""

    error: float
    graph: str
    signature: Signature | None = None


class Computed(NamedTuple):
    values: Arrays
    graph: str
    signature: Signature | None


def start(log: str) -> None:
    """What ggml says before it aborts goes to ``log``: the process that asked shows it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["GGML_NO_BACKTRACE"] = "1"


def run(name: str, endpoint: str, shared_memory: bool = False) -> Outcome:
    """Compute the case or scenario ``name`` on ggml's CPU and at ``endpoint`` (empty: on ggml's CPU again)."""
    try:
        if case := CASES.get(name) or REFUSED.get(name):
            return compare([case], endpoint, shared_memory)[0]
        with both(endpoint) as (here, there):
            return Outcome(worst(SCENARIOS[name](here), SCENARIOS[name](there)), name)
    except Exception as error:
        raise RuntimeError(f"{name}: {error}\n{traceback.format_exc()}") from None


def run_all(names: Sequence[str], endpoint: str) -> list[Outcome]:
    """Compute cases of operations, all in one graph. Those that raise are found by halving."""
    try:
        return compare([CASES.get(name) or drawn.case(name) for name in names], endpoint)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if len(names) == 1:
        return [Outcome(math.inf, said)]
    half = len(names) // 2
    return run_all(names[:half], endpoint) + run_all(names[half:], endpoint)


def compare(cases: Sequence[Case], endpoint: str, shared_memory: bool = False) -> list[Outcome]:
    with both(endpoint) as (here, there):
        expected, actual = (compute(cases, backends[0], shared_memory) for backends in (here, there))
    return [
        Outcome(worst(theirs.values, ours.values), theirs.graph, theirs.signature)
        for theirs, ours in zip(expected, actual, strict=True)
    ]


@contextmanager
def both(endpoint: str) -> Iterator[tuple[list[int], list[int]]]:
    """CPU backends, and a backend for each device at ``endpoint``."""
    lib = ggml.library()
    here = [ggml.cpu(), ggml.cpu()]
    there = here
    if endpoint:
        devices = lib.ggml_backend_reg_dev_count(lib.ggml_backend_rpc_add_server(endpoint.encode()))
        there = [lib.ggml_backend_rpc_init(endpoint.encode(), i) for i in range(devices)]
    try:
        yield here, there
    finally:
        for backend in here:
            lib.ggml_backend_free(backend)


def compute(cases: Sequence[Case], backend: int, shared_memory: bool = False) -> list[Computed]:
    """The values of the cases' results, computed as one graph. ``shared_memory``: nodes get memory from ggml's graph
    allocator, which gives memory again that is no longer needed; else each has its own."""
    lib = ggml.library()
    with ExitStack() as stack:
        leaves, nodes = ggml.Context(), ggml.Context()
        stack.callback(leaves.free)
        stack.callback(nodes.free)
        nodes.tensor("I8", 1)  # ggml does not look at a context that holds nothing but views
        builders = [Builder(case.name, leaves, nodes) for case in cases]
        built = [case.build(builder) for case, builder in zip(cases, builders, strict=True)]
        results = [result if isinstance(result, tuple) else (result,) for result in built]
        graph, ends = nodes.graph(), [0]
        for builder, result in zip(builders, results, strict=True):
            for tensor in (*builder.first, *result):
                lib.ggml_build_forward_expand(graph, tensor)
            ends.append(lib.ggml_graph_n_nodes(graph))
        steps = [ggml.nodes(graph)[start:end] for start, end in itertools.pairwise(ends)]
        for node in itertools.chain(*steps):
            if not lib.ggml_backend_supports_op(backend, node):
                raise ValueError(f"ggml does not support {ggml.describe(node)}")
        for result in itertools.chain(*results):
            lib.ggml_set_output(result.contents.view_src or result)  # the allocator must keep the memory, not the name
        if inputs := lib.ggml_backend_alloc_ctx_tensors(leaves.pointer, backend):
            stack.callback(lib.ggml_backend_buffer_free, inputs)
        for tensor, data in itertools.chain(*(builder.data for builder in builders)):
            ggml.write(tensor, data)
        if shared_memory:
            allocator = lib.ggml_gallocr_new(lib.ggml_backend_get_default_buffer_type(backend))
            stack.callback(lib.ggml_gallocr_free, allocator)
            if not lib.ggml_gallocr_alloc_graph(allocator, graph):
                raise MemoryError("ggml_gallocr_alloc_graph")
        elif own := lib.ggml_backend_alloc_ctx_tensors(nodes.pointer, backend):
            stack.callback(lib.ggml_backend_buffer_free, own)
        if status := lib.ggml_backend_graph_compute(backend, graph):
            raise RuntimeError(f"ggml_backend_graph_compute: status {status}")
        return [
            Computed([ggml.values(result) for result in group], *described(case.op, step))
            for case, step, group in zip(cases, steps, results, strict=True)
        ]


def described(op: str, nodes: Sequence[Any]) -> tuple[str, Signature | None]:
    """A graph as text, and the last of its nodes that is an ``op``."""
    lib = ggml.library()
    found = None
    for node in nodes:
        t = node.contents
        if lib.ggml_op_name(t.op).decode() == op:
            sources = tuple(ggml.NAMES[source.contents.type] for source in t.src if source)
            found = Signature(lib.ggml_op_desc(node).decode(), sources, ggml.NAMES[t.type])
    return "\n".join(map(ggml.describe, nodes)), found


def worst(theirs: Arrays, ours: Arrays) -> float:
    return max(nmse(a, b) for a, b in zip(theirs, ours, strict=True))


def nmse(theirs: np.ndarray, ours: np.ndarray) -> float:
    """‖theirs - ours‖² / ‖theirs‖² in float64; infinite when they are not infinite or NaN in the same places."""
    a, b = theirs.astype(np.float64), ours.astype(np.float64)
    odd = ~np.isfinite(a)
    if a.shape != b.shape or not np.array_equal(a[odd], b[odd], equal_nan=True) or not np.isfinite(b[~odd]).all():
        return float("inf")
    a, b = np.where(odd, 0, a), np.where(odd, 0, b)
    difference, size = float(((a - b) ** 2).sum()), float((a**2).sum())
    return difference / size if size else difference
