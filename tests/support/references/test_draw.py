"""The references are what diffusers' pipelines draw when they are simply called, and depend on all they are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from tests.support.references import draw as references
from tests.support.references.draw import Drawing, draw, psnr
from tools.checkpoints import make

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' scheduler with numpy 2

SIGMAS = {"discrete": (14.6, 4.1, 1.3, 0.0), "flow": (1.0, 0.7, 0.3, 0.0)}
CHANNELS = {"discrete": 4, "flow": 16}
KIND = {
    "sd1": "discrete", "sd2": "discrete", "sdxl": "discrete",
    "flux1-dev": "flow", "flux1-schnell": "flow", "chroma": "flow", "sd3.5-medium": "flow",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    return {family: pipeline(family, folder) for family in KIND}


def pipeline(family: str, folder: Path) -> Any:
    made = make(family, folder / family, type="F32").pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def drawing(family: str, **options: Any) -> Drawing:
    kind = KIND[family]
    noise = np.random.default_rng(3).standard_normal((CHANNELS[kind], 8, 12), dtype=np.float32)
    return Drawing("a lovely cat", noise, SIGMAS[kind], **options)


def called(pipeline: Any, drawing: Drawing, **options: Any) -> np.ndarray:
    """What the pipeline draws when it is called with the prompts themselves."""
    config = pipeline.scheduler.config
    pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    with torch.inference_mode():
        images = pipeline(
            prompt=drawing.prompt, latents=torch.from_numpy(drawing.noise)[None], sigmas=list(drawing.sigmas),
            guidance_scale=drawing.cfg, height=drawing.height, width=drawing.width, output_type="np", **options,
        ).images  # fmt: skip
    return np.asarray(images[0])


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_sd_as_called(family: str, pipelines: dict[str, Any]) -> None:
    wanted = drawing(family, negative="blurry, dark")
    simply = called(pipelines[family], wanted, negative_prompt=wanted.negative)
    assert psnr(draw(pipelines[family], wanted).pixels, simply) > 100


@pytest.mark.parametrize(("zeros", "negative"), [("both", None), ("nothing", ""), ("text", "blurry")])
def test_sdxl_as_called(zeros: str, negative: str | None, pipelines: dict[str, Any]) -> None:
    wanted = drawing("sdxl", zeros=zeros, negative=negative or "")
    simply = called(pipelines["sdxl"], wanted, negative_prompt=negative)
    assert psnr(draw(pipelines["sdxl"], wanted).pixels, simply) > 100


def test_clip_skip_as_called(pipelines: dict[str, Any]) -> None:
    """Diffusers counts from 0 for SDXL what we count from 2."""
    wanted = drawing("sdxl", clip_skip=3, cfg=1.0)
    simply = called(pipelines["sdxl"], wanted, clip_skip=1)
    assert psnr(draw(pipelines["sdxl"], wanted).pixels, simply) > 100


def test_a_layer_skipped_is_a_layer_less(tmp_path: Path) -> None:
    pipe = pipeline("sd1", tmp_path)
    wanted = drawing("sd1", negative="blurry")
    skipped = draw(pipe, replace(wanted, clip_skip=2))
    pipe.text_encoder.encoder.layers = pipe.text_encoder.encoder.layers[:-1]
    assert psnr(skipped.pixels, draw(pipe, wanted).pixels) > 100


def test_flux_as_called(pipelines: dict[str, Any]) -> None:
    """With sigmas that the pipeline's own scheduler chose."""
    pipe = pipelines["flux1-schnell"]
    wanted = drawing("flux1-schnell", cfg=1.0)
    noise = torch.from_numpy(wanted.noise)[None]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    with torch.inference_mode():
        images = pipe(
            wanted.prompt, latents=pipe._pack_latents(noise, *noise.shape), num_inference_steps=4,
            height=wanted.height, width=wanted.width, max_sequence_length=256, output_type="np",
        ).images  # fmt: skip
    sigmas = pipe.scheduler.sigmas.tolist()
    assert psnr(draw(pipe, replace(wanted, sigmas=sigmas)).pixels, np.asarray(images[0])) > 100


