"""Previews: what they show and when; tiny autoencoders; tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdrpc.diffusion.device_model import DeviceModel
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.pictures import Pixels, to_pixels
from sdrpc.diffusion.previews import projected
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.diffusion.tiles import Cell, Tiling, tiled
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import CheckpointError, InvalidValue, OutOfMemory
from sdrpc.families.base import Colours
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.registry import FAMILIES
from sdrpc.runtime.cache import Cache
from tests.support.references.draw import psnr

SMALL = Request("a cat", width=128, height=64, steps=4, sampling_method="euler", cfg_scale=1.0)


@pytest.fixture(scope="module")
def device() -> Iterator[LocalDevice]:
    made = LocalDevice("CPU", torch.device("cpu"), EXACT)
    yield made
    made.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def tiny_autoencoder() -> Any:
    torch.manual_seed(4)
    make: Any = diffusers.AutoencoderTiny
    return make(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4).eval()


def saved(module: Any, path: Path, original: bool = False) -> Path:
    """In diffusers' form, or the decoder alone as its author publishes it."""
    state = {name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}
    if original:
        layers = {n.removeprefix("decoder.layers."): t for n, t in state.items() if n.startswith("decoder.")}
        state = {f"{int(n.split('.')[0]) + 1}.{n.split('.', 1)[1]}": tensor for n, tensor in layers.items()}
    save_file(state, path)
    return path


def shown(session: Session, request: Request) -> tuple[dict[int, Pixels], Pixels]:
    """The previews by the number of steps that were done, and the picture."""
    events: list[Event] = []
    (picture,) = session.generate(request, events.append)
    return {event.done: event.preview for event in events if event.preview is not None}, picture.image


def test_colours_are_a_linear_function_of_each_latent() -> None:
    latents = np.array([[[[1, 0]], [[0, 2]]]], np.float32)
    colours = Colours(((0.5, 0, -1), (0, 0.25, 0)), (0, 0, 0.5))
    np.testing.assert_array_equal(projected(latents, colours), [[[191, 128, 64], [128, 191, 191]]])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_published_colours_fit_their_latents(family: Any) -> None:
    if family.latents.colours is None:
        pytest.skip("nobody has published any")
    channels = 4 if family.name in ("sd1", "sd2", "sdxl", "pixart-alpha", "pixart-sigma") else 16
    assert np.shape(family.latents.colours.factors) == (channels, 3)


def test_previews_come_when_they_are_wanted(tiny: Path, device: LocalDevice, cache: Cache) -> None:
    with Session.open(tiny, device, cache) as session:
        plain, picture = shown(session, SMALL)
        assert plain == {}
        every, again = shown(session, replace(SMALL, preview="proj"))
        np.testing.assert_array_equal(again, picture)
        assert list(every) == [1, 2, 3], "the last step is followed by the picture"
        assert every[1].shape == (8, 16, 3)
        second, _ = shown(session, replace(SMALL, preview="proj", preview_interval=2))
        np.testing.assert_array_equal(second[2], every[2])
        assert list(second) == [2]
        noisy, _ = shown(session, replace(SMALL, preview="proj", preview_noisy=True, preview_interval=3))
        assert not np.array_equal(noisy[3], every[3])


def test_the_vae_shows_what_would_be_the_picture(tiny: Path, device: LocalDevice, cache: Cache) -> None:
    """With two steps the guess after the first is the picture of one step."""
    with Session.open(tiny, device, cache) as session:
        previews, _ = shown(session, replace(SMALL, preview="vae", sigmas=(14.0, 7.0, 0.0)))
        _, picture = shown(session, replace(SMALL, sigmas=(14.0, 0.0)))
        np.testing.assert_array_equal(previews[1], picture)


@pytest.mark.parametrize("original", [False, True], ids=["diffusers", "author"])
def test_a_tiny_autoencoder_decodes_as_in_diffusers(
    tiny: Path, device: LocalDevice, cache: Cache, tiny_autoencoder: Any, tmp_path: Path, original: bool
) -> None:
    files = ModelFiles(tiny, taesd=saved(tiny_autoencoder, tmp_path / "tae.safetensors", original))
    with Session.open(files, device, cache) as session:
        settings = session.settings(SMALL)
        latents = session.sampling.sample(
            replace(settings, prediction="eps"), 42, session.conditioning.conditions(settings)
        )
        with torch.no_grad():
            wanted = to_pixels(tiny_autoencoder.decode(torch.from_numpy(latents)).sample[0].numpy())
        previews, picture = shown(session, replace(SMALL, preview="tae"))
        assert psnr(picture, wanted) >= 45
        assert previews[1].shape == picture.shape
        _, by_vae = shown(session, replace(SMALL, taesd_preview_only=True))
        assert psnr(picture, by_vae) < 30
        assert not session.unused()


