"""Films of pictures through a real rpc-server are those of diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import WanImageToVideoPipeline
from PIL import Image

from sdrpc.device import Device
from sdrpc.diffusion.predictions import prediction
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.schedules import make_sigmas
from sdrpc.diffusion.session import Session
from sdrpc.errors import InvalidValue
from sdrpc.families.model import ModelFiles
from sdrpc.runtime.cache import Cache
from tests.support.pictures import BOUNDS
from tests.support.references.draw import Drawing, draw, psnr
from tools.checkpoints import Made, make

SIDE, FRAMES, STEPS = 64, 5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("films")


def picture(number: int) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([x * 4, y * 4, np.full_like(x, 90 * number)], axis=-1).astype(np.uint8)


def asked(**pictures: Any) -> Request:
    return Request(
        "a lovely cat", "blurry", SIDE, SIDE, STEPS, cfg_scale=4.0, seed=5, sampling_method="euler",
        scheduler="discrete", video_frames=FRAMES, **pictures,
    )  # fmt: skip


def opened(made: Made, device: Device, folder: Path) -> Session:
    files = {name + "_model" if name.endswith("diffusion") else name: path for name, path in made.files.items()}
    return Session.open(ModelFiles(**files), device, Cache(folder / "graphs"))


@pytest.mark.parametrize(("family", "ends"), [("wan2.1-flf2v", True), ("wan2.2-5b", False)])
def test_a_film_of_pictures_is_that_of_diffusers(family: str, ends: bool, device: Device, folder: Path) -> None:
    made = make(family, folder / family, form="parts")
    first, last = picture(1), picture(2) if ends else None
    with opened(made, device, folder) as session:
        (film,) = session.generate_video(asked(init_image=first, end_image=last))
        frames = np.stack(list(film.frames))
        pixels, channels = session.model.pixels, session.model.latent_channels
    shape = (channels, 1 + (FRAMES - 1) // 4, SIDE // pixels, SIDE // pixels)
    noise = make_rng("cuda", 5).normal(int(np.prod(shape))).reshape(shape)
    sigmas = make_sigmas("discrete", STEPS, prediction("sd3_flow", shift=5.0)).tolist()
    pipeline = made.pipeline()
    if not isinstance(pipeline, WanImageToVideoPipeline):
        make_other: Any = WanImageToVideoPipeline
        pipeline = make_other(**pipeline.components, expand_timesteps=True)
    end = None if last is None else Image.fromarray(last)
    drawing = Drawing(
        "a lovely cat", noise, sigmas, "blurry", 4.0, pixels=pixels, image=Image.fromarray(first), last=end
    )  # fmt: skip
    wanted = draw(pipeline, drawing).pixels
    assert frames.shape == wanted.shape == (FRAMES, SIDE, SIDE, 3)
    assert wanted.std() > 0.01, "something is to be seen"
    assert psnr(frames, wanted) >= BOUNDS["exact"]


@pytest.mark.parametrize(
    ("family", "ends", "reason"),
    [
        ("wan2.2-i2v", (), "makes films of pictures: name the one to begin with"),
        ("wan2.1-flf2v", ("init_image",), "this model wants one to end with, too"),
        ("wan2.1-i2v", ("init_image", "end_image"), "this model sees the first one alone"),
        ("wan2.2-5b", ("init_image", "end_image"), "only films of models of pictures to video"),
        ("wan", ("init_image",), "makes films of texts alone"),
    ],
)
def test_pictures_that_a_model_can_not_take_are_refused(
    family: str, ends: tuple[str, ...], reason: str, device: Device, folder: Path
) -> None:
    request = asked(**{name: np.zeros((10, 20, 3), np.uint8) for name in ends})
    made = make(family, folder / family, form="parts")
    with opened(made, device, folder) as session, pytest.raises(InvalidValue, match=reason):
        session.settings(request, video=True)
