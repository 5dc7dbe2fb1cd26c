"""Single operations at the edges of what validation lets through, in processes that may die.

``python -m tests.fuzz.operations SEED COUNT [DEVICE [PRECISION]]`` makes so many, of the small graphs that every engine
is tested over (:mod:`tests.support.cases`): their last operations, with sizes, parameters and numbers that nobody would
choose. What the rules let through is computed on the device (CPU, CUDA0 …). It has to give a result or a reason, in
bounded time, and to take no more memory than was said before it began.

A GPU's kernel that reads where nothing is does not end its process, but all that comes later fails: so the device has
to work after each of them.
"""

from __future__ import annotations

import faulthandler
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sdrpc.device import Memory
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.discovery import found
from sdrpc.engine.precision import choose
from sdrpc.errors import DeviceError, GraphError
from sdrpc.ggml.build import leaf, node
from sdrpc.ggml.params import Params
from sdrpc.ggml.tensor import OUTPUT, Graph, Tensor
from sdrpc.ggml.types import I32, TYPES
from tests.support.cases import CASES
from tests.support.feed import Feed

COMMAND = (sys.executable, "-m", "tests.fuzz.operations")
ROOM = 256 << 20
"""What the device says to have: no operation may take more."""
SLACK = 192 << 20
"""Memory that Python, torch's threads and the allocator take beside that of an operation."""
SIDES = (1, 1, 2, 3, 7, 16, 31, 64, 255, 256, 1024, 4096, 65536)
STRANGE = (0, 1, -1, 2, 3, 7, 100, 255, 2**14, 2**15, 2**16, 2**24, 2**29, 2**30, 2**31 - 1, -(2**31))
STRANGE_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 3.4e38, float("inf"), float("-inf"), float("nan"))
LARGEST = 1 << 22
"""Elements of an operand."""
RUN_SECONDS = 2.0
PATIENCE = 240
"""Seconds after which an operation that was to take ``RUN_SECONDS`` at most never ends, on a busy machine, too."""
BY_OPERATION = {
    op: [name for name in CASES if name.partition("-")[0] == op] for op in {name.partition("-")[0] for name in CASES}
}
"""Operation → its cases: those with many come no oftener than others."""


class Small(LocalDevice):
    """A CPU that has little memory."""

    def memory(self) -> Memory:
        return Memory(ROOM, ROOM)


class Found(NamedTuple):
    """How many operations were computed, refused …, by the outcome; and the seeds of those that ended their process,
    with what it said."""

    outcomes: Counter[str]
    faults: dict[int, str]


def hunt(seed: int, count: int, device: str = "CPU", precision: str = "exact") -> Found:
    """Try ``count`` operations, beginning with the one of ``seed``, in as many processes as die."""
    outcomes, faults = Counter[str](), dict[int, str]()
    end = seed + count
    while seed < end:
        arguments = str(seed), str(end - seed), device, precision
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
        tried = [line.split() for line in done.stdout.splitlines()]
        outcomes.update(words[1] for words in tried if len(words) > 1)
        if not done.returncode:
            break
        seed = int(tried[-1][0]) if tried else seed
        faults[seed] = f"exit status {done.returncode}: {done.stderr[:2000]}"
        seed += 1
    return Found(outcomes, faults)


