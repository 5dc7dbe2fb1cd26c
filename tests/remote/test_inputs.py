"""Pictures as input, through a real rpc-server: what is drawn from them is the picture of diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import sdrpc
from sdrpc import models
from sdrpc.device import Device
from sdrpc.diffusion.inputs import steps_left_out
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.rng import make_rng
from sdrpc.diffusion.session import Session
from sdrpc.diffusion.tiles import Tiling
from sdrpc.errors import InvalidValue
from sdrpc.runtime.cache import Cache
from tests.support.pictures import BOUNDS, HEIGHT, STEPS, WIDTH, Case, Checkpoints, drawing, request
from tests.support.process import ServerProcess
from tests.support.references.draw import draw, psnr

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' scheduler with numpy 2

STRENGTH = 0.6
CASES = (
    *(Case("sd1", form) for form in ("safetensors", "gguf", "diffusers")),
    Case("sd2", "safetensors"), Case("sdxl", "parts"), Case("sd3", "safetensors"), Case("flux1-dev", "parts"),
    Case("chroma", "safetensors"),
)  # fmt: skip

INPAINTING = (Case("sd1-inpaint", "safetensors"), Case("flux1-fill", "parts"))
MASKED = (*(Case("sd1", form) for form in ("safetensors", "gguf", "parts")), Case("sdxl", "parts"))


def scene() -> NDArray[np.uint8]:
    """Pixels (height, width, 3) with something coarse and something fine."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    grain = np.random.default_rng(3).integers(0, 60, (HEIGHT, WIDTH, 3))
    ramps = np.stack([rows * 3, columns, 190 - rows - columns], -1)
    return np.clip(ramps + grain, 0, 255).astype(np.uint8)


