"""``python -m bench [NAME…]``: run the benchmarks, print a table, write JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import rich.box
import typer
from rich.console import Console
from rich.table import Table

from sdrpc import __version__
from sdrpc.diffusion.request import APPLY_MODES
from sdrpc.engine.system import host_memory, processor

from . import families, scaling
from .registry import BENCHMARKS
from .rows import Row
from .setup import FamilyOptions, Setup, Variant

PACKAGES = ("torch", "diffusers", "numpy")
BY_DEFAULT = {"CPU": (Variant("f32", "exact"), Variant("bf16", "fast"))}
ON_ACCELERATORS = (Variant("f16", "fast"),)
SIZE, STEPS = 256, 4
"""Of SD 1.5's picture."""

log = Console(stderr=True, highlight=False)


def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME…]", help="Benchmarks. [default: all but families]")
    ] = None,
    device: Annotated[str, typer.Option(help="The server's device, and diffusers': CPU, CUDA0 …")] = "CPU",
    size: Annotated[
        int | None,
        typer.Option(help="Width and height in pixels.", show_default="256; families: the family's, tiny: 128"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=2, help="Sampling steps; the first is not counted.", show_default="4; families: the family's, tiny: 4"
        ),
    ] = None,
    checkpoint_size: Annotated[
        str,
        typer.Option(metavar="full|reduced|tiny", help="The models' shapes, small ones, or FLUX.1's with few blocks."),
    ] = "full",
    precision: Annotated[str | None, typer.Option(metavar="exact|fast", show_default="both on a CPU")] = None,
    type: Annotated[
        str | None,
        typer.Option(metavar="f32|bf16|f16|q8_0|f8_e4m3", help="Of the weights; q8_0 and f8_e4m3 for families alone."),
    ] = None,
    family: Annotated[
        str, typer.Option(metavar="NAME,…", help=f"Of families: {', '.join(families.KINDS)}.")
    ] = ",".join(families.USUAL),
    only: Annotated[
        str, typer.Option(metavar="PART,…", help="Of families, scaling and split: what to measure.")
    ] = ",".join(families.USUAL_PARTS + scaling.PARTS),
    cfg_scale: Annotated[
        float | None, typer.Option(help="Of split: guidance; 1: no negative prompt.", show_default="the family's")
    ] = None,
    text_encoders: Annotated[
        str, typer.Option(metavar="full|reduced", help="Of families: few layers, which saves 6 to 14 GB.")
    ] = "full",
    lora: Annotated[
        bool, typer.Option("--lora", help="Of families, sdxl: with a LoRA of rank 16 on attention.")
    ] = False,
    lora_apply_mode: Annotated[
        str, typer.Option(metavar="|".join(APPLY_MODES), help="Of --lora: how ours is applied; diffusers' is fused.")
    ] = "auto",
    control: Annotated[bool, typer.Option("--control", help="Of families, sdxl: with a ControlNet.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Measure sdrpc beside diffusers, and beside what the machine can do."""
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    usual = [benchmark.name for benchmark in BENCHMARKS if benchmark.usual]
    if unknown := set(names or ()) - set(known):
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(known)}")
    variants = _variants(device, type, precision)
    options = FamilyOptions(
        _listed(family, families.KINDS, "--family"), _listed(only, (*families.PARTS, *scaling.PARTS), "--only"), type,
        text_encoders, size, steps, cfg_scale, lora, control, lora_apply_mode,
    )  # fmt: skip
    if cfg_scale is not None and names != ["split"]:
        raise typer.BadParameter("it is for split alone", param_hint="--cfg-scale")
    if (lora or control) and (options.names != families.ADAPTED or options.parts != ("step",)):
        raise typer.BadParameter("they are for --family sdxl --only step", param_hint="--lora, --control")
    if lora_apply_mode not in APPLY_MODES:
        raise typer.BadParameter(f"there are {', '.join(APPLY_MODES)}", param_hint="--lora-apply-mode")
    rows: list[tuple[str, Row]] = []
    with tempfile.TemporaryDirectory(prefix="sdrpc-bench-") as folder:
        setup = Setup(device, size or SIZE, steps or STEPS, checkpoint_size, variants, Path(folder), options)
        for benchmark in (known[name] for name in names or usual):
            log.print(f"{benchmark.name}: {benchmark.about} …")
            start = time.perf_counter()
            for row in benchmark.run(setup):
                rows.append((benchmark.name, row))
                note = f" ({row.note})" if row.note else ""  # told now: what comes may end the process
                log.print(f"  {row.what}: {_short(row.ours)} {row.unit}{_beside(row)}{note}")
            log.print(f"{benchmark.name}: {time.perf_counter() - start:.0f} s")
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(_table([row for _, row in rows]))
    facts = _facts(device) | {"options": setup_options(setup)}
    if json_file is not None:
        found = [{"benchmark": name} | row.facts() for name, row in rows]
        json_file.write_text(json.dumps(facts | {"rows": found}, indent=2, ensure_ascii=False) + "\n")


def _listed(text: str, known: Iterable[str], option: str) -> tuple[str, ...]:
    """Names with commas between them; raises :class:`typer.BadParameter` for one that is not ``known``."""
    names = tuple(name for name in text.split(",") if name)
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(known)}", param_hint=option)
    return names


def _variants(device: str, type: str | None, precision: str | None) -> tuple[Variant, ...]:
    usual = BY_DEFAULT.get(device, ON_ACCELERATORS)
    if type is None and precision is None:
        return usual
    types = {"exact": "f32", "fast": "bf16"}
    return (Variant(type or types[precision or "exact"], precision or usual[0].precision),)


def setup_options(setup: Setup) -> dict[str, Any]:
    return {
        "device": setup.device, "size": setup.size, "steps": setup.steps, "checkpoint": setup.checkpoint_size,
        "variants": [str(variant) for variant in setup.variants], "families": setup.families._asdict(),
    }  # fmt: skip


def _facts(device: str) -> dict[str, Any]:
    """Where and when this was measured, and with what."""
    machine: dict[str, Any] = {
        "processor": processor(), "cores": os.cpu_count(), "memory": host_memory().total, "system": platform.platform(),
    }  # fmt: skip
    if device.startswith("CUDA"):
        import torch

        machine["accelerator"] = torch.cuda.get_device_name(int(device.removeprefix("CUDA")))
    versions = {"python": platform.python_version(), "sdrpc": __version__} | {name: version(name) for name in PACKAGES}
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


def _beside(row: Row) -> str:
    return "" if row.theirs is None else f", {row.against}: {_short(row.theirs)} {row.unit}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


if __name__ == "__main__":
    typer.run(main)
