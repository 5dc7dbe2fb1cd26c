"""``python -m tests.soak MINUTES``: clients of all kinds at one server for that long, then 200 at once.

What is right, and whether memory, file descriptors and threads are what they were before, is printed as a table; the
exit status is 0 if all of it is so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from sdrpc.ggml.dialect import newest
from sdrpc.runtime.cache import Cache
from tests.soak.clients import Scene, come
from tests.soak.crowd import crowd
from tests.soak.watch import Usage, quiet, usage
from tests.support.process import ServerProcess
from tools.make_checkpoint import tensors, write_safetensors

OPTIONS = ("--precision", "exact", "-d", "CPU", "--protocol", newest().version)
"""Raw clients speak one version, and take what they are offered for that."""
AT_ONCE = 8
WARM_SECONDS = 60.0
"""After that much of the time memory is compared with what it is at the end: what is kept for the next client is there
by then."""
GROWTH_MIB = 64
"""Memory that allocators may hold more at the end than in the beginning."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--clients", type=int, default=200, help="connected at once, at the end")
    parser.add_argument("--drawing", type=int, default=16, help="of which draw")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ServerProcess(*OPTIONS) as server:
        checkpoint = Path(folder) / "tiny.safetensors"
        write_safetensors(checkpoint, tensors("tiny"))
        scene = Scene(server.port, checkpoint, Cache(Path(folder) / "graphs"))
        for seed in range(3):
            scene.right[seed] = scene.draw(scene.endpoint, seed)[0].image
        soaked = soak(scene, server.process.pid, chosen.minutes * 60)
        gathered = crowd(scene, chosen.clients, chosen.drawing)
        print(f"\n{chosen.clients} clients connected, {chosen.drawing} of them drawing: {gathered}")
        after = quiet(server.process.pid)
        print(f"afterwards: {after}")
        alive = server.process.poll() is None and "fault in this server" not in server.output
        print("the server lived, without a fault" if alive else server.output[-4000:])
        return 0 if soaked and gathered.right and alive else 1


def soak(scene: Scene, pid: int, seconds: float) -> bool:
    """Let clients come for so long; whether all was well."""
    until, came, wrong = time.monotonic() + seconds, Counter[str](), list[str]()
    lock = threading.Lock()

    def keep_coming() -> None:
        while time.monotonic() < until:
            kind, what = come(scene)
            with lock:
                came[kind] += 1
                if what:
                    wrong.append(f"{kind}: {' '.join(what.split())[:300]}")

    threads = [threading.Thread(target=keep_coming, daemon=True) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    warm: Usage | None = None
    highest = usage(pid)
    began = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        now = usage(pid)
        highest = highest.max(now)
        if warm is None and time.monotonic() - began > min(WARM_SECONDS, seconds / 4):
            warm = highest
        if sys.stderr.isatty():
            print(f"\r{time.monotonic() - began:6.0f} s  {came.total()} clients, {len(wrong)} wrong, {now}", end="",
                  file=sys.stderr)  # fmt: skip
    after = quiet(pid)
    print(f"{seconds / 60:g} minutes, {AT_ONCE} clients at a time\n")
    print("| clients | came |\n|---|---|")
    print(*(f"| {kind.replace('_', ' ')} | {count:,} |" for kind, count in came.most_common()), sep="\n")
    print(f"| **together** | {came.total():,}, {len(wrong)} of them wrongly served |\n")
    print("| server | memory, MiB | file descriptors | threads |\n|---|---|---|---|")
    assert warm is not None
    for name, row in (("most, in the beginning", warm), ("most", highest), ("with nobody there, at the end", after)):
        print(f"| {name} | {row.memory:,} | {row.files} | {row.threads} |")
    print(*(f"{count} x {what}" for what, count in Counter(wrong).most_common(20)), sep="\n")
    return not wrong and highest.memory <= warm.memory + 4 * GROWTH_MIB and after.files <= warm.files


if __name__ == "__main__":
    sys.exit(main())
