"""`make steady`: the suite several times in a row on a busy machine; which tests failed, and how often.

Each of the machine's first two cores has a process beside the tests that never waits for anything. A test that fails
once in ten times fails for somebody every day: it is a fault, of the test or of what it tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BUSY = 2
"""Processes beside the tests."""

SUITE = (sys.executable, "-m", "pytest", "@tests/suite.txt", "-q")
"""What `make test` runs, but that nothing is run once more."""

PRINTED = Path("build", "steady")
"""The folder for what pytest prints, a file for each round."""

LEAVING_SECONDS = 60.0
"""After Ctrl-C, which reaches pytest as well, it may take so long to say what has failed."""

INTERRUPTED = 130
"""Exit status, as shells have it."""


@contextmanager
def busy(count: int = BUSY) -> Iterator[None]:
    """So many processes that compute until this is over."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(options: Sequence[str], printed: Path) -> int:
    """The suite once, with further ``options`` of pytest, of which the last of a kind holds: its exit status. What it
    prints is in ``printed`` as it comes."""
    with printed.open("wb") as file, subprocess.Popen([*SUITE, *options], stdout=file, stderr=file) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(LEAVING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            return INTERRUPTED


def failures(output: str) -> list[str]:
    """The tests that a run of pytest reports as failed or broken."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)


def main(words: Sequence[str]) -> int:
    """Run the suite as often as the first of ``words`` says, with the rest as further options of pytest; 0 where
    nothing failed."""
    rounds, counts, ended = int(words[0]), Counter[str](), list[int]()
    PRINTED.mkdir(parents=True, exist_ok=True)
    with busy():
        while len(ended) < rounds and INTERRUPTED not in ended:
            printed = PRINTED / f"round-{len(ended) + 1}.txt"
            began = time.monotonic()
            ended.append(run(words[1:], printed))
            output = printed.read_text(encoding="utf-8", errors="replace")
            found, last = failures(output), (output.strip().splitlines() or ["nothing was said"])[-1]
            took = time.monotonic() - began
            print(f"round {len(ended)} of {rounds}, {took:.0f} s: {last}", *found, sep="\n    ", flush=True)
            if ended[-1]:
                print(f"    in {printed}", flush=True)
            counts.update(set(found))
    for test, times in counts.most_common():
        print(f"{times} of {len(ended)}: {test}")
    print(f"{ended.count(0)} of {rounds} rounds passed")
    return INTERRUPTED if INTERRUPTED in ended else int(any(ended) or bool(counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
