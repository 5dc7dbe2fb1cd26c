"""Pictures in two passes are those of two requests, one begun with the other's picture, enlarged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdrpc.diffusion.events import Event
from sdrpc.diffusion.hires import LATENT_FILTERS, UPSCALERS, enlarged_latents, second_size
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import InvalidValue
from sdrpc.families.base import Defaults
from sdrpc.runtime.cache import Cache
from tests.support.second_pass import its_noise

SMALL = Request("a cat", width=64, height=64, steps=3, sampling_method="euler", cfg_scale=1.0)


@pytest.fixture(scope="module")
def session(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    device = LocalDevice("CPU", torch.device("cpu"), EXACT)
    with Session.open(tiny, device, Cache(tmp_path_factory.mktemp("graphs"))) as made:
        yield made
    device.close()


def test_the_second_pass_begins_with_the_first_ones_picture(session: Session) -> None:
    """With the noise that follows the VAE's, as in stable-diffusion.cpp, which draws this within 50 dB."""
    (small,) = session.generate(SMALL)
    larger = np.asarray(Image.fromarray(small.image).resize((128, 128), Image.Resampling.LANCZOS))
    with its_noise(4 * 16 * 16):
        (wanted,) = session.generate(replace(SMALL, width=128, height=128, init_image=larger, strength=0.7))
    events: list[Event] = []
    (picture,) = session.generate(replace(SMALL, hires=True, hires_upscaler="Lanczos"), events.append)
    np.testing.assert_array_equal(picture.image, wanted.image)
    assert [(event.done, event.total) for event in events if event.stage == "sample" and event.over] == [(3, 3), (3, 3)]


@pytest.mark.parametrize("upscaler", [name for name in UPSCALERS if name not in {*LATENT_FILTERS} - {"Latent"}])
def test_every_way_of_enlarging_draws(session: Session, upscaler: str) -> None:
    asked = replace(SMALL, hires=True, hires_upscaler=upscaler, hires_width=128, hires_steps=2, steps=2)
    (picture,) = session.generate(asked)
    assert picture.image.shape == (128, 128, 3)
    assert picture.image.std() > 5


@pytest.mark.parametrize("upscaler", LATENT_FILTERS)
def test_latents_are_enlarged_as_torch_does_it(upscaler: str) -> None:
    """In AUTOMATIC1111's names, which say torch's mode."""
    words = upscaler.removeprefix("Latent").strip(" ()").split()
    antialias = "antialiased" in words
    mode = next((word for word in words if word != "antialiased"), "bilinear")
    latents = np.random.default_rng(1).normal(size=(1, 4, 6, 5)).astype(np.float32)
    for size in ((12, 15), (17, 8), (6, 5)):
        wanted = torch.nn.functional.interpolate(torch.from_numpy(latents), size, mode=mode, antialias=antialias)
        np.testing.assert_allclose(enlarged_latents(latents, upscaler, *size), wanted.numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("wanted", "scale", "size"),
    [((None, None), 2.0, (1024, 512)), ((None, None), 1.5, (768, 384)), ((1024, None), 9.0, (1024, 512)),
     ((None, 512), 9.0, (1024, 512)), ((640, 640), 9.0, (640, 640))],
)  # fmt: skip
def test_the_size_of_the_second_pass(wanted: Any, scale: float, size: tuple[int, int]) -> None:
    assert second_size(512, 256, wanted, scale, 64) == size


@pytest.mark.parametrize(
    ("field", "value"),
    [("hires_scale", 0.5), ("hires_scale", 17.0), ("hires_scale", float("nan")), ("hires_width", 256),
     ("hires_height", 1 << 20), ("hires_steps", -1), ("hires_denoising_strength", 1.5), ("hires_upscaler", "ESRGAN"),
     ("hires_sigmas", (1.0, 2.0)), ("hires_sigmas", (1.0,)), ("hires_sigmas", (float("nan"), 0.0)),
     ("hires_upscale_tile_size", 8), ("hires_upscale_tile_size", 1 << 20)],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        Request("", hires=True, **{field: value}).resolved(Defaults(512), (512, 512), 64)
    assert caught.value.field == field


def test_masks_have_no_second_pass(session: Session) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(InvalidValue, match="hires on"):
        session.settings(replace(SMALL, hires=True, init_image=pixels, mask=pixels[..., 0]))
