"""What all benchmarks work on: checkpoints, servers, models on devices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sdrpc.client import connect
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.runtime.cache import Cache
from tests.support.process import ServerProcess

ROOT = Path(__file__).parent.parent
PROMPT = "a photograph of an astronaut riding a horse"


class Variant(NamedTuple):
    """The type of a checkpoint's weights, and the server's precision."""

    type: str
    precision: str

    def __str__(self) -> str:
        return f"{self.type} {self.precision}"


class FamilyOptions(NamedTuple):
    """The options of ``families`` and ``split``, and the parts of ``scaling``: families and parts of the benchmarks by
    name; ``type`` of the diffusion model's weights and ``cfg_scale``, None: the family's usual ones; size of text
    encoders beside a full diffusion model; side of the picture in pixels and steps, None: what belongs to the
    checkpoint's size; whether it is drawn with a LoRA and with a ControlNet, and how ours applies the LoRA."""

    names: tuple[str, ...]
    parts: tuple[str, ...]
    type: str | None
    text_encoders: str
    size: int | None
    steps: int | None
    cfg_scale: float | None = None
    lora: bool = False
    control: bool = False
    lora_apply_mode: str = "auto"


@dataclass(frozen=True)
class Setup:
    """The options of a run. ``folder`` is its scratch space; ``variants`` are measured one after the other by the
    benchmarks that compare arithmetic, the others take the first."""

    device: str
    size: int
    steps: int
    checkpoint_size: str
    variants: tuple[Variant, ...]
    folder: Path
    families: FamilyOptions

    @property
    def variant(self) -> Variant:
        return self.variants[0]

    @property
    def on_cpu(self) -> bool:
        return self.device == "CPU"

    def compiles(self, variant: Variant) -> bool:
        """Whether a server compiles programs that repeat."""
        return not self.on_cpu and variant.precision == "fast"

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device.lower().replace("cuda", "cuda:"))

    @property
    def cache(self) -> Cache:
        """Of lowered graphs; empty when the run starts."""
        return Cache(self.folder / "graphs")

    def request(self, steps: int | None = None, size: int | None = None) -> Request:
        """The picture that is drawn: with guidance, so that the model is given batches of two."""
        side = size or self.size
        return Request(
            PROMPT, width=side, height=side, steps=steps or self.steps, cfg_scale=7.0, sampling_method="euler"
        )

    def checkpoint(self, type: str) -> Path:
        """A checkpoint with random weights, made when it is not there yet; its pages are in the system's cache."""
        home = development_cache()
        path = home / f"bench-{self.checkpoint_size}-{type}.safetensors"
        if not path.exists():
            home.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.safetensors")
            maker = [sys.executable, "tools/make_checkpoint.py", "--size", self.checkpoint_size, "--type", type]
            subprocess.run([*maker, part], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            part.rename(path)
        read(path)
        return path

    @contextmanager
    def server(self, variant: Variant, *options: str) -> Iterator[ServerProcess]:
        """An rpc-server process on the device, with all of torch's threads and further ``options``."""
        usual = ("--verbose", "--threads", "0", "--device", self.device, "--precision", variant.precision)
        with ServerProcess(*usual, *options) as server:
            yield server

    @contextmanager
    def session(self, variant: Variant, port: int) -> Iterator[Session]:
        """The variant's model, all of it on the first device of the server at ``port``."""
        with ExitStack() as stack:
            device, *others = connect([f"127.0.0.1:{port}"])
            for opened in (device, *others):
                stack.callback(opened.close)
            yield stack.enter_context(Session.open(self.checkpoint(variant.type), device, self.cache))


def development_cache() -> Path:
    """Where checkpoints are kept from run to run."""
    return Path(os.environ.get("SDRPC_DEV_CACHE") or Path.home() / ".cache" / "sdrpc-dev")


def read(path: Path) -> None:
    """Bring the file's pages into the system's cache."""
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
