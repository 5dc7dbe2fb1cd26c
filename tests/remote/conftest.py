"""What the tests of this folder share, because it takes long to make: checkpoints, captured graphs, two servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import sdrpc
from sdrpc.device import Device
from sdrpc.runtime.cache import Cache
from tests.support.pictures import Checkpoints
from tests.support.process import ServerProcess


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def cache(graphs: Path) -> Cache:
    return Cache(graphs)


@pytest.fixture(scope="session")
def ports() -> Iterator[list[int]]:
    """Of two servers in exact precision, which nobody ends."""
    with ExitStack() as stack:
        options = ("--precision", "exact", "--device", "CPU")
        yield [stack.enter_context(ServerProcess(*options)).port for _ in "ab"]


@pytest.fixture(scope="module")
def device(ports: list[int]) -> Iterator[Device]:
    """That of the first one."""
    found = sdrpc.devices(rpc=f"127.0.0.1:{ports[0]}")["RPC0"]
    yield found
    found.close()
