"""`make steady`: the suite several times in a row on a busy machine; which tests failed, and how often.

Each of the machine's first two cores has a process beside the tests that never waits for anything. A test that fails
once in ten times fails for somebody every day: it is a fault, of the test or of what it tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

BUSY = 2
"""Processes beside the tests."""

SUITE = (
    sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "not interop and not parity",
    "--ignore", "tests/interop", "--ignore", "tests/parity",
)  # fmt: skip
"""What `make test` runs, but that nothing is run once more."""


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


def failures(output: str) -> list[str]:
    """The tests that a run of pytest reports as failed or broken."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)


def main(words: list[str]) -> int:
    """Run the suite as often as the first of ``words`` says, with the rest as further options of pytest; 0 where
    nothing failed."""
    rounds, counts, ended = int(words[0]), Counter[str](), []
    with busy():
        for number in range(1, rounds + 1):
            done = subprocess.run(
                [*SUITE, *words[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            found, last = failures(done.stdout), (done.stdout.strip().splitlines() or ["nothing was said"])[-1]
            print(f"round {number} of {rounds}: {last}", *found, sep="\n    ", flush=True)
            if done.returncode and not found:
                print(done.stdout)
            counts.update(set(found))
            ended.append(done.returncode)
    for test, times in counts.most_common():
        print(f"{times} of {rounds}: {test}")
    print(f"{ended.count(0)} of {rounds} rounds passed")
    return int(any(ended) or bool(counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
