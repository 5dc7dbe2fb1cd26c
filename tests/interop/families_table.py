"""docs/families.md: which families are drawn from which forms of file, and how near to diffusers' own pipeline.

    make families                                          # draws all of it (some minutes) and writes the page
    python -m tests.interop.families_table z-image sdxl    # draws these anew, and keeps the page's other rows

Each number is a picture that was drawn: components on two real servers, compared with diffusers in process. The same
cases are tests: tests/remote/test_families.py, tests/interop/test_families.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import sdrpc
from sdrpc.device import Device
from tests.support.pictures import (
    BOUNDS,
    CASES,
    FAMILIES,
    FORMAT_CASES,
    FORMS,
    HEIGHT,
    NATIVE_CASES,
    NUMBERS,
    STEPS,
    WIDTH,
    Case,
    Checkpoints,
    distance,
)
from tests.support.process import ServerProcess

PATH = Path(__file__).parents[2] / "docs" / "families.md"

COLUMNS = {"exact": "exact", "fast": "fast", "native": "ggml's rpc-server"}

HEAD = """\
# Families

Which families sdrpc draws with, from which files, and how far its pictures are from those of diffusers' own pipelines:
peak signal to noise ratio in dB, the higher the nearer. Every number is a picture that `make families` drew: a small
random checkpoint in the original names, written from diffusers' own classes, drawn with its components on two devices
of real servers, and by diffusers in one process with the same weights, noise and Euler's method ({width}×{height},
{steps} steps). The same cases are tests (`make test`, `make interop`), which ask for at least {bounds}.

*exact* and *fast* are the precisions of sdrpc's own server on a CPU; the last column is llama.cpp's server, whose CPU
backend rounds what it multiplies with. 60 dB is as near as a picture of 8 bits can be to diffusers' numbers, which are
compared before they are rounded.
"""

NUMBERS_HEAD = """
## Number formats

What else files have numbers in. *exact* and *fast* as above: diffusers' pipeline draws with the dequantized weights.
Types that ggml does not have are types of our own: our servers hold them as they are, and make floats of them on the
device. Another server gets F16 instead (of MXFP8 BF16), and sd-cli says what that costs. Where a GPU multiplies fp8
with scales, MXFP8 or ConvRot's integers as they are, *fast* does that, and is some 38 dB away
([how](architecture.md#precision)). ConvRot's groups of other sizes than 256, integers whose scales F16 does not hold,
and rows that are no whole blocks are F16 or BF16 everywhere.
"""

Distances = Mapping[tuple[Case, str], float]
Row = tuple[str, str, str]


def document(distances: Distances, before: Mapping[Row, str]) -> str:
    """The page for the measured distances; rows of cases that were not measured are those of ``before``."""
    bounds = ", ".join(f"{BOUNDS[name]:g} dB ({label})" for name, label in COLUMNS.items())
    lines = [HEAD.format(width=WIDTH, height=HEIGHT, steps=STEPS, bounds=bounds)]
    lines += [f"| family | form | matrices | {' | '.join(COLUMNS.values())} |", "|---|---|---|---:|---:|---:|"]
    for case in CASES:
        row = FAMILIES[case.family], FORMS[case.form], case.type
        if row in before and (case, "exact") not in distances:
            lines.append(before[row])
            continue
        cells = (distances.get((case, name)) for name in COLUMNS)
        shown = " | ".join("" if cell is None else f"{cell:.0f}" for cell in cells)
        lines.append(f"| {' | '.join(row)} | {shown} |")
    return "\n".join([*lines, *_numbers(distances, before), ""])


def _numbers(distances: Distances, before: Mapping[Row, str]) -> list[str]:
    lines = [
        NUMBERS_HEAD,
        "| matrices | family | form | held as | bits | exact | fast |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for case in FORMAT_CASES:
        title, held, bits = NUMBERS[case.type]
        row = title, FAMILIES[case.family], FORMS[case.form]
        if row in before and (case, "exact") not in distances:
            lines.append(before[row])
            continue
        cells = *row, held, bits or "", *(f"{distances[case, name]:.0f}" for name in ("exact", "fast"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def rows(page: str) -> dict[Row, str]:
    """The lines of the page's table, by family, form and type."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return {(cells[0][2:], cells[1], cells[2]): line for line in lines if len(cells := line.split(" | ")) > 3}


def measured(folder: Path, cases: Sequence[Case]) -> Distances:
    """``cases``, drawn; says how far it is."""
    from tests.interop.conftest import NativeServer  # pytest's own import of it comes first where pytest runs

    checkpoints, found = Checkpoints(folder), {}
    with ExitStack() as stack:
        devices: dict[str, list[Device]] = {}
        for precision in ("exact", "fast"):
            servers = [stack.enter_context(ServerProcess("--precision", precision, "--device", "CPU")) for _ in "ab"]
            devices[precision] = _opened(stack, [f"127.0.0.1:{server.port}" for server in servers])
        native = NativeServer(devices=2)
        stack.callback(native.kill)
        devices["native"] = _opened(stack, [native.endpoint])
        for case in cases:
            for name in COLUMNS:
                if name != "native" or case in NATIVE_CASES:
                    found[case, name] = distance(checkpoints, case, devices[name], folder / "graphs")
                    print(f"{case}, {name}: {found[case, name]:.1f} dB", file=sys.stderr, flush=True)
    return found


def _opened(stack: ExitStack, endpoints: list[str]) -> list[Device]:
    opened = sdrpc.devices(rpc=endpoints)
    for device in opened.values():
        stack.callback(device.close)
    return [opened["RPC0"], opened["RPC1"]]


def main(families: Sequence[str]) -> None:
    cases = [case for case in (*CASES, *FORMAT_CASES) if not families or case.family in families]
    with tempfile.TemporaryDirectory() as folder:
        distances = measured(Path(folder), cases)
    before = rows(PATH.read_text(encoding="utf-8")) if families else {}
    PATH.write_text(document(distances, before), encoding="utf-8")
    short = [f"{case} ({name})" for (case, name), distance in distances.items() if distance < BOUNDS[name]]
    if short:
        sys.exit(f"too far from diffusers: {', '.join(short)}")


if __name__ == "__main__":
    main(sys.argv[1:])
