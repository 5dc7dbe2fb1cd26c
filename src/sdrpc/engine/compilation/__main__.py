"""The compiling process: a job on its standard input, compiled code in a file, or a reason on standard error.

It ends when its standard input does: then nobody waits for it any more.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch

from ..memory import LocalBuffer, Storage
from ..program import Bound, compile_graph
from ..weights import Weights
from .job import Job, read
from .pure import pure

PATIENCE = 10
"""How far behind other processes this one stands (nice)."""


def main() -> None:
    job, result = read(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(PATIENCE)
    torch.set_num_threads(job.threads)
    compile_to(job, result)


def compile_to(job: Job, result: Path) -> None:
    """Compile ``job``. Tensors are fake: they have shapes and no memory, so this takes none of the device's."""
    import torch._inductor.config as inductor
    from torch._guards import TracingContext, tracing
    from torch._inductor import standalone_compile  # type: ignore[attr-defined,unused-ignore]
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    inductor.cpp_cache_precompile_headers = False  # for one program that takes longer than it saves
    graph, precision, sizes, numbers = job.origin
    compiled = compile_graph(graph, precision, numbers)
    keys = {number: key for key, number in numbers.items()}
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())  # without one nothing can be saved
    with torch.no_grad(), fake:
        buffers = [
            LocalBuffer(key, sizes[key], Storage(torch.empty(sizes[key], dtype=torch.uint8, device=job.device)))
            for key in (keys[number] for number in compiled.buffers)
        ]
        bound = Bound(compiled, buffers, Weights(0), job.device)
        raw = {step.out: bound.fixed[step.args[0]] for step in bound.program if step.out in bound.weights}
        kept = {
            register: weight.whole(leaf)
            for (register, weight), flag in zip(bound.weights.items(), job.kept, strict=True)
            if flag and (leaf := raw[register]) is not None
        }
        program = pure(bound, kept)
        traced = make_fx(program.function)(*program.inputs)
    with torch.no_grad(), tracing(TracingContext(fake)):
        made = standalone_compile(traced, [*program.inputs], dynamic_shapes="from_tracing_context")
    made.save(path=str(result), format="binary")


def _end_with_parent() -> None:
    with suppress(OSError):
        while os.read(sys.stdin.fileno(), 1):  # not sys.stdin, whose lock the interpreter wants when it ends
            pass
    os._exit(1)


if __name__ == "__main__":
    main()
