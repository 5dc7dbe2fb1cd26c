"""A client that a test kills: ``python -m tests.support.victim PORT upload|compute`` prints when it is time to."""

from __future__ import annotations

import sys
import time

from tests.support.client import RawClient, busy

STEPS = ("upload", "compute")


def main(port: int, step: str) -> None:
    with RawClient(port) as client:
        if step == "upload":
            size = 8 << 20
            client.begin_set(client.record(client.buffer(size), (size // 4,)), size)
            client.send(bytes(size // 2))
        else:
            busy(client)
        print(client.name, flush=True)
        time.sleep(60)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
