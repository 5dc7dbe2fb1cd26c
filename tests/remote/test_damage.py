"""Bytes that change on their way: where a key protects the connection, that is noticed, and the picture is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from sdrpc.client import Keychain, connect
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.runtime.cache import Cache
from sdrpc.server import Door, Keys, Policy, Server
from sdrpc.server.key_ring import KeyRing
from tests.support.trouble import Damage

REQUEST = Request("a cat", width=64, height=64, steps=2, sampling_method="euler_a")
UP, DOWN = True, False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def keychain(folder: Path) -> Keychain:
    return Keychain([(None, KeyRing(folder / "keys.json").add("laptop").key)], folder / "client.json")


@pytest.fixture(scope="module")
def server(folder: Path, keychain: Keychain) -> Iterator[Server]:
    door = Door(Policy(local=False), Keys(KeyRing(folder / "keys.json"), folder / "server.pem"))
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    with Server([device], door=door) as server:
        yield server
    device.close()


def draw(endpoint: str, keychain: Keychain, tiny: Path, folder: Path) -> np.ndarray:
    (device,) = connect([endpoint], keychain=keychain)
    with closing(device), Session.open(tiny, device, Cache(folder / "graphs")) as session:
        (picture,) = session.generate(REQUEST)
        return picture.image


@pytest.fixture(scope="module")
def undisturbed(server: Server, keychain: Keychain, tiny: Path, folder: Path) -> np.ndarray:
    return draw(server.endpoint, keychain, tiny, folder)


@pytest.mark.parametrize(
    ("at", "way"), [(1 << 20, UP), (10 << 20, UP), (5_000, DOWN), (60_000, DOWN)], ids=lambda value: str(value)
)
def test_a_bit_that_is_turned_over(
    at: int, way: bool, server: Server, keychain: Keychain, undisturbed: np.ndarray, tiny: Path, folder: Path
) -> None:
    """In weights, and in what comes back."""
    with Damage(server.port, at, way) as damage:
        picture = draw(damage.endpoint, keychain, tiny, folder)
    assert damage.left < 0, "it was there"
    assert damage.connections == 2
    np.testing.assert_array_equal(picture, undisturbed)
