"""The same module in torch and lowered: values, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn

from sdrpc.device import Device, Target
from sdrpc.lowering.capture import Captured, capture
from sdrpc.lowering.lower import lower
from sdrpc.lowering.weights import weights_of
from sdrpc.runtime.run import Executable
from sdrpc.targets import PORTABLE, SDRPC
from tests.lowering.devices import ReferenceDevice

Call = Callable[..., tuple[torch.Tensor, ...]]

TOLERANCE = {"operation": 2e-6, "exact": 1e-4, "fast": 2e-2}
"""Relative error (L2) of an operation, and of a whole part by precision."""


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """‖got − wanted‖ / ‖wanted‖."""
    distance = float(np.linalg.norm((got.astype(np.float64) - wanted).ravel()))
    return distance / (float(np.linalg.norm(wanted.astype(np.float64).ravel())) or 1.0)


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy() if tensor.is_floating_point() else tensor.numpy()


def errors(
    graph: Captured, module: nn.Module, inputs: Mapping[str, torch.Tensor], call: Call, device: Device
) -> list[float]:
    """The relative error of each output on ``device``; shapes and dtypes must be torch's."""
    with torch.no_grad():
        wanted = call(module, *inputs.values())
    weights = {weight.name: weight for weight in weights_of(module)}
    lowered = lower(graph, device.target, {name: weight.type for name, weight in weights.items()})
    with Executable(lowered, device, weights) as run:
        got = run(**{name: numbers(tensor) for name, tensor in inputs.items()})
    assert [(o.dtype, o.shape) for o in lowered.outputs] == [
        (str(w.dtype).removeprefix("torch."), tuple(w.shape)) for w in wanted
    ]
    return [error(g, numbers(w)) for g, w in zip(got, wanted, strict=True)]


def captured(
    function: Callable[..., object], *tensors: torch.Tensor
) -> tuple[Captured, Mapping[str, torch.Tensor], Call]:
    """``function(*tensors)`` as a graph, its inputs by name, and the call that was captured."""

    def call(_: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = function(*inputs)
        return tuple(result) if isinstance(result, tuple | list) else (result,)  # type: ignore[return-value]

    inputs = {f"x{i}": tensor for i, tensor in enumerate(tensors)}
    return capture(nn.Module(), inputs, call), inputs, call


def check(
    function: Callable[..., object], *tensors: torch.Tensor, targets: Iterable[Target] = (SDRPC, PORTABLE)
) -> Captured:
    """``function(*tensors)``, lowered for each target, gives what torch gives."""
    graph, inputs, call = captured(function, *tensors)
    for target in targets:
        found = errors(graph, nn.Module(), inputs, call, ReferenceDevice(target))
        assert max(found) <= TOLERANCE["operation"], (target.name, found)
    return graph
