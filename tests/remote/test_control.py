"""Pictures with a ControlNet on one server and the UNet on another are those of diffusers' own pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
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
SD1, SDXL, FLUX = Case("sd1", "safetensors"), Case("sdxl", "gguf", "Q8_0"), Case("flux1-dev", "gguf", "Q8_0")


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
    return _with_numbers(kind.from_unet(pipeline.unet).eval())


def _with_numbers(control: Any) -> Any:
    """The ControlNet with numbers in its own layers, of which the last ones begin as zeros."""
    for name, parameter in control.named_parameters():
        if "controlnet_" in name or "input_hint_block" in name:
            torch.nn.init.normal_(parameter, 0, 0.05)
    return control


def made_for_flux(pipeline: Any, kind: str) -> Any:
    """A ControlNet of random numbers for the pipeline's transformer: ``plain``, ``union`` or ``xlabs``."""
    config: Any = dict(pipeline.transformer.config)
    config = {
        name: config[name] for name in signature(diffusers.FluxControlNetModel.__init__).parameters if name in config
    }
    own: dict[str, Any] = {
        "plain": {"num_layers": 1, "num_single_layers": 1},
        "union": {"num_layers": 2, "num_single_layers": 0, "num_mode": 7, "guidance_embeds": False},
        "xlabs": {"num_layers": 1, "num_single_layers": 0, "conditioning_embedding_channels": 16, "patch_size": 2},
    }
    torch.manual_seed(3)
    make_one: Any = diffusers.FluxControlNetModel
    return _with_numbers(make_one(**config | own[kind]).eval())


def as_xlabs(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a ControlNet with the names of the original code, which has queries, keys and values in one."""
    found: dict[str, torch.Tensor] = {}
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(
            r"transformer_blocks\.(\d+)\.attn\.(add_q|add_k|add_v|to_q|to_k|to_v)(?:_proj)?\.(\w+)", name
        ):
            stream = "txt" if match[2].startswith("add") else "img"
            parts.setdefault(f"double_blocks.{match[1]}.{stream}_attn.qkv.{match[3]}", []).append(tensor)
            continue
        for pattern, replacement in _XLABS:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found | {name: torch.cat(thirds) for name, thirds in parts.items()}


_XLABS = (
    (r"^transformer_blocks\.(\d+)\.", r"double_blocks.\1."),
    (r"attn\.norm_added_([qk])\.weight", r"txt_attn.norm.\1.scale"),
    (r"attn\.norm_([qk])\.weight", r"img_attn.norm.\1.scale"),
    (r"norm\.q\.", "norm.query_norm."), (r"norm\.k\.", "norm.key_norm."),
    (r"attn\.to_out\.0", "img_attn.proj"), (r"attn\.to_add_out", "txt_attn.proj"),
    (r"norm1_context\.linear", "txt_mod.lin"), (r"norm1\.linear", "img_mod.lin"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.0"), (r"ff_context\.net\.2", "txt_mlp.2"),
    (r"ff\.net\.0\.proj", "img_mlp.0"), (r"ff\.net\.2", "img_mlp.2"),
    (r"^time_text_embed\.timestep_embedder", "time_in"), (r"^time_text_embed\.text_embedder", "vector_in"),
    (r"^time_text_embed\.guidance_embedder", "guidance_in"),
    (r"\.linear_1", ".in_layer"), (r"\.linear_2", ".out_layer"),
    (r"^context_embedder", "txt_in"), (r"^controlnet_x_embedder", "pos_embed_input"), (r"^x_embedder", "img_in"),
    (r"hint_block\.conv_in", "hint_block.0"), (r"hint_block\.conv_out", "hint_block.14"),
    (r"hint_block\.blocks\.(\d)", lambda match: f"hint_block.{2 * int(match[1]) + 2}"),
)  # fmt: skip
"""From diffusers' names to those of the original code, one after the other."""


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


@pytest.mark.parametrize("kind", ["plain", "union", "xlabs"])
def test_a_picture_with_a_controlnet_for_flux(
    kind: str,
    checkpoints: Checkpoints,
    wires: tuple[list[CountingProxy], list[Device]],
    graphs: Path,
    tmp_path: Path,
) -> None:
    pipeline, path = checkpoints.made(FLUX).pipeline(), tmp_path / "control.safetensors"
    control, mode = made_for_flux(pipeline, kind), 2 if kind == "union" else None
    shown = torch.from_numpy(hint().astype(np.float32) / 255).permute(2, 0, 1)[None]
    wanted = draw(pipeline, replace(drawing(FLUX), control=Control(control, shown, STRENGTH, mode))).pixels
    state = control.state_dict()
    save_file(as_xlabs(state) if kind == "xlabs" else state, path)
    files, (_, (one, other)) = replace(checkpoints.files(FLUX), control_net=path), wires
    with Session.open(files, {"control": other, "all": one}, Cache(graphs)) as session:
        (picture,) = session.generate(replace(asked(FLUX), control_mode=mode))
        if kind == "union":
            for wrong in (None, 7):
                with pytest.raises(InvalidValue, match=r"control_mode .*0 … 6"):
                    session.generate(replace(asked(FLUX), control_mode=wrong))
        else:
            with pytest.raises(InvalidValue, match=r"control_mode 2: there is no ControlNet for several kinds"):
                session.generate(replace(asked(FLUX), control_mode=2))
        session.settings(replace(asked(FLUX), control_mode=7, control_image=None))  # it is shown nothing
        unused = [name for names in session.unused().values() for name in names]
    if kind == "plain":
        assert not unused
    assert all(re.search("ff_context|to_add_out|txt_", name) for name in unused), "nobody reads the last block's text"
    assert psnr(picture.image, wanted) >= BOUNDS["exact"]
    assert psnr(wanted, checkpoints.wanted(FLUX)) < 35, "a ControlNet changes the picture"


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
    control = stored(made(checkpoints.made(SD1).pipeline()), tmp_path / "sd1.safetensors", False)
    with pytest.raises(CheckpointError, match=r"has no ControlNet, which FLUX\.1 needs; what it has: ControlNet"):
        Session.open(replace(checkpoints.files(FLUX), control_net=control), device)
    control = tmp_path / "flux.safetensors"
    save_file(made_for_flux(checkpoints.made(FLUX).pipeline(), "plain").state_dict(), control)
    with pytest.raises(CheckpointError, match="this is a ControlNet, which sdrpc does not draw with"):
        Session.open(control, device)
    strange = stored(made(checkpoints.made(SDXL).pipeline()), tmp_path / "xl.safetensors", False)
    with pytest.raises(CheckpointError, match=r"do not belong to one Stable Diffusion 1.x"):
        Session.open(replace(checkpoints.files(SD1), control_net=strange), device)
