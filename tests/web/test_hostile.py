"""T58, T59 and T60 of the hostile inputs, over every API: names of files, pictures that are bombs, sizes."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import pytest

from sdrpc.web.api.described import PIXEL
from tests.web.process import SMALL, WebServer

NAMES = ("../tiny", "/etc/passwd", "tiny\0", "..\\tiny", "a/../../tiny")
OPENAI = {"prompt": "a cat", "size": "64x64", "steps": 1, "model": "tiny"}
MODEL = "sd_model_checkpoint"
A1111 = {"prompt": "a cat", "steps": 1, "width": 64, "height": 64, "override_settings": {MODEL: "tiny"}}

NAMING: dict[str, tuple[str, Any]] = {
    "a model": ("/sdcpp/v1/img_gen", lambda name: SMALL | {"model": name}),
    "a model of OpenAI's": ("/v1/images/generations", lambda name: OPENAI | {"model": name}),
    "a model of A1111's": ("/sdapi/v1/txt2img", lambda name: A1111 | {"override_settings": {MODEL: name}}),
    "A1111's option": ("/sdapi/v1/options", lambda name: {MODEL: name}),
    "a LoRA": ("/sdcpp/v1/img_gen", lambda name: SMALL | {"lora": [{"path": name}]}),
    "a LoRA of A1111's": ("/sdapi/v1/txt2img", lambda name: A1111 | {"lora": [{"path": name}]}),
    "a LoRA in a prompt": ("/v1/images/generations", lambda name: OPENAI | {"prompt": f"<lora:{name}:1>"}),
    "an upscaler": (
        "/sdapi/v1/extra-single-image",
        lambda name: {"image": base64.b64encode(png(8, 8)).decode(), "upscaler_1": name},
    ),
    "a second pass": ("/sdcpp/v1/img_gen", lambda name: SMALL | {"hires": {"enabled": True, "upscaler": name}}),
    "a sampler": ("/sdcpp/v1/img_gen", lambda name: SMALL | {"sample_params": {"sample_method": name}}),
}  # fmt: skip
"""What names something → where, and the body."""

BOMB_SIDE = 65000


def png(width: int, height: int) -> bytes:
    """A picture of that size; of the bomb's, what its header says."""
    header = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\2\0\0\0"
    )
    rows = zlib.compress((b"\0" + b"\x5a" * 3 * width) * height) if width < BOMB_SIDE else b""
    return header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("what", NAMING)
def test_names_lead_nowhere_else(server: WebServer, what: str) -> None:
    """T58: each is refused by name, and none is ever part of a path."""
    path, body = NAMING[what]
    for name in NAMES:
        answer = server.ask(path, body(name))
        assert answer.status == 400, (name, answer.body)
        assert "root:" not in answer.error
    assert server.ask("/health").status == 200


PICTURES: dict[str, Any] = {
    "/sdcpp/v1/img_gen": lambda picture: SMALL | {"init_image": picture},
    "/sdapi/v1/img2img": lambda picture: A1111 | {"init_images": [picture]},
    "/sdapi/v1/extra-single-image": lambda picture: {"image": picture, "upscaler_1": "Lanczos"},
    "/sdapi/v1/png-info": lambda picture: {"image": picture},
}


@pytest.mark.parametrize("path", PICTURES)
def test_a_bomb_is_refused_before_it_is_decoded(server: WebServer, path: str) -> None:
    """T59: 65,000 × 65,000 pixels in a few bytes, and what is cut off."""
    for data, says in ((png(BOMB_SIDE, BOMB_SIDE), "pixels"), (png(64, 64)[:60], "picture")):
        answer = server.ask(path, PICTURES[path](base64.b64encode(data).decode()))
        assert (answer.status, says in answer.error) == (400, True), answer.body


LONG: dict[str, tuple[str, Any, str]] = {
    "a prompt": ("/sdcpp/v1/img_gen", SMALL | {"prompt": "(" * (1 << 20)}, "is longer than 32768 characters"),
    "a prompt of OpenAI's": ("/v1/images/generations", OPENAI | {"negative_prompt": "[" * (1 << 20)}, "is longer than"),
    "arguments without end": (
        "/v1/images/generations", OPENAI | {"prompt": "<sd_cpp_extra_args>" * (1 << 16)}, "is longer than",
    ),
    "LoRAs": ("/sdcpp/v1/img_gen", SMALL | {"lora": [{"path": "a"}] * (1 << 16)}, "can have 256 KiB"),
    "a sampler": (
        "/sdapi/v1/txt2img", A1111 | {"sampler_name": "euler" + " karras" * (1 << 12)}, "does not exist",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LONG)
def test_texts_have_a_limit(server: WebServer, what: str) -> None:
    """A prompt of a million parentheses took 41 seconds, in which nobody else was answered, and each text stayed."""
    path, body, says = LONG[what]
    answer = server.ask(path, body)
    assert (answer.status, says in answer.error) == (400, True), answer.body[:1000]


MANY: dict[str, Any] = {
    "/sdcpp/v1/img_gen": lambda pictures: SMALL | {"ref_images": pictures},
    "/sdapi/v1/txt2img": lambda pictures: A1111 | {"extra_images": pictures},
}  # fmt: skip


@pytest.mark.parametrize("path", MANY)
def test_many_pictures_have_a_limit_together(server: WebServer, path: str) -> None:
    """Each may have 64 mebipixels, in a file of nearly nothing: a request of 60 MB took 44 GB."""
    large = base64.b64encode(png(8192, 8192)).decode()
    for pictures, says in (([large] * 3, "the pictures have 192 mebipixels"), ([PIXEL] * 17, "can have 16 pictures")):
        answer = server.ask(path, MANY[path](pictures))
        assert (answer.status, says in answer.error) == (400, True), answer.body


SIZES: dict[str, Any] = {
    "/sdcpp/v1/img_gen": lambda width, height, count: SMALL | {"width": width, "height": height, "batch_count": count},
    "/sdapi/v1/txt2img": lambda width, height, count: A1111 | {"width": width, "height": height, "batch_size": count},
    "/v1/images/generations": lambda width, height, count: OPENAI | {"size": f"{width}x{height}", "n": count},
}


@pytest.mark.parametrize("path", SIZES)
@pytest.mark.parametrize(
    "size", [(-8, 64, 1), (0, 64, 1), (64, 4104, 1), (1 << 80, 64, 1), (64, 64, 0), (64, 64, 17), (64, 64, 1 << 80)]
)
def test_sizes_have_a_limit(server: WebServer, path: str, size: tuple[int, int, int]) -> None:
    """T60: of a side, and of how many."""
    answer = server.ask(path, SIZES[path](*size))
    assert answer.status == 400, answer.body
