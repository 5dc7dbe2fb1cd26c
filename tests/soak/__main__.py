"""``python -m tests.soak MINUTES``: clients of all kinds at one server for that long, then 200 at once.

Whoever is wrongly served is printed at once, with what it was told and what the server said last. What is right, and
whether memory, file descriptors and threads are what they were before, is printed as a table; the exit status is 0 if
all of it is so.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.soak.clients import KINDS, Scene, come
from tests.soak.crowd import crowd
from tests.soak.record import Record, Wrong
from tests.soak.watch import quiet, usage
from tests.support.process import ServerProcess
from tools.make_checkpoint import tensors, write_safetensors

SAID = 12
"""Lines of the server's that are kept with a client that was wrongly served."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--at-once", type=int, default=8, help="clients at a time")
    parser.add_argument("--only", nargs="+", metavar="KIND", choices=[kind.__name__ for kind in KINDS],
                        help="clients of these kinds: %(choices)s")  # fmt: skip
    parser.add_argument("--pause", type=float, default=0.0, metavar="SECONDS",
                        help="between two clients, more or less: leaves the processor to others")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what comes of it there, from minute to minute")
    parser.add_argument("--clients", type=int, default=200, help="connected at once, at the end")
    parser.add_argument("--drawing", type=int, default=16, help="of which draw")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tiny.safetensors"
        write_safetensors(checkpoint, tensors("tiny"))
        return run(checkpoint, chosen)


def run(checkpoint: Path, chosen: argparse.Namespace) -> int:
    with Scene.opened(checkpoint, 3) as (scene, server):
        record = Record(quiet(server.process.pid))
        soak(scene, server, record, chosen)
        record.after = quiet(server.process.pid)
        print(f"{chosen.minutes:g} minutes, {chosen.at_once} clients at a time\n", *record.lines(), sep="\n")
        gathered = crowd(scene, chosen.clients, chosen.drawing)
        record.crowd = f"{chosen.clients} clients connected, {chosen.drawing} of them drawing: {gathered}"
        print(f"\n{record.crowd}")
        print(f"afterwards: {quiet(server.process.pid)}")
        if chosen.json:
            record.save(chosen.json)
        alive = server.process.poll() is None and "fault in this server" not in server.output
        print("the server lived, without a fault" if alive else server.output[-4000:])
        return 0 if not record.wrong and record.flat and gathered.right and alive else 1


def soak(scene: Scene, server: ServerProcess, record: Record, chosen: argparse.Namespace) -> None:
    """Let clients come for so long."""
    began = time.monotonic()
    until = began + 60 * chosen.minutes
    kinds = {kind: share for kind, share in KINDS.items() if chosen.only is None or kind.__name__ in chosen.only}
    lock = threading.Lock()

    def keep_coming() -> None:
        while time.monotonic() < until:
            kind, error = come(scene, kinds)
            with lock:
                record.came[kind] += 1
                if error:
                    record.wrong.append(Wrong(kind, time.monotonic() - began, error, server.lines[-SAID:]))
                    print(record.wrong[-1], flush=True)
            time.sleep(chosen.pause * random.uniform(0.5, 1.5))

    threads = [threading.Thread(target=keep_coming, daemon=True) for _ in range(chosen.at_once)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        minutes = len(record.most)
        now = usage(server.process.pid)
        with lock:
            record.note(now, time.monotonic() - began)
            if chosen.json and len(record.most) > minutes:
                record.save(chosen.json)
            if sys.stderr.isatty():
                print(f"\r{record.seconds:6.0f} s  {record.came.total()} clients, {len(record.wrong)} wrong, {now}",
                      end="", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
