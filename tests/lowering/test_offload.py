"""Offloaded modules stand in for the originals: alone and inside a diffusers pipeline."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sdrpc
from sdrpc.engine import LocalDevice
from sdrpc.errors import CaptureError, UsageError
from tests.lowering import models
from tests.lowering.compare import TOLERANCE, error
from tests.lowering.devices import ReferenceDevice

DECIBELS = 80
"""PSNR of an offloaded pipeline's picture against the one in process, exact."""


@pytest.fixture(scope="module")
def cpu() -> Iterator[LocalDevice]:
    device = sdrpc.devices(precision="exact", threads=1)["CPU"]
    assert isinstance(device, LocalDevice)
    yield device
    device.close()


class Words:
    """As much of a tokenizer as the pipeline asks for."""

    model_max_length = 77
    added_tokens_encoder: dict[str, int] = {}  # noqa: RUF012

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def __call__(self, texts: list[str], **_: Any) -> Any:
        rows = [[97, *(ord(letter) % 97 for letter in text), *[98] * (76 - len(text))] for text in texts]
        return SimpleNamespace(input_ids=torch.tensor(rows))


def pipeline() -> Any:
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        models.vae(), models.text_encoder(), None, models.unet(), scheduler, None, None, requires_safety_checker=False
    )
    pipe.tokenizer = Words()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    arguments = {"height": 24, "width": 32, "num_inference_steps": 2, "output_type": "np", "generator": generator}
    result: np.ndarray = pipe(["a cat", "a dog"], **arguments, **options).images
    return result


def test_a_pipeline_draws_the_same_picture(cpu: LocalDevice) -> None:
    pipe = pipeline()
    wanted = [picture(pipe), picture(pipe, guidance_scale=1.0)]
    for name in ("text_encoder", "unet", "vae"):
        setattr(pipe, name, sdrpc.offload(getattr(pipe, name), cpu))
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert isinstance(pipe.vae, AutoencoderKL)
    for mine, theirs in zip([picture(pipe), picture(pipe, guidance_scale=1.0)], wanted, strict=True):
        assert mine.shape == theirs.shape
        assert -10 * np.log10(np.mean((mine - theirs) ** 2) + 1e-12) >= DECIBELS
    for name in ("text_encoder", "unet", "vae"):
        getattr(pipe, name).close()


def test_results_have_the_modules_classes_and_dtypes(cpu: LocalDevice) -> None:
    module = models.vae().to(torch.bfloat16)
    remote = sdrpc.offload(module, cpu)
    image = torch.rand(1, 3, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        mine, theirs = remote.encode(image), module.encode(image)
        assert type(mine) is type(theirs)
        assert type(mine.latent_dist) is type(theirs.latent_dist)
        assert mine.latent_dist.mean.dtype == torch.bfloat16
        assert error(mine.latent_dist.mean.float().numpy(), theirs.latent_dist.mean.float().numpy()) < 2e-2
        (only,) = remote.decode(mine.latent_dist.mode(), return_dict=False)
        assert type(remote.decode(mine.latent_dist.mode())) is type(module.decode(theirs.latent_dist.mode()))
        assert only.dtype == torch.bfloat16
    assert inspect.signature(remote.decode) == inspect.signature(module.decode)
    assert inspect.signature(remote.forward) == inspect.signature(module.forward)
    assert (remote.config, remote.dtype, remote.device) == (module.config, module.dtype, module.device)
    assert remote.state_dict().keys() == module.state_dict().keys()


def test_refused_inputs_raise_the_modules_own_errors() -> None:
    module = models.unet((8, 16))
    remote = sdrpc.offload(module, ReferenceDevice())
    x, context = torch.randn(1, 4, 4, 4), torch.randn(1, 2, 24)
    for args, kwargs in (
        ((x,), {}), ((x, 3, context), {"nonsense": 1}), ((x[:, :3], 3, context), {}), ((x, 3, context[..., :5]), {}),
        ((x, 3, None), {}),
    ):  # fmt: skip
        with pytest.raises(Exception) as theirs, torch.no_grad():  # noqa: PT011
            module(*args, **kwargs)
        with pytest.raises(type(theirs.value)) as mine, torch.no_grad():
            remote(*args, **kwargs)
        assert str(mine.value) == str(theirs.value)


class Branching(nn.Module):
    """A signature with flags, a number and structures."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(
        self,
        x: Tensor,
        scale: Tensor | float,
        *more: Tensor,
        twice: bool = False,
        extra: dict[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        y = self.linear(x) * scale + sum(more)
        y = y * 2 if twice else y
        return {"y": (y, extra["z"] + 1) if extra else y, "n": 7, "none": None}


def test_any_signature_and_structure() -> None:
    module, device = Branching().eval(), ReferenceDevice()
    remote = sdrpc.offload(module, device)
    x, z = torch.randn(2, 3), torch.randn(4)
    with torch.no_grad():
        for args, kwargs in (
            ((x, 2.0), {}), ((x, torch.tensor(3)), {}), ((x, 1.5, x, x[:1]), {"twice": True}),
            ((x[0],), {"scale": 0.5, "extra": {"z": z}}),
        ):  # fmt: skip
            mine, theirs = remote(*args, **kwargs), module(*args, **kwargs)
            assert (mine["n"], mine["none"]) == (7, None)
            assert isinstance(mine["y"], tuple) == ("extra" in kwargs)
            for a, b in zip(*map(tree_leaves, (mine["y"], theirs["y"])), strict=True):
                assert a.dtype == b.dtype
                assert error(a.numpy(), b.numpy()) <= TOLERANCE["operation"]


def test_one_graph_a_signature_and_one_upload() -> None:
    device = ReferenceDevice()
    remote = sdrpc.offload(Branching().eval(), device)
    x = torch.randn(2, 3)
    with torch.no_grad():
        remote(x, 1.0)
        buffers = len(device.memory_of)
        remote(x, 2.0)
        remote(x + 1, 3.0)
        assert len(device.memory_of) == buffers
        remote(x[:1], 1.0)
        assert len(device.memory_of) == buffers + 1  # its inputs and outputs; the weights are there
        for n in range(1, 40):
            remote(torch.randn(n, 3), 1.0)
        assert len(device.memory_of) < 40
    remote.close()
    assert device.memory_of == {}


def test_gradients_and_training_are_refused() -> None:
    remote = sdrpc.offload(Branching(), ReferenceDevice())
    with pytest.raises(UsageError, match="an offloaded Branching has no gradients"):
        remote(torch.randn(2, 3, requires_grad=True), 1.0)
    noisy = sdrpc.offload(nn.Dropout(0.5), ReferenceDevice())
    with pytest.raises(CaptureError, match="draws random numbers: call eval"):
        noisy(torch.randn(2, 3))


def test_importing_sdrpc_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sdrpc, sys; assert 'torch' not in sys.modules"], check=True)


def test_devices_have_names(cpu: LocalDevice) -> None:
    assert cpu.name == "CPU"
    with pytest.raises(UsageError, match="precision"):
        sdrpc.devices(precision="sloppy")
