"""Parts of Stable Diffusion 1.x, lowered, equal the modules in process: both targets, interpreter and engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from sdrpc.engine import LocalDevice
from sdrpc.engine import devices as local_devices
from sdrpc.lowering.capture import capture
from sdrpc.targets import PORTABLE, SDRPC
from tests.lowering import models
from tests.lowering.compare import TOLERANCE, Call, errors
from tests.lowering.devices import ReferenceDevice


class Part(NamedTuple):
    module: Callable[[], Any]
    inputs: dict[str, tuple[int, ...]]
    call: Call


def denoise(module: Any, x: Any, t: Any, context: Any) -> tuple[Any, ...]:
    return (module(x, t, context).sample,)


def encode_text(module: Any, ids: Any) -> tuple[Any, ...]:
    result = module(ids, output_hidden_states=True)
    return result.last_hidden_state, result.pooler_output, result.hidden_states[-2]


def decode(module: Any, z: Any) -> tuple[Any, ...]:
    return (module.decode(z).sample,)


def encode(module: Any, picture: Any) -> tuple[Any, ...]:
    return (module.encode(picture).latent_dist.parameters,)


PARTS = {
    "unet": Part(models.unet, {"x": (2, 4, 8, 6), "t": (), "context": (2, 7, 24)}, denoise),
    "unet-odd": Part(lambda: models.unet((16, 24, 32)), {"x": (1, 4, 9, 7), "t": (1,), "context": (1, 5, 24)}, denoise),
    "unet-deep": Part(
        lambda: models.unet((8, 16), layers=2, heads=4), {"x": (3, 4, 4, 6), "t": (3,), "context": (3, 1, 24)}, denoise
    ),
    "unet-linear": Part(
        lambda: models.unet(use_linear_projection=True), {"x": (1, 4, 6, 4), "t": (), "context": (1, 3, 24)}, denoise
    ),
    "clip": Part(models.text_encoder, {"ids": (2, 77)}, encode_text),
    "clip-short": Part(
        lambda: models.text_encoder(36, 3, hidden_act="gelu", attn_implementation="eager"), {"ids": (1, 9)}, encode_text
    ),
    "clip-eos-2": Part(lambda: models.text_encoder(12, 1, eos_token_id=2), {"ids": (3, 11)}, encode_text),
    "decoder": Part(models.vae, {"z": (2, 4, 5, 7)}, decode),
    "decoder-deep": Part(lambda: models.vae((8, 16), 2), {"z": (1, 4, 6, 4)}, decode),
    "encoder": Part(models.vae, {"picture": (2, 3, 20, 28)}, encode),
}


def example(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if name == "ids":
        return torch.randint(0, 99, shape, generator=generator)
    return (
        torch.randint(0, 1000, shape, generator=generator) if name == "t" else torch.randn(shape, generator=generator)
    )


@pytest.fixture(scope="module")
def engines() -> dict[str, LocalDevice]:
    return {precision: local_devices(precision)[-1] for precision in ("exact", "fast")}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_equals_the_module_in_process(name: str, engines: dict[str, LocalDevice]) -> None:
    part = PARTS[name]
    module = part.module()
    inputs = {key: example(key, shape) for key, shape in part.inputs.items()}
    graph = capture(module, inputs, part.call)
    for device, precision in (
        (ReferenceDevice(SDRPC), "exact"), (ReferenceDevice(PORTABLE), "exact"),
        (engines["exact"], "exact"), (engines["fast"], "fast"),
    ):  # fmt: skip
        found = errors(graph, module, inputs, part.call, device)
        assert max(found) <= TOLERANCE[precision], (device.name, device.target.name, precision, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_stay_narrow_and_values_do_not(dtype: torch.dtype, engines: dict[str, LocalDevice]) -> None:
    """The graph of a half-precision module computes what the module would in f32 with the same weights."""
    part = PARTS["decoder-deep"]
    narrow: nn.Module = part.module().to(dtype)
    wide: nn.Module = part.module().to(dtype).float()
    inputs = {key: example(key, shape) for key, shape in part.inputs.items()}
    graph = capture(narrow, {key: value.to(dtype) for key, value in inputs.items()}, part.call)

    def call(_: nn.Module, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(result.to(dtype) for result in part.call(wide, z))

    for device in (ReferenceDevice(SDRPC), ReferenceDevice(PORTABLE), engines["exact"]):
        found = errors(graph, narrow, inputs, call, device)
        assert max(found) <= torch.finfo(dtype).eps, (device.name, found)
