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
from tests.support.pictures import BOUNDS, HEIGHT, WIDTH, Case, Checkpoints, drawing, request
from tests.support.process import ServerProcess
from tests.support.references.draw import Control, draw, psnr
from tools.checkpoints import names

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers' scheduler with numpy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers, about itself
]

STRENGTH = 0.7
SD1, SDXL = Case("sd1", "safetensors"), Case("sdxl", "gguf", "Q8_0")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def wires() -> Iterator[tuple[list[CountingProxy], list[Device]]]:
    """The devices of two servers, each behind a proxy that counts."""
    with ExitStack() as stack:
        servers = [stack.enter_context(ServerProcess("--precision", "exact", "--device", "CPU")) for _ in "ab"]
        proxies = [stack.enter_context(CountingProxy(server.port)) for server in servers]
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
    graphs: Cache,
    tmp_path: Path,
) -> None:
    pipeline = checkpoints.made(case).pipeline()
    control = made(pipeline)
    shown = torch.from_numpy(hint().astype(np.float32) / 255).permute(2, 0, 1)[None]
    wanted = draw(pipeline, replace(drawing(case), control=Control(control, shown, STRENGTH))).pixels
    files = replace(checkpoints.files(case), control_net=stored(control, tmp_path / "control.safetensors", original))
    _, (one, other) = wires
    with Session.open(files, {"control": other, "all": one}, graphs) as session:
        events: list[Event] = []
        (picture,) = session.generate(asked(case), events.append)
        (without,) = session.generate(request(case), events.append)
    assert psnr(picture.image, wanted) >= BOUNDS["exact"]
    plain = checkpoints.wanted(case)
    assert psnr(wanted, plain) < 35, "a ControlNet changes the picture"
    assert psnr(without.image, plain) >= BOUNDS["exact"], "the UNet's weights are as they were"
    uploads = [event.component for event in events if event.stage == "upload" and event.over and event.total]
    assert uploads.count("diffusion") == 1, "and are sent once"


def test_refusals(checkpoints: Checkpoints, wires: tuple[list[CountingProxy], list[Device]], tmp_path: Path) -> None:
    _, (device, _) = wires
    with (
        Session.open(checkpoints.files(SD1), device) as session,
        pytest.raises(InvalidValue, match="needs a ControlNet"),
    ):
        session.generate(asked(SD1))
    strange = stored(made(checkpoints.made(SDXL).pipeline()), tmp_path / "xl.safetensors", False)
    with pytest.raises(CheckpointError, match="do not belong to one Stable Diffusion 1.x"):
        Session.open(replace(checkpoints.files(SD1), control_net=strange), device)
