"""``make fuzz MINUTES=10``: inputs of everybody's making for everything that reads them, for as long as you like.

``python -m tests.fuzz --only operations --device CUDA0`` tries single operations on a GPU.

What is found is printed with the seed that makes it again, and kept in ``fuzz-found/``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from sdrpc.device import PRECISIONS
from sdrpc.engine import discovery
from tests.fuzz.hunts import OPERATIONS, SOCKETS, attempt
from tests.fuzz.parsers import PARSERS


def main() -> int:
    options = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    options.add_argument(
        "--only", metavar="NAME", help="; ".join(parser.name for parser in PARSERS) + f"; {SOCKETS}; {OPERATIONS}"
    )
    options.add_argument(
        "--device", default="CPU", choices=[each.name for each in discovery.found()], help="of operations: %(choices)s"
    )
    options.add_argument("--precision", default="exact", choices=PRECISIONS, help="of operations: %(choices)s")
    options.add_argument("--processes", type=int, default=1, help="that try at the same time (default: %(default)s)")
    chosen = options.parse_args()
    weights = {SOCKETS: 2, OPERATIONS: 2, **{parser.name: 1 for parser in PARSERS}}  # the long ones first
    weights = {name: weight for name, weight in weights.items() if chosen.only in (None, name)}
    share = 60 * chosen.minutes * min(chosen.processes, len(weights)) / sum(weights.values())
    print(f"seed {chosen.seed}")
    found = 0
    total = 0
    with ProcessPoolExecutor(chosen.processes, multiprocessing.get_context("spawn")) as pool:
        work = partial(attempt, seed=chosen.seed, device=chosen.device, precision=chosen.precision)
        tried = pool.map(work, weights, [share * weight for weight in weights.values()])
        for name, (count, faults, seconds) in zip(weights, tried, strict=True):
            found, total = found + faults, total + count
            print(f"{name:16} {count:12,} inputs {count / seconds:10,.0f} a second {faults} faults", flush=True)
    print(f"{total:,} inputs, {found} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
