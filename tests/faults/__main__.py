"""``python -m tests.faults``: every fault at every phase of a picture, with a key and without; prints a table.

A row whose picture is not the same, or that ends otherwise than it must, is printed at once; the exit status is 0 if
there is none."""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from sdrpc.errors import SdrpcError
from tests.faults.matrix import FAULTS, PHASES, ROWS, Row, Setting
from tools.make_checkpoint import tensors, write_safetensors

Outcome = tuple[str, float]
"""What was wrong, and the seconds that the picture took."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--sleep", type=float, default=30.0, metavar="SECONDS", help="how long a server stands still")
    parser.add_argument("--servers", type=int, default=3, help="at a time, with a key and as many without")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="these faults")
    chosen = parser.parse_args()
    rows = [row for row in ROWS if row.fault in chosen.only]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "tiny.safetensors"
        write_safetensors(checkpoint, tensors("tiny"))
        outcomes = run(rows, checkpoint, folder, chosen.sleep, chosen.servers)
    print(*table(outcomes), sep="\n")
    wrong = [row for row in rows if row not in outcomes or outcomes[row][0]]
    print(f"\n{len(rows)} pictures in {time.monotonic() - began:,.0f} s, {len(wrong)} of them not as they must be")
    return 1 if wrong else 0


def run(rows: list[Row], checkpoint: Path, folder: Path, sleep: float, servers: int) -> dict[Row, Outcome]:
    """Draw all rows, on so many servers of each kind at a time."""
    outcomes: dict[Row, Outcome] = {}
    waiting: dict[bool, queue.SimpleQueue[Row]] = {key: queue.SimpleQueue() for key in (False, True)}
    for row in rows:
        waiting[row.key].put(row)

    def work(key: bool, number: int) -> None:
        with Setting(checkpoint, folder / f"{key}{number}", key, sleep) as setting:
            while not waiting[key].empty():
                try:
                    row = waiting[key].get_nowait()
                except queue.Empty:
                    return
                outcomes[row] = outcome(setting, row)
                if outcomes[row][0]:
                    print(f"{row}: {outcomes[row][0]}", flush=True)

    threads = [threading.Thread(target=work, args=(key, number)) for key in waiting for number in range(servers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def outcome(setting: Setting, row: Row) -> Outcome:
    began = time.monotonic()
    try:
        wrong = setting.goes_wrong(row)
    except SdrpcError as error:
        wrong = str(error)
    return wrong, time.monotonic() - began


def table(outcomes: dict[Row, Outcome]) -> list[str]:
    """A line for each phase: the seconds that its pictures took, without a key / with one."""
    faults = [fault for fault in FAULTS if any(row.fault == fault for row in outcomes)]
    cells = {phase: [_cell(outcomes, fault, phase) for fault in faults] for phase in PHASES}
    typical = [f"{median(s for row, (_, s) in outcomes.items() if row.fault == fault):.1f}" for fault in faults]
    return [
        f"| seconds, without / with a key | {' | '.join(faults)} |",
        "|---" * (len(faults) + 1) + "|",
        *(f"| {phase} | {' | '.join(row)} |" for phase, row in cells.items()),
        f"| median | {' | '.join(typical)} |",
    ]


def _cell(outcomes: dict[Row, Outcome], fault: str, phase: str) -> str:
    parts = []
    for key in (False, True):
        wrong, seconds = outcomes.get(Row(fault, phase, key), ("", None))
        parts.append("**wrong**" if wrong else "" if seconds is None else f"{seconds:.1f}")
    return " / ".join(part for part in parts if part)


if __name__ == "__main__":
    sys.exit(main())
