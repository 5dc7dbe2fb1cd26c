"""One device for each precision, shared by the tests of the engine.

``SDRPC_TEST_DEVICE=CUDA0 pytest tests/engine`` tests another device than the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sdrpc.engine import LocalDevice, devices


def open_device(precision: str) -> LocalDevice:
    """The device under test."""
    wanted = os.environ.get("SDRPC_TEST_DEVICE", "CPU")
    found = {device.name: device for device in devices(precision, threads=2)}
    chosen = found.pop(wanted)
    for other in found.values():
        other.close()
    return chosen


@pytest.fixture(scope="session")
def exact() -> Iterator[LocalDevice]:
    device = open_device("exact")
    yield device
    device.close()


@pytest.fixture(scope="session")
def fast() -> Iterator[LocalDevice]:
    device = open_device("fast")
    yield device
    device.close()


@pytest.fixture(scope="session", params=["exact", "fast"])
def device(request: pytest.FixtureRequest) -> LocalDevice:
    found: LocalDevice = request.getfixturevalue(request.param)
    return found
