"""``python -m tests.support.island upload|compute``: a client and its server in a network that vanishes.

To be run in a network namespace (``unshare -rn``). Prints, as JSON, what the client was told, and what the server
logged."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable

from sdrpc.client import RemoteDevice, connect
from sdrpc.errors import SdrpcError
from tests.server.conftest import eventually
from tests.support.process import ServerProcess
from tests.support.products import endless


def main(doing: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with ServerProcess("-v", "-d", "CPU") as server:
        (device,) = connect([f"127.0.0.1:{server.port}"])
        result: dict[str, object] = {}
        begun = threading.Event()
        worker = threading.Thread(target=lambda: result.update(work(device, doing, begun)))
        worker.start()
        assert begun.wait(240)
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
        worker.join()
        eventually(lambda: server.output.count("sdrpc.server.handler") > 1)
        result["log"] = server.lines[-1]
        print(json.dumps(result))


def work(device: RemoteDevice, doing: str, begun: threading.Event) -> dict[str, object]:
    """Upload, or wait for a computation, until that fails."""
    try:
        if doing == "upload":
            buffer = device.allocate(1 << 20)
            while True:
                device.write(buffer, 0, bytes(1 << 20))
                begun.set()
        computing = endless(device)
        with device.watched(at_work(begun)):
            computing()
    except SdrpcError as error:
        return {"said": f"{type(error).__name__}: {error}"}
    return {"said": "nothing"}


def at_work(begun: threading.Event) -> Callable[[float], None]:
    """Set ``begun`` once the silence is shorter than it was: the server said something while it computed."""
    last = 0.0

    def heard(silent: float) -> None:
        nonlocal last
        if silent < last:
            begun.set()
        last = silent

    return heard


if __name__ == "__main__":
    main(sys.argv[1])
