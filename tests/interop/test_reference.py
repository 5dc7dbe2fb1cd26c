"""The reference interpreter gives what ggml's own CPU backend gives: so it is the definition that it says it is."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from sdrpc.ggml.dialect import newest
from sdrpc.ggml.params import encode
from tests.interop import worker
from tests.support import cases_integers, ggml, reference
from tests.support.cases import CASES
from tests.support.feed import Feed, graph

pytestmark = pytest.mark.interop

NOT_ITS = {
    "ADD-strided", "SUB-strided", "MUL-strided", "DIV-strided", "UNARY-strided", "MEAN", "PERMUTE", "TRANSPOSE",
    "CONV_2D_DW-channels-first", "TIMESTEP_EMBEDDING-odd", "SSM_SCAN-mamba-1", "GATED_DELTA_NET-gates", "DSV4_HC_PRE",
    "SUM-permuted", "SSM_SCAN-before-the-first-token", "GATED_DELTA_NET-before-the-first-token", "RWKV_WKV7",
    *cases_integers.CASES,
}  # fmt: skip
"""Cases that this ggml's CPU backend can't judge: rows that are not dense (it asserts that they are, or takes them for
it), a result in a layout that it would not give, parameters as before 7.0 (a number of states that is not said), states
from before the first token (it leaves them unwritten), heads that are no multiple of its vectors (it writes past them),
what only stable-diffusion.cpp's ggml has.
"""

BOUND = 1e-6
BOUNDS = {"MUL_MAT": 1e-4, "MUL_MAT_ID": 1e-4}
"""Mean squared error over mean square, by operation: ggml rounds a product's second operand to the first one's type."""


def on_ggml(name: str) -> np.ndarray:
    """The case's last node, computed by ggml's CPU backend: each tensor is written into ggml's own structure."""
    feed = Feed()
    steps = graph(CASES[name](feed))
    dialect, lib, context, backend = newest(), ggml.library(), ggml.Context(), ggml.cpu()
    made = {}
    for tensor in steps.tensors:
        pointer = made[tensor] = context.tensor(tensor.type.name, *tensor.ne)
        native = pointer.contents
        native.nb[:] = tensor.nb
        native.op = dialect.op_numbers[tensor.op]
        ctypes.memmove(native.op_params, encode(tensor.params, dialect), 64)
        sources = (tensor.src[0], tensor) if tensor.op == "CPY" and len(tensor.src) == 1 else tensor.src
        for i, source in enumerate(sources):
            if source is not None:
                native.src[i] = made[source]
        if tensor.view_src is not None:
            native.view_src, native.view_offs = made[tensor.view_src], tensor.view_offset
    lib.ggml_backend_alloc_ctx_tensors(context.pointer, backend)
    for leaf in steps.leaves:
        ggml.write(made[leaf], feed.memory[leaf.buffer].tobytes())
    last = made[steps.nodes[-1]]
    lib.ggml_backend_graph_compute(backend, context.graph(last))
    return ggml.values(last)


class Native:
    """A process with ggml. What aborts it fails alone: the next case gets a new one."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        self._log.write_text("")
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), worker.start, (str(self._log),))

    def run(self, name: str) -> np.ndarray:
        try:
            return self._pool.submit(on_ggml, name).result()
        except BrokenProcessPool:
            said = self._log.read_text()
            self.close()
            self._pool = self._new()
            pytest.fail(f"ggml gave up: {said}", pytrace=False)

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Native]:
    native = Native(tmp_path_factory.mktemp("ggml") / "cpu.log")
    yield native
    native.close()


@pytest.mark.parametrize("name", sorted(set(CASES) - NOT_ITS))
def test_case(name: str, native: Native) -> None:
    theirs = native.run(name)
    feed = Feed()
    steps = graph(CASES[name](feed))
    ours = reference.run(steps, feed.memory)[steps.nodes[-1]]
    assert worker.nmse(ours, theirs) <= BOUNDS.get(name.split("-")[0], BOUND)
