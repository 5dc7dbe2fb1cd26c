"""Bytes through TLS: all of them, in any order of waiting, and it is noticed that they move."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from sdrpc.client import Endpoint
from sdrpc.client.connection import _send_all
from sdrpc.client.secure import secured
from sdrpc.server.identity import load_identity

ANYWHERE = Endpoint("127.0.0.1", 1)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """A client's and a server's end."""
    ours, theirs = socket.socketpair()
    context = load_identity(tmp_path / "server.pem").context
    ends: list[ssl.SSLSocket] = []
    thread = threading.Thread(target=lambda: ends.append(context.wrap_socket(theirs, server_side=True)))
    thread.start()
    client = secured(ANYWHERE, ours)
    thread.join()
    return client, ends[0]


def test_a_slow_reader_is_not_a_silent_one(pair: tuple[ssl.SSLSocket, ssl.SSLSocket]) -> None:
    """Somebody who takes a while for many megabytes is not taken for gone, as long as some of them move."""
    client, server = pair
    sent = bytes(range(256)) * (48 << 10)
    got = bytearray()

    def read() -> None:
        while len(got) < len(sent):
            got.extend(server.recv(1 << 14))
            time.sleep(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    silences: list[float] = []
    client.settimeout(0.02)
    _send_all(client, [b"head", sent[:100], memoryview(sent)[100:-4]], silences.append)
    reader.join()
    assert bytes(got) == b"head" + sent[:-4]
    assert any(later < earlier for earlier, later in pairwise(silences)), "when bytes moved, the silence was over"
    for end in pair:
        end.close()
