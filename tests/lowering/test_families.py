"""Every model family offloaded: to a device of this process, through an rpc-server, and as native servers get it.

The calls differ in size; the first goes to our own devices, the others to the interpreter that stands for native
servers (:data:`sdrpc.targets.PORTABLE`).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sdrpc
from sdrpc.device import Device
from sdrpc.errors import CaptureError
from sdrpc.lowering.structure import take_apart
from sdrpc.targets import PORTABLE
from tests.lowering.compare import error
from tests.lowering.devices import ReferenceDevice
from tests.lowering.families import FAMILIES, Call
from tests.support.process import ServerProcess

TOLERANCE = 1e-5
"""Relative error (L2) of each tensor in a result, in float32."""

REFUSED = {
    # a mixture of experts counts on the CPU how many tokens each expert gets, and loops over them
    "hidream": "numbers of .* decide what is computed",
}
"""Families that can't be captured, and why."""


@pytest.fixture(scope="module")
def local() -> Iterator[Device]:
    device = sdrpc.devices(precision="exact", threads=1)["CPU"]
    yield device
    device.close()


@pytest.fixture(scope="module")
def remote() -> Iterator[Device]:
    with ServerProcess("--precision", "exact", "--device", "CPU") as server:
        device = sdrpc.devices(rpc=f"127.0.0.1:{server.port}")["RPC0"]
        yield device
        device.close()


@torch.no_grad()
def worst(module: torch.nn.Module, offloaded: torch.nn.Module, calls: tuple[Call, ...]) -> float:
    """The largest relative error of a tensor in the results of ``calls``, whose structure must be the same."""
    found = []
    for method, args, kwargs in calls:
        mine, theirs = (take_apart(getattr(m, method)(*args, **kwargs)) for m in (offloaded, module))
        assert mine.description == theirs.description
        for a, b in zip(mine.tensors, theirs.tensors, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            found.append(error(a.float().numpy(), b.float().numpy()))
    return max(found)


@pytest.mark.filterwarnings("ignore")  # of diffusers and transformers about their own classes
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_equals_its_module_in_process(name: str, local: Device, remote: Device) -> None:
    module, calls = FAMILIES[name]()
    if name in REFUSED:
        with pytest.raises(CaptureError, match=REFUSED[name]), torch.no_grad():
            sdrpc.offload(module, local)(*calls[0].args, **calls[0].kwargs)
        return
    for device, chosen in ((local, calls[:1]), (remote, calls[:1]), (ReferenceDevice(PORTABLE), calls[1:])):
        assert worst(module, sdrpc.offload(module, device), chosen) <= TOLERANCE, device.name
