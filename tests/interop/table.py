"""docs/operations.md: which operations and types our server computes as ggml does, counted by the cases that passed.

python -m tests.interop.table     # computes all cases and writes the file; `make interop` compares it with a run
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.ggml.dialect import dialects, newest
from sdrpc.ggml.ops import OPS
from sdrpc.ggml.types import OF_GGML, TYPES
from sdrpc.server import Server
from tests.interop.cases import BOUNDS, CASES, OPERATIONS
from tests.interop.worker import Outcome, Signature

PATH = Path(__file__).parents[2] / "docs" / "operations.md"

FLOATS = ("F32", "F16", "BF16")
BLOCKS = tuple(name for name in TYPES if name in OF_GGML and not TYPES[name].plain)
READ = {"CPY": 1, "SET_ROWS": 2}
"""How many sources are read where the last one is what is written to."""

HEAD = """\
# Operations and types

Written by `make operations`; `make interop` fails where it differs from a run.

ggml's own RPC client (protocol {protocol}) had our server compute {total} cases in exact precision, each also computed
by ggml's CPU backend: {operations} operations, over shapes, types, views, broadcasts and parameters. A case passes when
the mean square error over the mean square is within its bound: {bounds}.
[tests/interop/cases/base.py](../tests/interop/cases/base.py) tells what limits each.

Not computed: {refused}. Each ends its connection with a line in the log.

{others}, and MUL_MAT of weights in I8 with scales that goes with it, only stable-diffusion.cpp's own ggml has (protocol
5.0.1). No such peer was there: they are compared with the interpreter of the tests alone.

## Operations

Cases that passed, and in how many of them a source or the result has a type.
"""
BLOCKS_HEAD = """
## Types of blocks

Cases that passed by the type of a source; after an arrow, of the result.
"""


def of_others() -> list[str]:
    """Operations that we compute and that the newest protocol does not have."""
    return sorted(set(OPS) - set(newest().ops) - {"NONE"})


def passed(name: str, outcome: Outcome) -> bool:
    return outcome.error <= BOUNDS[CASES[name].bound]


def rows(outcomes: Mapping[str, Outcome]) -> tuple[list[str], list[str]]:
    """The lines of both tables for cases of whole operations, by their names."""
    found: dict[str, list[Signature]] = defaultdict(list)
    for name, outcome in outcomes.items():
        if outcome.signature is not None and passed(name, outcome):
            found[outcome.signature.op].append(outcome.signature)
    operations, blocks = [], []
    for op, signatures in sorted(found.items()):
        types = [{*s.sources, s.result} for s in signatures]
        counts = [sum(wanted in t for t in types) for wanted in FLOATS]
        counts.append(sum(any(name.startswith("I") and name[1:].isdigit() for name in t) for t in types))
        counts.append(sum(not t.isdisjoint(BLOCKS) for t in types))
        operations.append(_line(op, len(signatures), *counts))
        read = Counter(t for s in signatures for t in set(s.sources[: READ.get(op)]))
        written = Counter(s.result for s in signatures)
        for label, count in ((op, read), (f"→ {op}", written)):
            if not count.keys().isdisjoint(BLOCKS):
                blocks.append(_line(label, *(count[block] for block in BLOCKS)))
    return operations, blocks


def _line(label: str, *counts: int) -> str:
    return f"| {label} | {' | '.join(str(n) if n else '' for n in counts)} |"


def document(outcomes: Mapping[str, Outcome]) -> str:
    operations, blocks = rows(outcomes)
    known = {op for dialect in dialects().values() for op in dialect.ops}
    head = HEAD.format(
        total=f"{sum(passed(name, outcome) for name, outcome in outcomes.items()):,}",
        operations=len(operations),
        protocol=newest().version,
        bounds=", ".join(f"{bound:g} ({name})" for name, bound in BOUNDS.items()),
        refused=", ".join(sorted(known - set(OPS))),
        others=", ".join(of_others()),
    )
    return "\n".join((
        head, *_header("operation", "cases", *FLOATS, "integers", "blocks"), *operations,
        BLOCKS_HEAD, *_header("operation", *BLOCKS), *blocks, "",
    ))  # fmt: skip


def _header(*names: str) -> Sequence[str]:
    return f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"


def main() -> None:
    from tests.interop.conftest import NativeClient  # pytest's own import of it comes first where pytest runs

    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    with tempfile.TemporaryDirectory() as folder, Server([device]) as server:
        client = NativeClient(Path(folder) / "client.log")
        outcomes: dict[str, Outcome] = {}
        for op, names in OPERATIONS.items():
            outcomes.update(zip(names, client.run_all(names, server.endpoint), strict=True))
            print(f"{op}: {sum(passed(name, outcomes[name]) for name in names)} of {len(names)}", flush=True)
        client.close()
    device.close()
    PATH.write_text(document(outcomes))
    wrong = [name for name, outcome in outcomes.items() if not passed(name, outcome)]
    if wrong:
        sys.exit(f"{len(wrong)} cases failed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
