"""Parameters in PNG files are what the real sd-cli writes."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from sdrpc.diffusion.metadata import MAX_COMMENT, Parameters, encode

PARAMETERS = Parameters(
    prompt="a (lovely:1.3) cat", negative_prompt="blurry", width=128, height=192, steps=6, cfg_scale=5.0, seed=7,
    sampler="euler", scheduler="karras", rng="cuda", version="1.0", models={"model": "sd15.safetensors"},
)  # fmt: skip
REFERENCE = Path(__file__).parent.parent / "data" / "reference"


def native(name: str) -> str:
    with Image.open(REFERENCE / name) as image:
        return image.info["parameters"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("euler-karras-cuda.png", PARAMETERS),
        (
            "euler-discrete-cuda-clipskip2.png",
            replace(
                PARAMETERS, prompt="a lovely cat", negative_prompt="", height=128, cfg_scale=7.0, seed=42,
                scheduler="discrete", clip_skip=2,
            ),
        ),
    ],
)  # fmt: skip
def test_text_and_json_are_those_of_sd_cli(name: str, parameters: Parameters) -> None:
    """But for who drew it."""
    (theirs, their_json), (ours, our_json) = (
        text.split(", Version: ", 1) for text in (native(name), parameters.text())
    )
    assert ours == theirs
    assert our_json.startswith("sdrpc, SDCPP: ")
    them, us = (json.loads(text.split("SDCPP: ", 1)[1]) for text in (their_json, our_json))
    assert us.pop("generator")["name"] == "sdrpc"
    them.pop("generator")
    assert us == them


def test_names_of_parts_and_eta_appear() -> None:
    models = {"diffusion_model": "u.gguf", "vae": "v.gguf", "clip_l": "c.gguf"}
    text = replace(PARAMETERS, models=models, eta=0.5).text()
    assert "Model: , " in text
    assert "TE: c.gguf, Unet: u.gguf, VAE: v.gguf" in text
    assert "Eta: 0.500000" in text


def test_the_strength_of_a_controlnet_is_written() -> None:
    _, written = replace(PARAMETERS, control_strength=0.5).text().split("SDCPP: ", 1)
    assert json.loads(written)["control_strength"] == 0.5


@pytest.mark.parametrize(("prompt", "chunk"), [("a cat", b"tEXt"), ("café", b"tEXt"), ("猫 🐱", b"iTXt")])
def test_png_carries_the_parameters(prompt: str, chunk: bytes) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    parameters = replace(PARAMETERS, prompt=prompt)
    data = encode(image, ".png", parameters)
    assert chunk + b"parameters\0" in data
    with Image.open(BytesIO(data)) as read:
        assert read.info["parameters"] == parameters.text()
        np.testing.assert_array_equal(np.asarray(read), image)


def test_png_without_parameters() -> None:
    data = encode(np.zeros((8, 8, 3), np.uint8), ".png", None)
    assert b"parameters" not in data


@pytest.mark.parametrize("prompt", ["a cat", "café <b> & 猫 🐱", "two\nlines"])
@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_other_formats_keep_the_parameters_where_sd_cli_does(suffix: str, prompt: str) -> None:
    """JPEG: a comment that begins with the keyword and a zero. WebP: an element of the XMP."""
    ramp = np.linspace(0, 255, 64 * 48, dtype=np.float64).reshape(64, 48, 1)
    image = np.repeat(ramp, 3, axis=2).astype(np.uint8)
    parameters = replace(PARAMETERS, prompt=prompt)
    with Image.open(BytesIO(encode(image, suffix, parameters))) as read:
        read.load()
        if suffix == ".webp":
            name = "{https://github.com/leejet/stable-diffusion.cpp/ns/1.0/}parameters"
            element = ElementTree.fromstring(read.info["xmp"].decode()).find(f".//{name}")
            assert element is not None
            text = element.text
        else:
            keyword, _, comment = read.info["comment"].partition(b"\0")
            assert keyword == b"parameters"
            text = comment.decode()
        assert text == parameters.text()
        assert np.abs(np.asarray(read).astype(int) - image).mean() < 4  # levels of 255: smooth pictures survive


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_other_formats_without_parameters(suffix: str) -> None:
    assert b"parameters" not in encode(np.zeros((8, 8, 3), np.uint8), suffix, None)


def test_a_jpeg_has_no_room_for_a_long_prompt(caplog: pytest.LogCaptureFixture) -> None:
    """The picture is written all the same, and it is said."""
    data = encode(np.zeros((8, 8, 3), np.uint8), ".jpg", replace(PARAMETERS, prompt="x" * MAX_COMMENT))
    assert data[:2] == b"\xff\xd8"
    assert b"parameters" not in data
    assert "no room" in caplog.text


def test_names_of_files_that_are_no_text_are_written_all_the_same() -> None:
    parameters = replace(PARAMETERS, models={"model": "caf\udce9.safetensors"})
    for suffix in (".png", ".jpg", ".webp"):
        assert "caf\ufffd.safetensors".encode() in encode(np.zeros((8, 8, 3), np.uint8), suffix, parameters)
