"""Refusals name a field as the request that was sent calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import BaseModel

from sdrpc.diffusion.request import Request
from sdrpc.errors import DoesNotFit, InvalidValue, Room
from sdrpc.web.api import native, openai
from sdrpc.web.api.a1111 import drawing, extras
from sdrpc.web.api.common import naming
from sdrpc.web.jobs import marked, told
from tests.web.process import SMALL, WebServer

FORM = {"image", "mask"}
"""What OpenAI's edits have beside the fields of their form."""

TABLES: Mapping[str, tuple[Mapping[str, str], tuple[type[BaseModel], ...], set[str]]] = {
    "native": (native.CALLED, (native.ImageRequest, native.VideoRequest), set()),
    "a1111": (drawing.CALLED, (drawing.FromText, drawing.FromPicture), {"override_settings.sd_model_checkpoint"}),
    "openai": (openai.CALLED, (openai.Edit,), FORM),
    "enlarging": (extras.CALLED, (extras.Enlarge,), set()),
}


def _has(model: Any, path: str) -> bool:
    """Whether a body has a field there."""
    name, _, rest = path.partition(".")
    if name not in model.model_fields:
        return False
    return not rest or _has(model.model_fields[name].annotation, rest)


@pytest.mark.parametrize("api", TABLES)
def test_what_a_field_is_called_is_a_field(api: str) -> None:
    """Of this API, or of the JSON that its prompt can carry."""
    called, bodies, more = TABLES[api]
    within = () if api == "native" else TABLES["native"][1]
    assert [
        name for name in called.values() if name not in more and not any(_has(b, name) for b in bodies + within)
    ] == []


@pytest.mark.parametrize("kind", [native.ImageRequest, native.VideoRequest])
def test_each_field_of_a_request_has_a_name_there(kind: type[native.Asked]) -> None:
    asked = kind.model_validate({"hires": {"enabled": True}} if kind is native.ImageRequest else {})
    known = native.fields_of(asked).keys() & vars(Request("")).keys()
    assert [name for name in known if not _has(kind, native.CALLED.get(name, name))] == []


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/sdcpp/v1/img_gen", {"sample_params": {"scheduler": "x"}}, "sample_params.scheduler"),
        ("/sdcpp/v1/img_gen", {"hires": {"enabled": True, "upscaler": "x"}}, "hires.upscaler"),
        ("/sdcpp/v1/img_gen", {"lora": [{"path": "x"}]}, "lora"),
        ("/sdcpp/v1/img_gen", {"mask_image": "AAAA"}, "mask_image"),
        ("/sdapi/v1/txt2img", {"prompt": "a cat", "enable_hr": True, "hr_upscaler": "x"}, "hr_upscaler"),
        ("/sdapi/v1/txt2img", {"prompt": "<sd_cpp_extra_args>{\"sample_params\": {\"eta\": 1e30}}</sd_cpp_extra_args>"},
         "eta"),
        ("/v1/images/generations", {"prompt": "a cat", "sampling_method": "x"}, "sampling_method"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_that_was_sent(server: WebServer, path: str, body: dict[str, Any], says: str) -> None:
    answer = server.ask(path, (SMALL if path.startswith("/sdcpp") else {}) | body)
    assert answer.status == 400, answer.body
    assert answer.json()["error"]["param"] == says
    assert answer.error.startswith(f"{says} ")


SAMPLER = "euler_cfg_pp"
"""It follows the negative prompt, which is known to be there when it is drawn."""


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/sdapi/v1/txt2img", {"prompt": "a cat", "width": 64, "height": 64, "steps": 1, "cfg_scale": 1.0,
                               "sampler_name": SAMPLER, "override_settings": {"sd_model_checkpoint": "tiny"}},
         "cfg_scale"),
        ("/v1/images/generations", {"prompt": "a cat", "size": "64x64", "steps": 1, "cfg_scale": 1, "model": "tiny",
                                    "sampling_method": SAMPLER}, "cfg_scale"),
        ("/sdcpp/v1/img_gen", {"sample_params": {"sample_steps": 1, "sample_method": SAMPLER,
                                                 "guidance": {"txt_cfg": 1}}}, "sample_params.guidance.txt_cfg"),
    ],
)  # fmt: skip
def test_a_job_that_fails_names_the_field_that_was_sent(
    server: WebServer, path: str, body: dict[str, Any], says: str
) -> None:
    if path.startswith("/sdcpp"):
        job = server.until(server.submit(**body), "failed")
        message = str(job["error"]["message"])
    else:
        message = server.ask(path, body).error
        job = server.ask("/sdcpp/v1/jobs?most=1").json()[0]
        assert job["error"]["message"].startswith("sample_params.guidance.txt_cfg 1: ")  # who looks at it there
    assert message.startswith(f"{says} 1: ")
    assert message.isprintable()


def test_what_is_kept_of_an_error_has_its_fields() -> None:
    """Also those in its reason, and options of the server where a request has no such field."""
    kept = marked(InvalidValue("steps", 0, "at least 1, or a scheduler", "scheduler"))
    assert told(kept, naming(native.CALLED)) == (
        "sample_params.sample_steps 0: at least 1, or a sample_params.scheduler"
    )
    assert told(kept, str) == "steps 0: at least 1, or a scheduler"
    room = DoesNotFit({"vae": 1 << 30}, {"RPC0": [Room(1 << 20, True)]}, "raise max_vram")
    assert told(marked(room), naming(native.CALLED)).endswith("raise --max-vram")
    assert told("an error of an older server", naming(native.CALLED)) == "an error of an older server"
