"""The LoRA's training: outlines are told from filled shapes, and its file fits the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sdrpc import models
from sdrpc.families.lora import open_lora
from sdrpc.families.model import ModelFiles, open_model
from tests.training.test_evaluate import meant
from training import lora
from training.detect import Pixels, detect
from training.judge import judge
from training.outlines import LINE
from training.prompts import Prompt, spread
from training.scenes import SIZES, draw

PROMPTS = spread(lora.judged(), 48)


def drawn(prompt: Prompt, line: float) -> Pixels:
    """The scene that the prompt means, of middle size where it says none."""
    scene = meant(prompt)
    if prompt.says.shapes[0].size is None:
        scene.radii[:, 0] = sum(SIZES["medium"]) / 2
    return (draw(scene, 128, line=line)[0] * 255).round().byte().permute(1, 2, 0).numpy()


def test_outlines_of_what_is_said_are_right() -> None:
    seen = lora.score([drawn(prompt, LINE) for prompt in PROMPTS], PROMPTS)
    assert (seen.hollow, seen.right) == (48, 48)


def test_filled_shapes_are_no_outlines() -> None:
    assert lora.score([drawn(prompt, 0) for prompt in PROMPTS], PROMPTS).hollow == 0


def test_outlines_of_something_else_are_wrong() -> None:
    turned = PROMPTS[1:] + PROMPTS[:1]
    seen = lora.score([drawn(prompt, LINE) for prompt in turned], PROMPTS)
    filled = [judge(detect(drawn(other, 0)), prompt.says).right for other, prompt in zip(turned, PROMPTS, strict=True)]
    assert (seen.hollow, seen.right) == (48, sum(filled))
    assert sum(filled) < 4


@pytest.mark.parametrize("fill", [0, 255])
def test_an_empty_picture_shows_nothing(fill: int) -> None:
    assert lora.score([np.full((128, 128, 3), fill, np.uint8)], PROMPTS[:1]).hollow == 0


def test_every_shape_that_is_learnt_has_room_for_a_hole() -> None:
    chosen = lora.roomy(50, seed=3)
    assert len(chosen) == 50
    assert chosen.radii[chosen.kinds >= 0].min() >= lora.LARGE


def test_a_new_lora_changes_nothing_and_its_file_fits_the_model(tmp_path: Path) -> None:
    shipped = models.SHIPPED["demo"]
    _, plain, _ = lora.model.stored(shipped)
    unet = lora.adapted(shipped, seed=0)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor(500), torch.randn(1, 77, 96)
    with torch.inference_mode():
        torch.testing.assert_close(unet(*inputs).sample, plain(*inputs).sample)
    path = tmp_path / "new" / "lora.safetensors"
    lora.write(path, unet, {"seed": "0"})
    opened = open_lora(path, open_model(ModelFiles(shipped)))
    assert opened.unknown == ()
    assert {name: len(changes) for name, changes in opened.components.items()} == {
        "diffusion": len(lora.tensors(unet)) // 3
    }
