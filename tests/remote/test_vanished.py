"""A machine that is gone without a word, and one that stands still: noticed in time, at both ends."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack

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
    """Found out by TCP, after ten seconds, at both ends: what is said is said of nothing else."""
    command = [*NAMESPACE, sys.executable, "-m", "tests.support.island", doing]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert "its machine does not answer any more while" in told["said"], told
    found = {"compute": "its client is gone", "upload": "its machine does not answer any more"}[doing]
    assert found in told["log"], told


def test_silence_of_a_server_that_says_when_it_is_at_work() -> None:
    """One that computes for long is not silent; one that stands still is, and who waits hears of it."""
    with Restartable("--precision", "exact", "-d", "CPU") as server, ExitStack() as stack:
        patient, impatient = (
            connect([f"127.0.0.1:{server.port}"], Timeouts(silent=silent))[0] for silent in (240.0, 8.0)
        )
        stack.callback(patient.close)
        stack.callback(impatient.close)
        silence: list[float] = []

        def heard(seconds: float) -> None:
            silence.append(seconds)
            if seconds > 3:
                server.go_on()

        with patient.watched(heard):
            computing = products(patient, 1024, 60)
            server.stop()
            computing()
            assert max(silence) > 3, "it slept, then went on"
        with impatient.watched(silence.append):
            silence.clear()
            server.stop()
            with pytest.raises(ConnectionLost, match="no answer in time while"):
                impatient.memory()
            assert max(silence) > 6