def test_a_tiny_autoencoder_of_another_family_is_refused(tiny: Path, tmp_path: Path) -> None:
    make: Any = diffusers.AutoencoderTiny
    other = make(latent_channels=16, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with pytest.raises(CheckpointError, match="taesd gives 16 channels, but vae takes 4"):
        open_model(ModelFiles(tiny, taesd=saved(other, tmp_path / "tae.safetensors")))
    with pytest.raises(CheckpointError, match="has no tiny autoencoder"):
        open_model(ModelFiles(tiny, taesd=tiny))


@pytest.mark.parametrize(
    ("field", "value"),
    [("preview", "x"), ("preview", "tae"), ("preview_interval", 0), ("vae_tile_size", (4, 32)),
     ("vae_tile_overlap", 0.95), ("vae_tile_overlap", float("nan"))],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(tiny: Path, device: LocalDevice, field: str, value: Any) -> None:
    given = {"preview": "proj", field: value}
    with Session.open(tiny, device) as session, pytest.raises(InvalidValue) as caught:
        session.settings(Request("", **given))
    assert caught.value.field == field


# Tiles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("height", "width"), [(20, 33), (8, 8), (5, 40), (9, 9)])
def test_tiles_of_what_is_local_are_the_whole(height: int, width: int, overlap: float) -> None:
    x = np.random.default_rng(1).normal(size=(1, 2, height, width)).astype(np.float32)
    sizes = set()

    def larger(piece: np.ndarray) -> np.ndarray:
        sizes.add(piece.shape)
        return np.repeat(np.repeat(piece[:, :1] * 2, 3, 2), 3, 3)

    np.testing.assert_allclose(tiled(x, Tiling(8, 8, overlap), Cell(1, 3), larger), larger(x), rtol=1e-5, atol=1e-6)
    assert len(sizes - {x.shape}) <= 1, "one graph does for all"
    picture = np.repeat(np.repeat(x, 4, 2), 4, 3)
    smaller = tiled(picture, Tiling(8, 8, overlap), Cell(4, 1), lambda piece: piece[:, :, ::4, ::4])
    np.testing.assert_allclose(smaller, x, rtol=1e-5, atol=1e-6)


def test_tiles_are_as_many_as_they_have_to_be() -> None:
    x, told = np.zeros((1, 1, 8, 32), np.float32), []
    tiled(x, Tiling(16, 16, 0.5), Cell(1, 1), lambda piece: piece, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_picture_in_tiles_is_nearly_the_same(tiny: Path, device: LocalDevice, cache: Cache) -> None:
    """Not quite: the VAE's norms and its attention see a tile."""
    asked = replace(SMALL, width=256, height=128)
    with Session.open(tiny, device, cache) as session:
        _, whole = shown(session, asked)
        _, in_tiles = shown(session, replace(asked, vae_tiling=True, vae_tile_size=(16, 16)))
        assert 15 < psnr(whole, in_tiles) < 99
        _, again = shown(session, replace(asked, init_image=whole, strength=0.2, vae_tiling=True))
        assert again.shape == whole.shape


def test_it_goes_on_in_tiles_where_memory_would_not_do(
    tiny: Path, device: LocalDevice, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, run, tried = replace(SMALL, width=256, height=128, vae_tile_size=(16, 16)), DeviceModel.run, []

    def limited(self: DeviceModel, name: str, options: Any, inputs: Any, lane: int = 0) -> Any:
        if name == "vae" and inputs["latents"].size > 4 * 16 * 16:
            tried.append(inputs["latents"].shape)
            raise OutOfMemory("small", 1 << 30)
        return run(self, name, options, inputs, lane)

    with Session.open(tiny, device, cache) as session:
        _, wanted = shown(session, replace(asked, vae_tiling=True))
        monkeypatch.setattr(DeviceModel, "run", limited)
        for _ in range(2):
            np.testing.assert_array_equal(shown(session, asked)[1], wanted)
        assert len(tried) == 1, "it is remembered"
        for size in ((32, 32), (64, 32)):
            with Session.open(tiny, device, cache) as other:
                shown(other, replace(asked, vae_tile_size=size))
        monkeypatch.setattr(DeviceModel, "run", lambda *_, **_named: (_ for _ in ()).throw(OutOfMemory("small", 1)))
        with pytest.raises(OutOfMemory):
            session._vae.decode(np.zeros((1, 4, 40, 40), np.float32), Tiling(16, 16))
