"""A machine that is gone without a word, and one that stands still: noticed in time, at both ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from sdrpc.client import Timeouts, connect
from sdrpc.errors import ConnectionLost
from tests.support.products import products
from tests.support.trouble import Restartable

NAMESPACE = ("unshare", "--user", "--map-root-user", "--net")


def possible() -> bool:
    """Whether this user may have a network of its own, and take it down."""
    try:
        return not subprocess.run([*NAMESPACE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode
    except OSError:
        return False


@pytest.mark.skipif(not possible(), reason="needs unshare, ip, and user namespaces")
@pytest.mark.parametrize("doing", ["compute", "upload"])
def test_a_network_that_vanishes(doing: str) -> None:
    """After ten seconds, far before anything else would end it (60 seconds without beats, 30 within a message)."""
    command = [*NAMESPACE, sys.executable, "-m", "tests.support.island", doing]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert "its machine does not answer any more while" in told["said"], told
    assert told["client"] < 25
    assert "held at most" in told["log"] or "disconnected" in told["log"]
    assert told["server"] < 25


def test_silence_of_a_server_that_says_when_it_is_at_work() -> None:
    """One that computes for long is not silent; one that stands still is, and who waits hears of it."""
    with Restartable("--precision", "exact", "-d", "CPU") as server:
        (device,) = connect([f"127.0.0.1:{server.port}"], Timeouts(silent=8.0))
        silence: list[float] = []
        with device.watched(silence.append):
            computing = products(device, 1024, 60)
            server.sleep(4.0)
            computing()
            assert 3 < max(silence) < 8, "it slept, then went on"
            silence.clear()
            server.server.process.send_signal(signal.SIGSTOP)
            with pytest.raises(ConnectionLost, match="no answer in time while"):
                device.memory()
            assert max(silence) > 6
        device.close()
