"""UNets that are told guidance, as latent consistency models are: the picture of diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import sdrpc
from sdrpc.diffusion.idle import idle_fields
from sdrpc.diffusion.session import Session
from sdrpc.families.model import ModelFiles
from sdrpc.runtime.cache import Cache
from tests.support.pictures import BOUNDS, Case, Checkpoints, drawing, request
from tests.support.references.draw import draw, psnr

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' scheduler with numpy 2

WIDTH = 33
"""Of the guidance's embedding; odd ones end with a zero."""
GUIDANCE = 4.0


def told(unet: Any) -> Any:
    """``unet`` with a layer that is told guidance."""
    made: Any = diffusers.UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=WIDTH)
    made.load_state_dict(unet.state_dict(), strict=False)
    projection = made.time_embedding.cond_proj
    projection.weight.data = torch.randn(projection.weight.shape, generator=torch.Generator().manual_seed(3))
    return made.eval()


@pytest.mark.parametrize("case", [Case("sd1", "safetensors"), Case("sdxl", "diffusers")], ids=str)
def test_a_unet_that_is_told_guidance(case: Case, checkpoints: Checkpoints, graphs: Path, tmp_path: Path) -> None:
    """The original code's names and diffusers'; with no negative prompt, which such models have not."""
    pipeline, files, path = checkpoints.made(case).pipeline(), checkpoints.files(case), tmp_path / "lcm.safetensors"
    pipeline.unet = told(pipeline.unet)
    if case.form == "safetensors":
        added = {
            "model.diffusion_model.time_embed.cond_proj.weight": pipeline.unet.time_embedding.cond_proj.weight.data
        }
        save_file(load_file(files.model or "") | added, path)
        files = ModelFiles(path)
    else:
        save_file(pipeline.unet.state_dict(), path)
        files = replace(files, diffusion_model=path)
    asked = replace(request(case), cfg_scale=1.0, guidance=GUIDANCE)
    wanted = draw(pipeline, replace(drawing(case), cfg=GUIDANCE)).pixels
    device = sdrpc.devices(precision="exact")["CPU"]
    with Session.open(files, device, Cache(graphs)) as session:
        usual = session.model.defaults
        idle = [field for field, _ in idle_fields(session.model, asked, session.settings(asked))]
        drawn, other = (
            next(iter(session.generate(each))).image / 255 for each in (asked, replace(asked, guidance=1.0))
        )
    device.close()
    assert (usual.sampler, usual.steps, usual.cfg_scale, usual.guidance) == ("lcm", 4, 1.0, 8.5)
    assert idle == ["negative_prompt"]
    assert psnr(drawn, wanted) >= BOUNDS["exact"]
    assert psnr(other, wanted) < 40, "guidance makes a difference"
