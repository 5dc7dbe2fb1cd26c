"""One device for each precision, shared by the tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sdrpc.engine import LocalDevice
from sdrpc.engine.precision import choose


def _device(precision: str) -> LocalDevice:
    cpu = torch.device("cpu")
    return LocalDevice("CPU", cpu, choose(precision, cpu), threads=2)


@pytest.fixture(scope="session")
def exact() -> Iterator[LocalDevice]:
    device = _device("exact")
    yield device
    device.close()


@pytest.fixture(scope="session")
def fast() -> Iterator[LocalDevice]:
    device = _device("fast")
    yield device
    device.close()


@pytest.fixture(scope="session", params=["exact", "fast"])
def device(request: pytest.FixtureRequest) -> LocalDevice:
    found: LocalDevice = request.getfixturevalue(request.param)
    return found
