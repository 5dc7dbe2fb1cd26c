"""Parts of Stable Diffusion 1.x through real rpc-servers equal the modules in process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

import sdrpc
from sdrpc.device import Device
from sdrpc.lowering.capture import capture
from tests.lowering import models
from tests.lowering.compare import TOLERANCE, error, errors, numbers
from tests.lowering.test_parts import PARTS, example
from tests.support.process import ServerProcess


@pytest.fixture(scope="module")
def remote() -> Iterator[dict[str, Device]]:
    """By precision, the device of a server process."""
    with ExitStack() as stack:
        servers = {
            p: stack.enter_context(ServerProcess("--precision", p, "--device", "CPU")) for p in ("exact", "fast")
        }
        devices = {
            precision: sdrpc.devices(rpc=[f"127.0.0.1:{server.port}"])["RPC0"] for precision, server in servers.items()
        }
        yield devices
        for device in devices.values():
            device.close()


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_equals_the_module_in_process(name: str, precision: str, remote: dict[str, Device]) -> None:
    part = PARTS[name]
    module = part.module()
    inputs = {key: example(key, shape) for key, shape in part.inputs.items()}
    found = errors(capture(module, inputs, part.call), module, inputs, part.call, remote[precision])
    assert max(found) <= TOLERANCE[precision]


def test_an_offloaded_module_is_still_itself(remote: dict[str, Device]) -> None:
    unet = models.unet()
    offloaded = sdrpc.offload(unet, remote["exact"])
    inputs = [example(name, shape) for name, shape in PARTS["unet"].inputs.items()]
    for scale in (1.0, 0.5):  # the second call reuses weights and graph
        with torch.no_grad():
            wanted = unet(inputs[0] * scale, *inputs[1:]).sample
        result = offloaded(inputs[0] * scale, *inputs[1:])
        assert isinstance(result, UNet2DConditionOutput)
        assert error(numbers(result.sample), numbers(wanted)) <= TOLERANCE["exact"]
    with pytest.raises(RuntimeError, match="channels"):
        offloaded(inputs[0][:, :3], *inputs[1:])
    offloaded.close()  # type: ignore[operator]
