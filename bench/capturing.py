"""A diffusion model's graph captured alone in a process: ``python -m bench.capturing FILES SHAPES``.

Both arguments are JSON: the model's files by the fields of :class:`sdrpc.families.model.ModelFiles`, and the shapes of
the diffusion model's inputs (float32) by their names. What it took is printed as JSON, see :class:`Capture`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdrpc.families.model import ModelFiles, open_model
from sdrpc.runtime.lowered import to_bytes
from sdrpc.targets import SDRPC

Shapes = Mapping[str, tuple[int, ...]]


class Capture(NamedTuple):
    """What a capture took: CPU seconds of all threads and seconds of the clock, from the built module to the bytes of
    the graph that are kept on the disk, without imports; CPU seconds of the whole process until then, and the most
    memory (bytes, resident, libraries included) that it ever had, also before the capture began; operations of the
    graph."""

    cpu: float
    wall: float
    process_cpu: float
    peak: int
    peak_before: int
    operations: int


def in_new_process(files: ModelFiles, shapes: Shapes) -> Capture:
    """Capture in a process of its own. Raises :class:`SystemExit` with its last words when it fails."""
    named = {name: str(path) for name, path in files.named.items()}
    done = subprocess.run(
        [sys.executable, "-m", "bench.capturing", json.dumps(named), json.dumps(shapes)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"the capture failed: {done.stderr[-2000:]}")
    return Capture(*json.loads(done.stdout))


def _capture(files: ModelFiles, shapes: Shapes) -> Capture:
    import diffusers  # noqa: F401  # imported here, so that its time is not the capture's
    import torch
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel  # noqa: F401  # diffusers imports when asked

    from sdrpc.lowering.capture import capture, without_weights
    from sdrpc.lowering.lower import lower

    component = open_model(files)["diffusion"]
    types = {name: weight.type for name, weight in component.found.tensors.items()}
    before, cpu, start = _peak(), time.process_time(), time.perf_counter()
    with without_weights():
        module, call = component.module().build()
    examples = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    lowered = lower(capture(module.eval(), examples, call), SDRPC, types)
    to_bytes(lowered)
    done = time.process_time()
    return Capture(
        done - cpu, time.perf_counter() - start, done, _peak(), before, len(lowered.graph.tensors)
    )  # fmt: skip


def _peak() -> int:
    """The most memory that was ever resident. (ru_maxrss would count the process that this one was forked from.)"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    named, shapes = (json.loads(text) for text in sys.argv[1:])
    paths: dict[str, Any] = {name: Path(path) for name, path in named.items()}
    print(json.dumps(_capture(ModelFiles(**paths), shapes)))
