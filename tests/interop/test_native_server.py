"""ggml's own RPC server as a device of our client: a small Stable Diffusion 1.x equals diffusers."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch

import sdrpc
from sdrpc.client import RemoteDevice, connect
from sdrpc.errors import ConnectionFailed, ConnectionLost, OutOfMemory
from sdrpc.ggml.weight import Weight
from sdrpc.lowering.capture import capture
from sdrpc.lowering.lower import lower
from sdrpc.runtime.lowered import Lowered
from sdrpc.runtime.run import Executable
from sdrpc.targets import PORTABLE
from tests.interop.conftest import NativeServer
from tests.interop.models import PARTS, Inputs, make, relative_error, stored
from tests.interop.tap import Tap
from tests.lowering.compare import errors
from tests.lowering.test_operations import CASES, Case, inputs_of

pytestmark = pytest.mark.interop

BOUNDS = {
    "F32": 1e-5,  # nothing is rounded on the way but sums: 1e-3 is what users are promised
    "F16": 2e-3,  # ggml's CPU rounds activations to f16 for f16 weights (2^-11), in every product
    "Q8_0": 3e-2,  # and quantizes them to 8 bits, 32 or 256 with one scale, for quantized weights
    "Q4_0": 3e-2,
    "Q4_K": 3e-2,
}
"""The largest relative error (L2) by the weights' type."""
TABLED = {"gelu": 1e-3}
"""Larger errors of rules: ggml's CPU looks this up in a table of f16."""

Size = tuple[int, int, int]
SIZES: tuple[Size, ...] = ((8, 8, 1), (8, 8, 2), (12, 4, 1), (4, 16, 3))
"""Latent height and width, batch."""


class Captured(NamedTuple):
    lowered: Lowered
    weights: Mapping[str, Weight]
    inputs: Inputs
    expected: np.ndarray


@cache
def captured(part: str, kind: str, size: Size) -> Captured:
    """The part for inputs of a size, its weights, inputs, and what diffusers makes of them in this process."""
    module, inputs = make(part), PARTS[part].inputs(*size)
    weights = stored(module, kind)
    types = {name: weight.type for name, weight in weights.items()}
    with torch.no_grad():
        expected = PARTS[part].call(module, *inputs.values())[0].numpy()
    return Captured(lower(capture(module, inputs, PARTS[part].call), PORTABLE, types), weights, inputs, expected)


def arrays(inputs: Inputs) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


@pytest.fixture
def devices(shared_native_server: NativeServer) -> Iterator[list[RemoteDevice]]:
    shared_native_server.start()
    made = connect([shared_native_server.endpoint])
    yield made
    for device in made:
        device.close()


def check(part: str, kind: str, size: Size, device: RemoteDevice, slack: float = 1.0) -> None:
    lowered, weights, inputs, expected = captured(part, kind, size)
    with Executable(lowered, device, weights) as run:
        error = relative_error(expected, run(**arrays(inputs))[0])
    assert error <= slack * BOUNDS[kind], f"{part} with {kind} weights, {size}: relative error {error:.2e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.split()[0])