def changed(last: Tensor, source: random.Random) -> Tensor:
    """The operation of ``last`` with dense operands of other sizes, and other parameters. Sizes that were equal stay
    so, mostly: few operations take any. Raises :class:`GraphError` for what the rules forbid."""
    sizes: dict[int, int] = {}

    def side(size: int) -> int:
        if size not in sizes or source.random() < 0.1:
            sizes[size] = source.choice(SIDES) if source.random() < 0.5 else size
        return sizes[size]

    def operand(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        ne = [max(tensor.type.block, side(tensor.ne[0]) // tensor.type.block * tensor.type.block)]
        ne += [side(size) for size in tensor.ne[1:]]
        if prod(ne) > LARGEST:
            raise GraphError("more than is worth it here")
        return leaf(tensor.type, *ne)

    src = [operand(tensor) for tensor in last.src]
    params: Params = last.params._replace(
        **{name: strange(value, source) for name, value in last.params._asdict().items() if source.random() < 0.4}
    )
    try:
        return node(last.op, *src, params=params)
    except GraphError:  # it may be one whose result can be chosen
        return node(last.op, *src, params=params, type=last.type, ne=tuple(side(size) for size in last.ne))


def strange(value: Any, source: random.Random) -> Any:
    """A parameter in the place of ``value``."""
    if isinstance(value, float):
        return source.choice(STRANGE_FLOATS)
    return source.choice(STRANGE) if isinstance(value, int) else value


def contents(tensor: Tensor, source: random.Random) -> bytes:
    """Numbers of an operand: small ones, zeros, or any bytes."""
    numbers = np.random.default_rng(source.randrange(1 << 32))
    kind = source.choice(("small", "small", "zeros", "bytes"))
    if kind == "bytes" or (kind == "small" and not tensor.type.plain):
        return numbers.bytes(tensor.nbytes)
    if kind == "small" and tensor.type == TYPES["F32"]:
        return numbers.standard_normal(prod(tensor.ne)).astype("f4").tobytes()
    if kind == "small" and tensor.type == I32:
        return numbers.integers(0, 4, prod(tensor.ne)).astype("i4").tobytes()
    return bytes(tensor.nbytes)


def compute(device: LocalDevice, last: Tensor, source: random.Random) -> None:
    """Run one operation whose operands have no memory yet."""
    operands = list(dict.fromkeys(tensor for tensor in last.src if tensor is not None))
    buffers = [device.allocate(max(tensor.nbytes, 1)) for tensor in (*operands, last)]
    try:
        for buffer, tensor in zip(buffers, operands, strict=False):
            device.write(buffer, 0, contents(tensor, source))
        placed = {tensor: replace(tensor, buffer=buffer.key) for tensor, buffer in zip(operands, buffers, strict=False)}
        src = tuple(tensor and placed[tensor] for tensor in last.src)
        result = replace(last, src=src, buffer=buffers[-1].key, flags=OUTPUT)
        program = device.compile(Graph((result,)), {buffer.key: buffer for buffer in buffers})

        def run() -> None:
            program.run()
            device.read(buffers[-1], 0, last.nbytes)

        taken, said = memory_taken(device, run), program.peak + last.nbytes
        assert taken <= said + SLACK, f"{taken >> 20} MiB, {said >> 20} MiB were said: {result}"
    finally:
        for buffer in buffers:
            device.free(buffer)


def memory_taken(device: LocalDevice, run: Callable[[], None]) -> int:
    """The most bytes, beside those that there were, that ``run`` took."""
    if device.torch_device.type != "cuda":
        before = forget_peak()
        run()
        return peak() - before
    torch.cuda.reset_peak_memory_stats(device.torch_device)
    before = torch.cuda.memory_allocated(device.torch_device)
    run()
    return torch.cuda.max_memory_allocated(device.torch_device) - before


def forget_peak() -> int:
    """Let the most memory of this process be what it has now; that."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most memory, in bytes, that this process had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def outcome(attempt: Callable[[], object]) -> str:
    """What came of it, in a word."""
    try:
        attempt()
    except GraphError:
        return "refused"
    except DeviceError as error:
        return type(error).__name__
    return "computed"


def has_to_work(device: LocalDevice) -> None:
    """Raises :class:`AssertionError` or :class:`DeviceError` where it does not any more."""
    buffer = device.allocate(4)
    device.write(buffer, 0, b"here")
    assert bytes(device.read(buffer, 0, 4)) == b"here"
    device.free(buffer)


def main(seed: int, count: int, name: str = "CPU", precision: str = "exact") -> None:
    (kind,) = (each.device for each in found() if each.name == name)
    device = Small(name, kind, choose(precision, kind), threads=1, compute_limit=RUN_SECONDS)
    for number in range(seed, seed + count):
        print(number, end=" ", flush=True)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        source = random.Random(number)
        last = CASES[source.choice(BY_OPERATION[source.choice(sorted(BY_OPERATION))])](Feed())
        said = outcome(lambda: compute(device, changed(last, source), source))  # noqa: B023 (called here)
        has_to_work(device)
        print(said, flush=True)
    faulthandler.cancel_dump_traceback_later()
    device.close()


if __name__ == "__main__":
    faulthandler.enable()
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
