"""What the compiling process is told, as bytes: a graph, how it is computed, on what, and where the result goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from sdrpc.ggml import serialize
from sdrpc.ggml.tensor import Graph

from ..digest import content
from ..precision import Precision

MADE_FOR_BYTES = 20
SOURCES = Path(__file__).parents[2]


class Origin(NamedTuple):
    """What a program was made of: the graph, which has been validated, its precision, and the size and number of each
    of its buffers by key."""

    graph: Graph
    precision: Precision
    sizes: Mapping[int, int]
    numbers: Mapping[int, int]


class Job(NamedTuple):
    """``kept``: for each converted weight, in the program's order, whether it is an input of the compiled function.
    ``threads``: of the compiler, and of the processor's program."""

    origin: Origin
    device: torch.device
    kept: tuple[bool, ...]
    threads: int

    @property
    def key(self) -> str:
        """A digest of everything that decides the compiled code."""
        graph, _ = content(self.origin.graph, self.origin.sizes)
        facts: list[object] = [
            graph.hex(),
            repr(self.origin.precision),
            self.kept,
            self.made_for.hex(),
        ]
        return blake2b(json.dumps(facts).encode(), digest_size=20).hexdigest()

    @property
    def made_for(self) -> bytes:
        """See :func:`made_for`."""
        return made_for(self.device, self.threads)


def made_for(device: torch.device, threads: int) -> bytes:
    """A digest of where compiled code runs: the hardware, the versions, and of a processor the threads."""
    facts = [device.type, *_machine(device), *([str(threads)] if device.type == "cpu" else [])]
    return blake2b(json.dumps(facts).encode(), digest_size=MADE_FOR_BYTES).digest()


def encode(job: Job, result: Path) -> bytes:
    """For the compiling process, which puts the code into the file ``result``."""
    origin = job.origin
    head = {
        "precision": asdict(origin.precision) | {"narrow": _name(origin.precision.narrow)},
        "sizes": list(origin.sizes.items()),
        "numbers": list(origin.numbers.items()),
        "device": str(job.device),
        "kept": job.kept,
        "threads": job.threads,
        "result": str(result),
    }
    parts = [json.dumps(head).encode(), serialize.encode(origin.graph)]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def read(stream: BinaryIO) -> tuple[Job, Path]:
    """What :func:`encode` made."""
    head: dict[str, Any] = json.loads(_part(stream))
    narrow = head["precision"]["narrow"]
    precision = Precision(**head["precision"] | {"narrow": None if narrow is None else getattr(torch, narrow)})
    graph = serialize.decode(_part(stream))
    origin = Origin(graph, replace(precision), dict(head["sizes"]), dict(head["numbers"]))
    return Job(origin, torch.device(head["device"]), tuple(head["kept"]), head["threads"]), Path(head["result"])


def _part(stream: BinaryIO) -> bytes:
    return stream.read(int.from_bytes(stream.read(8), "little"))


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _machine(device: torch.device) -> list[str]:
    """The versions and the hardware that code is made for."""
    facts = [torch.__version__, _sources()]
    if device.type == "cuda":
        # code launches its kernels on the device, by number, that it was compiled for
        number, capability = device.index or 0, torch.cuda.get_device_capability(device)
        return [*facts, torch.cuda.get_device_name(device), str(capability), str(number)]
    return [*facts, torch.backends.cpu.get_cpu_capability()]


@cache
def _sources() -> str:
    """A digest of the engine's own code, which is what is compiled."""
    found = blake2b(digest_size=20)
    for path in sorted([*(SOURCES / "engine").rglob("*.py"), *(SOURCES / "ggml").rglob("*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()
