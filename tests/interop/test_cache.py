"""Weights that are kept: ggml's client and our server, our client and ggml's server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sdrpc.client import connect
from sdrpc.device import Content
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.ggml.weight import Origin, Whole
from sdrpc.server import Cache, CacheService, Server
from tests.interop.conftest import NativeClient, NativeServer
from tests.interop.tap import Tap

pytestmark = pytest.mark.interop

SCENARIO = "a-large-weight-is-offered-by-hash"
SIZE = 12 << 20


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def devices() -> Iterator[list[LocalDevice]]:
    made = [LocalDevice(f"CPU{i}", torch.device("cpu"), EXACT, threads=1) for i in range(2)]
    yield made
    for device in made:
        device.close()


def sent(native_client: NativeClient, devices: list[LocalDevice], folder: Path) -> tuple[int, int]:
    """Run the scenario through a new server with the cache in ``folder``: questions, and bytes of tensors sent."""
    cache_service = CacheService(Cache(folder, 1 << 30))
    with Server(devices, cache_service=cache_service) as server, Tap(server.endpoint) as tap:
        assert native_client.run(SCENARIO, tap.endpoint).error == 0
    cache_service.close()
    return tap.commands["SET_TENSOR_HASH"], tap.bytes["SET_TENSOR"]


def test_a_native_client_sends_weights_once(
    native_client: NativeClient, devices: list[LocalDevice], tmp_path: Path
) -> None:
    questions, first = sent(native_client, devices, tmp_path / "weights")
    assert questions == 3
    assert first > 2 * 10 << 20
    for _ in range(2):
        assert sent(native_client, devices, tmp_path / "weights") == (3, 0)


def test_a_native_server_is_sent_weights_once(tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(SIZE)
    read: list[int] = []

    def reading() -> bytes:
        read.append(1)
        return data

    contents = [Content(0, SIZE, Whole(reading), Origin("model", "0")), Content(SIZE, 64, Whole(lambda: bytes(64)))]
    folder = tmp_path / "native"
    folder.mkdir()
    server = NativeServer(1, cache=folder)
    try:
        for expected in (SIZE, 0, 0):
            with Tap(server.endpoint) as tap:
                (device,) = connect([tap.endpoint])
                buffer = device.allocate(SIZE + 64)
                device.upload(buffer, contents, lambda _: None)
                assert bytes(device.read(buffer, 0, SIZE)) == data
                device.close()
            assert expected <= tap.bytes["SET_TENSOR"] < expected + 1000
        assert len(list(folder.iterdir())) == len(read) == 1
    finally:
        server.kill()