def square() -> NDArray[np.uint8]:
    """A mask (height, width) whose middle is drawn anew."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:48, 32:96] = 255
    return mask


def drawn(checkpoints: Checkpoints, case: Case, device: Device, cache: Cache, asked: Request) -> NDArray[np.uint8]:
    with Session.open(checkpoints.files(case), device, cache) as session:
        (picture,) = session.generate(asked)
    return picture.image


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_picture_begun_with_another_is_that_of_diffusers(
    case: Case, checkpoints: Checkpoints, device: Device, cache: Cache
) -> None:
    picture = drawn(checkpoints, case, device, cache, replace(request(case), init_image=scene(), strength=STRENGTH))
    begun = replace(drawing(case), image=Image.fromarray(scene()), left_out=steps_left_out(STRENGTH, STEPS))
    assert begun.left_out == 1
    wanted = draw(checkpoints.made(case).pipeline(), begun).pixels
    assert psnr(picture, wanted) >= BOUNDS["exact"]


@pytest.mark.parametrize("case", [*MASKED], ids=str)
def test_what_a_mask_leaves_stays_as_in_diffusers(
    case: Case, checkpoints: Checkpoints, device: Device, cache: Cache
) -> None:
    asked = replace(request(case), init_image=scene(), mask=square(), strength=STRENGTH)
    picture = drawn(checkpoints, case, device, cache, asked)
    begun = replace(
        drawing(case), image=Image.fromarray(scene()), mask=Image.fromarray(square()),
        left_out=steps_left_out(STRENGTH, STEPS),
    )  # fmt: skip
    wanted = draw(checkpoints.made(case).pipeline(), begun).pixels
    assert psnr(picture, wanted) >= BOUNDS["exact"]


@pytest.mark.parametrize("case", [Case("flux1-dev", "parts"), Case("flux2-klein-4b", "parts")], ids=str)
def test_a_reference_is_seen_as_in_diffusers(
    case: Case, checkpoints: Checkpoints, device: Device, cache: Cache
) -> None:
    """FLUX.1 Kontext has the tensors of dev."""
    picture = drawn(checkpoints, case, device, cache, replace(request(case), ref_images=(scene(),)))
    wanted = draw(checkpoints.made(case).pipeline(), replace(drawing(case), shown=(Image.fromarray(scene()),))).pixels
    near = psnr(picture, wanted)
    assert near >= BOUNDS["exact"]
    assert psnr(picture, checkpoints.wanted(case)) < near - 5, "it makes a difference"


def test_several_references_are_seen(checkpoints: Checkpoints, device: Device, cache: Cache) -> None:
    """In sizes of their own; other families refuse them."""
    case = Case("flux1-dev", "parts")
    shown = replace(request(case), steps=1, ref_images=(scene(), scene()[:, :32]))
    both = drawn(checkpoints, case, device, cache, shown)
    one = drawn(checkpoints, case, device, cache, replace(shown, ref_images=shown.ref_images[:1]))
    assert not np.array_equal(both, one)
    with pytest.raises(InvalidValue, match=r"ref_images 1: Stable Diffusion 1\.x draws without reference pictures"):
        drawn(checkpoints, CASES[0], device, cache, replace(request(CASES[0]), ref_images=(scene(),)))


@pytest.mark.parametrize("case", INPAINTING, ids=str)
def test_inpainting_models_see_what_is_around_a_mask(
    case: Case, checkpoints: Checkpoints, device: Device, cache: Cache
) -> None:
    """Guided as diffusers guides: with the picture beside the negative prompt as well."""
    asked = replace(request(case), init_image=scene(), mask=square(), strength=STRENGTH, img_cfg_scale=1.0)
    picture = drawn(checkpoints, case, device, cache, asked)
    plain = drawing(case)
    rng = make_rng(asked.rng, asked.seed)
    _, second = (rng.normal(plain.noise.size).reshape(plain.noise.shape) for _ in range(2))
    begun = replace(
        plain, image=Image.fromarray(scene()), mask=Image.fromarray(square()), masked_noise=second,
        left_out=steps_left_out(STRENGTH, STEPS),
    )  # fmt: skip
    wanted = draw(checkpoints.made(case).pipeline(), begun).pixels
    assert psnr(picture, wanted) >= BOUNDS["exact"]


def test_what_is_around_a_mask_is_guided_on_its_own(checkpoints: Checkpoints, device: Device, cache: Cache) -> None:
    """Three evaluations a step, which become two where the scales are equal or it is 1."""
    case = INPAINTING[0]
    asked = replace(request(case), steps=1, cfg_scale=3.0, init_image=scene(), mask=square(), strength=1.0)
    pictures = {}
    for scale in (None, 3.0, 2.999, 1.0, 1.001):
        pictures[scale] = drawn(checkpoints, case, device, cache, replace(asked, img_cfg_scale=scale)).astype(int)
    np.testing.assert_array_equal(pictures[None], pictures[3.0])
    assert np.abs(pictures[3.0] - pictures[2.999]).max() <= 1
    assert np.abs(pictures[1.0] - pictures[1.001]).max() <= 1
    assert np.abs(pictures[1.0] - pictures[3.0]).max() > 3
    with pytest.raises(InvalidValue, match=r"img_cfg_scale 2: .* inpainting model"):
        drawn(checkpoints, CASES[0], device, cache, replace(request(CASES[0]), img_cfg_scale=2))


def test_skipped_layers_guide_as_in_diffusers(checkpoints: Checkpoints, device: Device, cache: Cache) -> None:
    """The shares are of steps in diffusers, of one more in stable-diffusion.cpp: both mean the second step."""
    case = Case("sd3", "safetensors")
    asked = replace(request(case), slg_scale=3.0, skip_layers=(1,), skip_layer_start=0.3, skip_layer_end=0.75)
    picture = drawn(checkpoints, case, device, cache, asked)
    wanted = draw(checkpoints.made(case).pipeline(), replace(drawing(case), skip=(3.0, (1,), 0.3, 0.6))).pixels
    assert psnr(picture, wanted) >= BOUNDS["exact"]
    assert psnr(picture, checkpoints.wanted(case)) < BOUNDS["exact"] - 10
    for refused, given in ((case, {"skip_layers": (3,)}), (CASES[0], {})):
        with pytest.raises(InvalidValue, match=r"skip_layers 3|slg_scale"):
            drawn(checkpoints, refused, device, cache, replace(asked, **given))


def test_a_server_with_little_memory_decodes_in_tiles(cache: Cache) -> None:
    """It refuses the whole, and closes the connection, as it does with what it can't do."""
    latents = np.random.default_rng(1).normal(size=(1, 4, 40, 40)).astype(np.float32)
    pictures = []
    for limit, tiling in (("4G", Tiling(16, 16)), ("260M", Tiling(32, 32))):
        with ServerProcess("--precision", "exact", "--device", "CPU", "--max-memory-per-client", limit) as server:
            found = sdrpc.devices(rpc=[f"127.0.0.1:{server.port}"])
            with Session.open(models.named("demo"), found["RPC0"], cache) as session:
                pictures.append(session._vae.decode(latents, tiling, always=limit == "4G"))
            for each in found.values():
                each.close()
    np.testing.assert_allclose(pictures[1], pictures[0], atol=1e-4)
