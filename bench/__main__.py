"""``python -m bench [NAME…]``: run the benchmarks, print a table, write JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import rich.box
import typer
from rich.console import Console
from rich.table import Table

from sdrpc.engine.system import host_memory, processor

from .registry import BENCHMARKS
from .rows import Row
from .setup import Setup, Variant

PACKAGES = ("sdrpc", "torch", "diffusers", "numpy")
BY_DEFAULT = {"CPU": (Variant("f32", "exact"), Variant("bf16", "fast"))}
ON_ACCELERATORS = (Variant("f16", "fast"),)

log = Console(stderr=True, highlight=False)


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME…]", help="Benchmarks. [default: all]")] = None,
    device: Annotated[str, typer.Option(help="The server's device, and diffusers': CPU, CUDA0 …")] = "CPU",
    size: Annotated[int, typer.Option(help="Width and height of the picture in pixels.")] = 256,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps; the first is not counted.")] = 4,
    checkpoint_size: Annotated[str, typer.Option(metavar="full|tiny", help="SD 1.5's shapes, or small ones.")] = "full",
    precision: Annotated[str | None, typer.Option(metavar="exact|fast", show_default="both on a CPU")] = None,
    type: Annotated[str | None, typer.Option(metavar="f32|bf16|f16", help="Of the weights.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Measure sdrpc beside diffusers, and beside what the machine can do."""
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if unknown := set(names or ()) - set(known):
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(known)}")
    variants = _variants(device, type, precision)
    rows: list[tuple[str, Row]] = []
    with tempfile.TemporaryDirectory(prefix="sdrpc-bench-") as folder:
        setup = Setup(device, size, steps, checkpoint_size, variants, Path(folder))
        for benchmark in (known[name] for name in names or known):
            log.print(f"{benchmark.name}: {benchmark.about} …")
            start = time.perf_counter()
            rows.extend((benchmark.name, row) for row in benchmark.run(setup))
            log.print(f"{benchmark.name}: {time.perf_counter() - start:.0f} s")
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(_table([row for _, row in rows]))
    facts = _facts(device) | {"options": setup_options(setup)}
    if json_file is not None:
        found = [{"benchmark": name} | row.facts() for name, row in rows]
        json_file.write_text(json.dumps(facts | {"rows": found}, indent=2, ensure_ascii=False) + "\n")


def _variants(device: str, type: str | None, precision: str | None) -> tuple[Variant, ...]:
    usual = BY_DEFAULT.get(device, ON_ACCELERATORS)
    if type is None and precision is None:
        return usual
    types = {"exact": "f32", "fast": "bf16"}
    return (Variant(type or types[precision or "exact"], precision or usual[0].precision),)


def setup_options(setup: Setup) -> dict[str, Any]:
    return {
        "device": setup.device, "size": setup.size, "steps": setup.steps, "checkpoint": setup.checkpoint_size,
        "variants": [str(variant) for variant in setup.variants],
    }  # fmt: skip


def _facts(device: str) -> dict[str, Any]:
    """Where and when this was measured, and with what."""
    machine: dict[str, Any] = {
        "processor": processor(), "cores": os.cpu_count(), "memory": host_memory().total, "system": platform.platform(),
    }  # fmt: skip
    if device.startswith("CUDA"):
        import torch

        machine["accelerator"] = torch.cuda.get_device_name(int(device.removeprefix("CUDA")))
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine, "versions": versions}


def _table(rows: list[Row]) -> Table:
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    for title, side in (("what", "left"), ("ours", "right"), ("theirs / floor", "right"), ("", "left"),
                        ("ratio", "right"), ("mark", "right"), ("met", "left"), ("note", "left")):  # fmt: skip
        table.add_column(title, justify="right" if side == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(
            row.what,
            f"{_short(row.ours)} {row.unit}",
            "" if row.theirs is None else f"{_short(row.theirs)} {row.unit}",
            row.against,
            "" if row.ratio is None else f"{row.ratio:.3f}",
            "" if row.mark is None else str(row.mark),
            {None: "", True: "yes", False: "[red]no[/]"}[row.met],
            row.note,
        )
    return table


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


if __name__ == "__main__":
    typer.run(main)
