"""Pictures with a ControlNet on one server and the UNet on another are those of diffusers' own pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

import sdrpc
from bench.proxy import CountingProxy
from sdrpc.device import Device
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.errors import CheckpointError, InvalidValue
from sdrpc.runtime.cache import Cache
from tests.support.pictures import BOUNDS, HEIGHT, STEPS, WIDTH, Case, Checkpoints, drawing, request
from tests.support.references.draw import Control, draw, psnr
from tools.checkpoints import names

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers' scheduler with numpy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers, about itself
]

STRENGTH = 0.7
SD1, SDXL = Case("sd1", "safetensors"), Case("sdxl", "gguf", "Q8_0")


@pytest.fixture(scope="module")
def wires(ports: list[int]) -> Iterator[tuple[list[CountingProxy], list[Device]]]:
    """The devices of two servers, each behind a proxy that counts."""
    with ExitStack() as stack:
        proxies = [stack.enter_context(CountingProxy(port)) for port in ports]
        found = sdrpc.devices(rpc=[f"127.0.0.1:{proxy.port}" for proxy in proxies])
        for device in found.values():
            stack.callback(device.close)
        yield proxies, [found["RPC0"], found["RPC1"]]


def made(pipeline: Any) -> Any:
    """A ControlNet of random numbers for the pipeline's UNet."""
    kind: Any = diffusers.ControlNetModel
    torch.manual_seed(3)
    control = kind.from_unet(pipeline.unet).eval()
    for name, parameter in control.named_parameters():
        if "controlnet_" in name:  # its own layers, of which the last ones begin as zeros
            torch.nn.init.normal_(parameter, 0, 0.05)
    return control


def stored(control: Any, path: Path, original: bool) -> Path:
    """The ControlNet as a file: with diffusers' names, or those of the original code."""
    state = {name: tensor.contiguous() for name, tensor in control.state_dict().items()}
    if original:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        copied = {
            e.sources[0]: e.name for e in names.ldm_unet({n: s for n, s in shapes.items() if "controlnet_" not in n})
        }
        state = {f"control_model.{copied.get(name) or _original(name)}": tensor for name, tensor in state.items()}
    save_file(state, path)
    return path


def _original(name: str) -> str:
    name = re.sub(r"controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0.", name)
    name = re.sub(r"controlnet_mid_block\.", "middle_block_out.0.", name)
    name = name.replace("controlnet_cond_embedding.conv_in", "input_hint_block.0")
    name = name.replace("controlnet_cond_embedding.conv_out", "input_hint_block.14")
    return re.sub(
        r"controlnet_cond_embedding\.blocks\.(\d+)", lambda match: f"input_hint_block.{2 * int(match[1]) + 2}", name
    )


def hint() -> NDArray[np.uint8]:
    return np.random.default_rng(4).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def asked(case: Case) -> Request:
    return replace(request(case), control_image=hint(), control_strength=STRENGTH)


@pytest.mark.parametrize(("case", "original"), [(SD1, True), (SDXL, False)], ids=str)
def test_a_picture_with_a_controlnet_is_that_of_diffusers(
    case: Case,
    original: bool,
    checkpoints: Checkpoints,
    wires: tuple[list[CountingProxy], list[Device]],
    cache: Cache,
    tmp_path: Path,
) -> None:
    pipeline = checkpoints.made(case).pipeline()
    control = made(pipeline)
    shown = torch.from_numpy(hint().astype(np.float32) / 255).permute(2, 0, 1)[None]
    wanted = draw(pipeline, replace(drawing(case), control=Control(control, shown, STRENGTH))).pixels
    files = replace(checkpoints.files(case), control_net=stored(control, tmp_path / "control.safetensors", original))
    (_, proxy), (one, other) = wires
    with Session.open(files, {"control": other, "all": one}, cache) as session:
        events: list[Event] = []
        before = proxy.received
        (picture,) = session.generate(asked(case), events.append)
        received = proxy.received - before
        (without,) = session.generate(request(case), events.append)
    assert psnr(picture.image, wanted) >= BOUNDS["exact"]
    plain = checkpoints.wanted(case)
    assert psnr(wanted, plain) < 35, "a ControlNet changes the picture"
    assert psnr(without.image, plain) >= BOUNDS["exact"], "the UNet's weights are as they were"
    uploads = [event.component for event in events if event.stage == "upload" and event.over and event.total]
    assert uploads.count("diffusion") == 1, "and are sent once"
    assert received < 1.1 * STEPS * _given(control, case), "what it gives comes once for each step"


def _given(control: Any, case: Case) -> int:
    """Bytes that the ControlNet gives for both prompts."""
    context = torch.zeros(2, 77, control.config.cross_attention_dim)
    latents, shown = torch.zeros(2, 4, HEIGHT // 8, WIDTH // 8), torch.zeros(2, 3, HEIGHT, WIDTH)
    width = (control.config.projection_class_embeddings_input_dim or 0) - 6 * 256
    told = {"text_embeds": torch.zeros(2, width), "time_ids": torch.zeros(2, 6)} if case is SDXL else None
    with torch.inference_mode():
        down, middle = control(latents, 1, context, shown, added_cond_kwargs=told, return_dict=False)
    return sum(4 * each.numel() for each in (*down, middle))


def test_refusals(checkpoints: Checkpoints, wires: tuple[list[CountingProxy], list[Device]], tmp_path: Path) -> None:
    _, (device, _) = wires
    with Session.open(checkpoints.files(SD1), device) as session:
        with pytest.raises(InvalidValue, match=r"control_image 128×64: .* needs a ControlNet"):
            session.generate(asked(SD1))
        with pytest.raises(InvalidValue, match="canny"):
            session.generate(replace(request(SD1), canny=True))
    strange = stored(made(checkpoints.made(SDXL).pipeline()), tmp_path / "xl.safetensors", False)
    with pytest.raises(CheckpointError, match=r"do not belong to one Stable Diffusion 1.x"):
        Session.open(replace(checkpoints.files(SD1), control_net=strange), device)