def test_every_rule_of_lowering(case: Case, devices: list[RemoteDevice]) -> None:
    """What is lowered for any device, a native one computes: its backends abort on layouts that they don't take."""

    def call(_: torch.nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = case.function(*tensors)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    inputs = {f"x{i}": tensor for i, tensor in enumerate(inputs_of(case))}
    graph = capture(torch.nn.Module(), inputs, call)
    found = errors(graph, torch.nn.Module(), inputs, call, devices[0])
    assert max(found) <= TABLED.get(case.name, BOUNDS["F32"])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_parts_equal_diffusers(part: str, size: Size, devices: list[RemoteDevice]) -> None:
    check(part, "F32", size, devices[0])


@pytest.mark.parametrize("kind", [kind for kind in BOUNDS if kind != "F32"])
@pytest.mark.parametrize("part", PARTS)
def test_weights_are_read_as_they_are_stored(part: str, kind: str, devices: list[RemoteDevice]) -> None:
    check(part, kind, SIZES[0], devices[0])


def test_a_user_s_module_is_offloaded(devices: list[RemoteDevice]) -> None:
    module, inputs = make("clip"), PARTS["clip"].inputs(8, 8, 2)
    with torch.no_grad():
        expected = module(**inputs)
        module = sdrpc.offload(module, devices[0])
        got = module(**inputs)
    error = relative_error(expected.last_hidden_state.numpy(), got.last_hidden_state.numpy())
    assert error <= BOUNDS["F32"]
    assert type(got) is type(expected)


def test_devices_and_their_memory(devices: list[RemoteDevice], shared_native_server: NativeServer) -> None:
    assert [device.name for device in devices] == ["RPC0", "RPC1"]
    for device in devices:
        free, total = device.memory()
        assert 0 < free <= total
        assert device.target.name == PORTABLE.name
        assert shared_native_server.endpoint in device.description


def test_parts_on_two_devices_of_one_server(devices: list[RemoteDevice]) -> None:
    runs = []
    for part, device in zip(("clip", "vae"), devices, strict=True):
        lowered, weights, inputs, expected = captured(part, "F32", SIZES[0])
        runs.append((Executable(lowered, device, weights), arrays(inputs), expected))
    for run, inputs, expected in (*runs, *runs):
        assert relative_error(expected, run(**inputs)[0]) <= BOUNDS["F32"]
    for run, _, _ in runs:
        run.close()


def test_a_repeated_graph_is_not_sent_again(shared_native_server: NativeServer) -> None:
    lowered, weights, inputs, expected = captured("unet", "F32", SIZES[0])
    with Tap(shared_native_server.endpoint) as tap:
        device, other = connect([tap.endpoint])
        with Executable(lowered, device, weights) as run:
            first = run(**arrays(inputs))[0]
            sent = tap.commands["SET_TENSOR"]
            for _ in range(3):
                assert np.array_equal(run(**arrays(inputs))[0], first)
        assert (tap.commands["GRAPH_COMPUTE"], tap.commands["GRAPH_RECOMPUTE"]) == (1, 3)
        assert tap.commands["SET_TENSOR"] == sent  # nor inputs that did not change
        device.close()
        other.close()
    assert relative_error(expected, first) <= BOUNDS["F32"]


def test_other_inputs_reach_a_repeated_graph(devices: list[RemoteDevice]) -> None:
    lowered, weights, inputs, _ = captured("vae", "F32", SIZES[0])
    module = make("vae")
    with Executable(lowered, devices[0], weights) as run:
        for scale in (1.0, 0.5, -2.0):
            latents = inputs["latents"] * scale
            with torch.no_grad():
                expected = module.decode(latents, return_dict=False)[0].numpy()
            assert relative_error(expected, run(latents=latents.numpy())[0]) <= BOUNDS["F32"]


def test_an_allocation_that_is_too_large(devices: list[RemoteDevice]) -> None:
    with pytest.raises(OutOfMemory, match="RPC0"):
        devices[0].allocate(1 << 60)
    buffer = devices[0].allocate(64)  # and the connection is as good as before
    devices[0].write(buffer, 0, bytes(range(64)))
    assert bytes(devices[0].read(buffer, 0, 64)) == bytes(range(64))
    devices[0].free(buffer)


def test_a_server_that_is_killed(native_server: NativeServer) -> None:
    lowered, weights, inputs, expected = captured("vae", "F32", SIZES[0])
    device, _ = connect([native_server.endpoint])
    run = Executable(lowered, device, weights)
    assert relative_error(expected, run(**arrays(inputs))[0]) <= BOUNDS["F32"]
    native_server.kill()
    with pytest.raises(ConnectionLost, match=native_server.endpoint):
        run(**arrays(inputs))
    with pytest.raises(ConnectionLost, match=native_server.endpoint):
        device.memory()


def test_a_server_that_is_killed_while_it_computes(native_server: NativeServer) -> None:
    lowered, weights, inputs, _ = captured("vae", "F32", (64, 64, 1))
    device, _ = connect([native_server.endpoint])
    run = Executable(lowered, device, weights)
    killer = threading.Timer(0.3, native_server.kill)
    killer.start()
    with pytest.raises(ConnectionLost, match=native_server.endpoint):
        deque((run(**arrays(inputs)) for _ in itertools.count()), maxlen=0)
    killer.join()


def test_a_server_that_is_not_there(native_server: NativeServer) -> None:
    native_server.kill()
    with pytest.raises(ConnectionFailed, match=native_server.endpoint):
        connect([native_server.endpoint])
