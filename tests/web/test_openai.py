"""OpenAI's images API, with OpenAI's own client."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.web.process import WebServer

openai = pytest.importorskip("openai")

SMALL = {"model": "tiny", "prompt": "a cat", "size": "64x64"}
STEPS = {"steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def client(server: WebServer) -> openai.OpenAI:  # type: ignore[name-defined]
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)


def pixels(data: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))).convert("RGB"))


def png(array: NDArray[np.uint8], mode: str | None = None) -> bytes:
    buffer = BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


def test_models(client: openai.OpenAI) -> None:  # type: ignore[name-defined]
    """A file that is no model is not in the list."""
    assert {model.id for model in client.models.list()} == {"demo", "tiny"}
    assert client.models.retrieve("tiny").id == "tiny"


def test_generations(client: openai.OpenAI) -> None:  # type: ignore[name-defined]
    """As many as were asked for, the same for the same seed, in the format that was asked for."""
    first = client.images.generate(**SMALL, n=2, extra_body=STEPS)
    assert [pixels(each.b64_json).shape for each in first.data] == [(64, 64, 3)] * 2
    again = client.images.generate(**SMALL, extra_body={"steps": 1, "seed": 2})
    np.testing.assert_array_equal(pixels(again.data[0].b64_json), pixels(first.data[1].b64_json))
    other = client.images.generate(**SMALL, output_format="webp", output_compression=20, extra_body=STEPS)
    assert Image.open(BytesIO(base64.b64decode(other.data[0].b64_json))).format == "WEBP"


def test_extra_arguments_in_a_prompt(client: openai.OpenAI) -> None:  # type: ignore[name-defined]
    plain = client.images.generate(**SMALL, extra_body={"steps": 1, "seed": 9, "cfg_scale": 2})
    extra = '{"seed": 9, "sample_params": {"sample_steps": 1, "guidance": {"txt_cfg": 2}}}'
    within = client.images.generate(**SMALL | {"prompt": f"a cat <sd_cpp_extra_args>{extra}</sd_cpp_extra_args>"})
    np.testing.assert_array_equal(pixels(within.data[0].b64_json), pixels(plain.data[0].b64_json))


def test_a_stream(client: openai.OpenAI) -> None:  # type: ignore[name-defined]
    """Partial pictures, then the whole one, as events of the client's own types."""
    events = list(client.images.generate(**SMALL, stream=True, partial_images=2, extra_body={"steps": 4, "seed": 1}))
    assert [event.type for event in events[:-1]] == ["image_generation.partial_image"] * (len(events) - 1)
    assert events[-1].type == "image_generation.completed"
    assert pixels(events[-1].b64_json).shape == (64, 64, 3)
    assert 1 < len(events) <= 3


def test_edits(client: openai.OpenAI) -> None:  # type: ignore[name-defined]
    """A mask is transparent where the picture is drawn anew; what is opaque stays, but for the VAE."""
    picture = np.full((64, 64, 3), (200, 30, 30), np.uint8)
    mask = np.zeros((64, 64, 4), np.uint8)
    mask[:, :32, 3] = 255
    files = {"image": ("a.png", png(picture)), "mask": ("m.png", png(mask))}
    edited = client.images.edit(**SMALL, **files, extra_body={**STEPS, "strength": 1})
    whole = client.images.edit(**SMALL, image=("a.png", png(picture)), extra_body={**STEPS, "strength": 1})
    masked, unmasked = pixels(edited.data[0].b64_json), pixels(whole.data[0].b64_json)
    assert masked.shape == unmasked.shape == (64, 64, 3)
    assert not np.array_equal(masked, unmasked)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "nothing"}, "model nothing: there is no such model; there are demo, tiny"),
        ({"size": "9x"}, "size: String should match pattern"),
        ({"background": "transparent"}, "background: Input should be 'auto' or 'opaque'"),
        ({"n": 99}, "n: Input should be less than or equal to 16"),
        ({"extra_body": {"steps": "many"}}, "steps: Input should be a valid integer"),
        ({"extra_body": {"nonsense": 1}}, "nonsense: this server knows no such field"),
        ({"extra_body": {"scheduler": "x"}}, "scheduler x: does not exist"),
        ({"output_format": "svg"}, "output_format: Input should be 'png', 'jpeg' or 'webp'"),
        ({"size": "100000x9"}, "size: String should match pattern"),
        ({"size": "9999x9999"}, "size 9999x9999: a side can have 4096 pixels"),
    ],
)
def test_refusals(client: openai.OpenAI, changes: dict[str, object], says: str) -> None:  # type: ignore[name-defined]
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**SMALL | changes)
    assert says in refused.value.message


def test_pictures_that_are_none(client: openai.OpenAI) -> None:  # type: ignore[name-defined]
    with pytest.raises(openai.BadRequestError, match="image '7 bytes': is a web page, not a picture"):
        client.images.edit(**SMALL, image=("a.png", b"<html/>"))


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b'{"prompt": 1}', b"\xff"])
def test_bodies_that_are_none(server: WebServer, body: bytes) -> None:
    assert server.ask("/v1/images/generations", body).status == 400
