"""AUTOMATIC1111's API, with a client package of it."""

from __future__ import annotations

import base64
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdrpc.diffusion.metadata import Parameters, encode
from sdrpc.models import LORAS
from tests.support.references.draw import psnr
from tests.support.upscaler import esrgan, in_process
from tests.web.process import LONG, WebServer

webuiapi = pytest.importorskip("webuiapi")

SMALL: dict[str, Any] = {"prompt": "a cat", "steps": 1, "width": 64, "height": 64, "seed": 1, "cfg_scale": 4}
TINY = {"override_settings": {"sd_model_checkpoint": "tiny"}}


@pytest.fixture(scope="module")
def client(server: WebServer) -> Any:
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port)


def test_txt2img(client: Any) -> None:
    """What is said about pictures is what they were drawn with."""
    result = client.txt2img(**SMALL, **TINY, sampler_name="DPM++ 2M Karras", batch_size=2)
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.info["all_seeds"] == [1, 2]
    assert "Sampler: dpm++2m karras" in result.info["infotexts"][0]
    assert result.parameters["steps"] == 1
    assert "Seed: 1," in client.png_info(result.image).info


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_file_that_is_no_png_says_how_it_was_drawn_too(server: WebServer, suffix: str) -> None:
    said = Parameters("a cat", "", 64, 64, 1, 4.0, 1, "euler", "discrete", "cuda", "0.1.0")
    picture = encode(np.zeros((64, 64, 3), np.uint8), suffix, said)
    answer = server.ask("/sdapi/v1/png-info", {"image": base64.b64encode(picture).decode()})
    assert answer.json()["info"] == said.text()


def test_img2img(client: Any) -> None:
    """Without noise it is the picture, but for the VAE; a mask goes with it."""
    picture = Image.fromarray(np.full((32, 64, 3), (200, 30, 30), np.uint8))
    mask = Image.fromarray(np.full((32, 64), 255, np.uint8))
    given = {"images": [picture], **SMALL, **TINY, "steps": 4}
    kept = client.img2img(**given, denoising_strength=0.0)
    drawn = client.img2img(**given, denoising_strength=1.0, mask_image=mask, inpaint_full_res=False)
    assert kept.image.size == drawn.image.size == (64, 64)
    assert not np.array_equal(np.asarray(kept.image), np.asarray(drawn.image))


def test_a_second_pass(client: Any) -> None:
    larger = client.txt2img(
        **SMALL, **TINY, enable_hr=True, hr_upscaler="Lanczos", hr_scale=1.5, denoising_strength=0.5
    )
    assert larger.image.size == (128, 128)
    assert "Hires resize: 128x128" in larger.info["infotexts"][0]


def test_a_network_enlarges_pictures_and_what_a_second_pass_begins_with(client: Any) -> None:
    """As spandrel does it in process; what a second pass makes of it is compared in tests/remote/test_upscaling.py."""
    network = esrgan()
    shown = {each["name"]: (each["model_path"], each["scale"]) for each in client.get_upscalers()}
    assert shown["tiny-esrgan"][0].endswith("tiny-esrgan.safetensors")
    assert (shown["tiny-esrgan"][1], shown["broken"][1], shown["Lanczos"][1]) == (2, None, 4)
    small = client.txt2img(**SMALL, **TINY).image
    wanted = in_process(network, np.asarray(small))
    twice = client.extra_single_image(small, upscaler_1="tiny-esrgan", upscaling_resize=2).image
    assert psnr(np.asarray(twice), wanted) >= 45
    second = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5}
    larger, filtered = (
        client.txt2img(**SMALL, **TINY, **second, hr_upscaler=upscaler) for upscaler in ("tiny-esrgan", "Lanczos")
    )
    assert larger.image.size == (128, 128)
    assert not np.array_equal(np.asarray(larger.image), np.asarray(filtered.image))
    assert "Hires upscaler: tiny-esrgan, Hires resize: 128x128" in larger.info["infotexts"][0]
    with pytest.raises(RuntimeError, match="broken"):
        client.txt2img(**SMALL, **TINY, enable_hr=True, hr_upscaler="broken", denoising_strength=0.5)


def test_larger_pictures(client: Any) -> None:
    """By a filter: as Pillow does it. In another shape what is around the middle is kept."""
    picture = Image.fromarray(np.arange(32 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 64, 3))
    twice = client.extra_single_image(picture, upscaler_1="Lanczos", upscaling_resize=2)
    wanted = picture.resize((128, 64), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(twice.image), np.asarray(wanted))
    square = client.extra_single_image(
        picture, upscaler_1="Nearest", resize_mode=1, upscaling_resize_w=64, upscaling_resize_h=64
    )
    wanted = picture.crop((16, 0, 48, 32)).resize((64, 64), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(square.image), np.asarray(wanted))
    assert np.array_equal(np.asarray(client.extra_single_image(picture).image), np.asarray(picture))
    assert {"None", "Lanczos", "Nearest"} <= {each["name"] for each in client.get_upscalers()}
    with pytest.raises(RuntimeError, match="upscaler_1 none: there is no such upscaler; there are Lanczos, Nearest"):
        client.extra_single_image(picture, upscaler_1="none")


def test_what_there_is(client: Any) -> None:
    assert {model["title"] for model in client.get_sd_models()} == {"demo", "tiny"}
    assert {"Euler a", "DPM++ 2M", "res_multistep"} <= {each["name"] for each in client.get_samplers()}
    assert {"automatic", "karras"} <= {each["name"] for each in client.get_schedulers()}
    assert [(lora["name"], Path(lora["path"])) for lora in client.get_loras()] == list(LORAS.items())
    assert client.get_memory()["cuda"]["system"]["total"] > 0


def test_the_chosen_model(client: Any) -> None:
    client.util_set_model("tiny")
    assert client.util_get_current_model() == "tiny"
    assert client.txt2img(**SMALL).info["sd_model_name"] == "tiny"
    client.util_set_model("demo")


def test_progress_and_interruption(client: Any, server: WebServer) -> None:
    """A job in the queue shows, and ends, without what waits for it being hung up on."""
    failures: list[Exception] = []

    def draw() -> None:
        try:
            client.txt2img(**SMALL | {"steps": LONG["sample_params"]["sample_steps"]}, **TINY)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    while not client.get_progress()["state"]["sampling_step"]:
        assert thread.is_alive()
    assert 0 < client.get_progress()["progress"] < 1
    client.interrupt()
    thread.join(120)
    assert not thread.is_alive()
    assert "the job was cancelled" in str(failures[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"enable_hr": True, "hr_upscaler": "x"}, "hr_upscaler x: there is no such upscaler; there are Latent"),
        ({"sampler_name": "PLMS"}, "sampler_name"),
        ({"styles": ["x"]}, "styles"),
        ({"script_name": "x/y plot"}, "script_name"),
        ({"steps": 100_000}, "steps: Input should be less than or equal to 500"),
    ],
)
def test_refusals(client: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        client.txt2img(**SMALL | changes, **TINY)
