"""How long sd-cli takes to get going when it has drawn with this model before."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from .command import SdCli
from .rows import Row
from .setup import Setup

SIZE = 64
"""Pixels of the picture: its single step shall cost little beside what comes before it."""

ROUNDS = 2


def run(setup: Setup) -> Iterator[Row]:
    checkpoint = setup.checkpoint(setup.variant.type)
    with setup.server(setup.variant) as server:
        yield _row(setup, "start, --rpc", checkpoint, "--rpc", f"127.0.0.1:{server.port}")
    local = ("--backend", setup.device, "--precision", setup.variant.precision)
    yield _row(setup, "start, no --rpc", checkpoint, *local)


def _row(setup: Setup, what: str, checkpoint: Path, *options: str) -> Row:
    graphs = setup.folder / "start" / "graphs"
    graphs.mkdir(parents=True)
    first = _seconds(setup, checkpoint, graphs, *options)
    again = min(_seconds(setup, checkpoint, graphs, *options) for _ in range(ROUNDS))
    shutil.rmtree(graphs)
    note = f"process start to the end of the first step of a {SIZE}×{SIZE} picture, without upload and VAE"
    return Row(what, again, "s", first, "first run, which captures", None, note)


def _seconds(setup: Setup, checkpoint: Path, graphs: Path, *options: str) -> float:
    """From the start of the process to its end, less uploads and the VAE: with one step that leaves the interpreter,
    opening the file, the graphs (captured or from the cache), the encoded prompts and the first step."""
    start = time.perf_counter()
    stages = SdCli(setup.request(steps=1, size=SIZE), {"model": checkpoint}, graphs, *options).wait().stages
    return time.perf_counter() - start - stages["upload"] - stages["decode"]
