"""Refusals name a field as the request that was sent calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import BaseModel

from sdrpc.diffusion.request import Request
from sdrpc.web.api import a1111, native, openai
from tests.web.process import SMALL, WebServer

FORM = {"image", "mask"}
"""What OpenAI's edits have beside the fields of their form."""

TABLES: Mapping[str, tuple[Mapping[str, str], tuple[type[BaseModel], ...], set[str]]] = {
    "native": (native.CALLED, (native.ImageRequest, native.VideoRequest), set()),
    "a1111": (a1111.CALLED, (a1111.FromText, a1111.FromPicture), {"override_settings.sd_model_checkpoint"}),
    "openai": (openai.CALLED, (openai.Edit,), FORM),
    "enlarging": (a1111.CALLED_BY_ENLARGE, (a1111.Enlarge,), set()),
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