def test_sd3_as_called(pipelines: dict[str, Any]) -> None:
    """With the identity as CLIP-L's projection, as in published files, and a layer more skipped for the prompt."""
    pipe = pipelines["sd3.5-medium"]
    pipe.text_encoder.text_projection.weight = torch.nn.Parameter(torch.eye(64), requires_grad=False)
    wanted = drawing("sd3.5-medium", cfg=1.0, clip_skip=3)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with torch.inference_mode():
        images = pipe(
            wanted.prompt, latents=torch.from_numpy(wanted.noise)[None], num_inference_steps=4, guidance_scale=1.0,
            height=wanted.height, width=wanted.width, max_sequence_length=77, clip_skip=1, output_type="np",
        ).images  # fmt: skip
    sigmas = pipe.scheduler.sigmas.tolist()
    assert psnr(draw(pipe, replace(wanted, sigmas=sigmas)).pixels, np.asarray(images[0])) > 100


def test_chroma_as_called(pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding, of which the pipeline's own call makes something else."""
    pipe, prompts = pipelines["chroma"], {"prompt": "a lovely cat", "negative_prompt": "a lovely dog"}
    (length,) = {len(pipe.tokenizer(text).input_ids) for text in prompts.values()}
    wanted = drawing("chroma", cfg=3.0, negative=prompts["negative_prompt"])
    noise = torch.from_numpy(wanted.noise)[None]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    with torch.inference_mode():
        images = pipe(
            **prompts, latents=pipe._pack_latents(noise, *noise.shape), num_inference_steps=4, guidance_scale=3.0,
            height=wanted.height, width=wanted.width, max_sequence_length=length, output_type="np",
        ).images  # fmt: skip
    monkeypatch.setattr(references, "CHROMA_T5_LENGTH", length)
    sigmas = pipe.scheduler.sigmas.tolist()
    assert psnr(draw(pipe, replace(wanted, sigmas=sigmas)).pixels, np.asarray(images[0])) > 100


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("sd1", {"prompt": "a lovely dog"}),
    ("sd1", {"negative": "blurry"}),
    ("sd1", {"cfg": 1.0}),
    ("sd1", {"clip_skip": 2}),
    ("sd1", {"prediction": "v_prediction"}),
    ("sd2", {"clip_skip": 3}),
    ("sdxl", {"clip_skip": 1}),
    ("sdxl", {"zeros": "both"}),
    ("sdxl", {"zeros": "nothing"}),
    ("flux1-dev", {"guidance": 1.0}),
    ("flux1-dev", {"cfg": 1.0}),
    ("flux1-dev", {"negative": "blurry"}),
    ("flux1-schnell", {"prompt": "a lovely dog"}),
    ("flux1-schnell", {"sigmas": (0.9, 0.5, 0.2, 0.0)}),
    ("sd3.5-medium", {"prompt": "a lovely dog"}),
    ("sd3.5-medium", {"negative": "blurry"}),
    ("sd3.5-medium", {"cfg": 1.0}),
    ("sd3.5-medium", {"clip_skip": 1}),
    ("chroma", {"prompt": "a lovely dog"}),
    ("chroma", {"negative": "blurry"}),
    ("chroma", {"cfg": 1.0}),
]


@pytest.mark.parametrize(("family", "change"), CHANGES)
def test_what_is_told_counts(family: str, change: dict[str, Any], pipelines: dict[str, Any]) -> None:
    usual = drawing(family)
    assert psnr(draw(pipelines[family], usual).pixels, draw(pipelines[family], replace(usual, **change)).pixels) < 40


@pytest.mark.parametrize("family", KIND)
def test_pictures_show_something(family: str, pipelines: dict[str, Any]) -> None:
    picture = draw(pipelines[family], drawing(family))
    assert np.isfinite(picture.latents).all()
    assert picture.latents.shape == (CHANNELS[KIND[family]], 8, 12)
    assert picture.pixels.shape == (64, 96, 3)
    assert picture.pixels.std() > 0.1
    assert np.mean((picture.pixels > 0) & (picture.pixels < 1)) > 0.6


def test_psnr() -> None:
    black = np.zeros((4, 4, 3), np.float32)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr(np.uint8(black), np.uint8(black + 255)) == 0.0
    assert psnr(black, np.uint8(black + 51)) == pytest.approx(13.979, abs=1e-3)
    with pytest.raises(ValueError, match="pictures of"):
        psnr(black, black[1:])


def test_layers_that_a_class_lacks(pipelines: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="clip_skip 1: the class lacks that layer"):
        draw(pipelines["sd2"], drawing("sd2", clip_skip=1))
