"""OpenAI's images API: generations and edits, whole or as a stream, and the list of models.

Shapes as in the ``openai`` package's types. Further fields of a :class:`sdrpc.Request` (``seed``, ``steps``,
``guidance``, ``negative_prompt`` …) are taken beside OpenAI's; those of OpenAI's that have no meaning for a diffusion
model (``quality``, ``style``, ``moderation``, ``user``) are accepted, because its clients send them.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import UploadFile

from ...errors import InvalidValue
from ..context import Context
from ..jobs import FORMATS, Job
from .common import (
    FIELDS,
    NoPicture,
    as_base64,
    context,
    over,
    pictures_of,
    server_sent,
    submit,
    user,
    watched,
)
from .masks import from_alpha
from .sdcpp import within

router = APIRouter(prefix="/v1", tags=["OpenAI"])
Here = Annotated[Context, Depends(context)]
User = Annotated[str, Depends(user)]

WITHOUT_MEANING = {"quality", "style", "moderation", "user", "safety_identifier", "input_fidelity"}
OURS = {"n", "size", "response_format", "output_format", "output_compression", "stream", "partial_images", "model",
        "prompt", "background"}  # fmt: skip
TEXTS = {"negative_prompt", "sampling_method", "scheduler", "rng", "sampler_rng", "prediction"}
"""Fields of a request that are texts."""

MAX_PARTIAL = 3

_NUMBERS = {"seed": int, "steps": int, "clip_skip": int, "cfg_scale": float, "guidance": float, "eta": float,
            "flow_shift": float, "strength": float, "width": int, "height": int, "n": int, "output_compression": int,
            "partial_images": int}  # fmt: skip
"""Fields that are numbers, also where a form sends them as text."""

_NO_TOKENS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
              "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}  # fmt: skip


class Asked:
    """A body of either endpoint, understood. Raises :class:`InvalidValue`."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        unknown = set(body) - OURS - WITHOUT_MEANING - set(_NUMBERS) - TEXTS
        if unknown:
            name = sorted(unknown)[0]
            raise InvalidValue(name, body[name], "this server knows no such field")
        given = {name: _typed(name, value) for name, value in body.items() if value is not None}
        if not isinstance(given.get("prompt"), str):
            raise InvalidValue("prompt", given.get("prompt"), "a text is needed")
        if given.get("background", "auto") not in ("auto", "opaque"):
            raise InvalidValue("background", given["background"], "pictures are opaque")
        prompt, model, native = within(given["prompt"])
        self.model: str | None = given.get("model") or model
        self.output_format: str = given.get("output_format", "png")
        if self.output_format not in FORMATS:
            raise InvalidValue("output_format", self.output_format, f"there are {', '.join(FORMATS)}")
        self.quality: int = given.get("output_compression", 100)
        self.stream = str(given.get("stream", False)).lower() == "true"
        self.partial: int = given.get("partial_images", 0)
        if not 0 <= self.partial <= MAX_PARTIAL:
            raise InvalidValue("partial_images", self.partial, f"it can be 0 … {MAX_PARTIAL}")
        self.as_url = given.get("response_format", "b64_json") == "url"
        width, height = _size(given.get("size", "auto"))
        plain = {name: value for name, value in given.items() if name in FIELDS and name in {*_NUMBERS, *TEXTS}}
        self.fields = {"seed": -1, "batch_count": given.get("n"), "width": width, "height": height}
        self.fields = {**self.fields, **native, **plain, "prompt": prompt}


def _typed(name: str, value: Any) -> Any:
    kind = _NUMBERS.get(name)
    if name in TEXTS and not isinstance(value, str):
        raise InvalidValue(name, value, "a text is needed")
    if kind is None:
        return value
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidValue(name, value, "is no number") from error


def _size(text: str) -> tuple[int | None, int | None]:
    if text == "auto":
        return None, None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(text))
    if not match:
        raise InvalidValue("size", text, "write it as 512x512, or auto")
    return int(match[1]), int(match[2])


@router.get("/models")
def models(here: Here) -> dict[str, Any]:
    """The models that can be named."""
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "created": 0, "owned_by": "local"} for name in here.shelf.models()],
    }


@router.get("/models/{name}")
def model(name: str, here: Here) -> dict[str, Any]:
    found, _ = here.shelf.find(name)
    return {"id": found, "object": "model", "created": 0, "owned_by": "local"}


@router.post("/images/generations", response_model=None)
async def generations(request: Request, here: Here, who: User) -> JSONResponse | StreamingResponse:
    """Draw from a text."""
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise InvalidValue("body", "…", f"is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidValue("body", type(body).__name__, "a JSON object is needed")
    return await _answered(here, who, Asked(body), {}, "image_generation")


@router.post("/images/edits", response_model=None)
async def edits(request: Request, here: Here, who: User) -> JSONResponse | StreamingResponse:
    """Draw from a text and pictures: one to begin with (several: references), and a mask."""
    form = await request.form(max_files=32, max_fields=64, max_part_size=64 << 20)
    body = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    files: dict[str, list[bytes]] = {"image": [], "mask": []}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            kind = name.removesuffix("[]")
            if kind not in files:
                raise InvalidValue(
                    name, value.filename, "is no file of this request; there are image, image[] and mask"
                )
            files[kind].append(await value.read())
    if not files["image"]:
        raise InvalidValue("image", None, "a picture is needed")
    asked = Asked(body)
    whole = here.about(asked.model).get("references") and not files["mask"]
    pictures = {"ref_images": files["image"]} if whole else {"init_image": files["image"][:1]}
    if not whole and len(files["image"]) > 1:
        raise InvalidValue("image", len(files["image"]), "this model begins with one picture")
    return await _answered(here, who, asked, {**pictures, "mask": _opaque_where_kept(files["mask"])}, "image_edit")


def _opaque_where_kept(masks: list[bytes]) -> list[bytes]:
    """OpenAI's masks are transparent where a picture is drawn anew; ours are light there."""
    return [from_alpha(data) for data in masks[:1]]


async def _answered(
    here: Context, who: str, asked: Asked, pictures: Mapping[str, list[bytes]], kind: str
) -> JSONResponse | StreamingResponse:
    job = submit(here, who, asked.model, asked.fields, pictures, asked.output_format, asked.quality)
    if asked.stream:
        return StreamingResponse(_events(here, job, asked, kind), media_type="text/event-stream")
    done = await over(here, job)
    data = [_datum(here, done, index, asked.as_url) for index in range(len(done.seeds))]
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": data,
            "output_format": asked.output_format,
            "background": "opaque",
            "usage": _NO_TOKENS,
        }
    )


def _datum(here: Context, job: Job, index: int, as_url: bool) -> dict[str, Any]:
    if as_url:
        return {"url": f"/sdcpp/v1/jobs/{job.id}/images/{index}", "seed": job.seeds[index]}
    return {"b64_json": as_base64(here.store.picture(job, index) or b""), "seed": job.seeds[index]}


async def _events(here: Context, job: Job, asked: Asked, kind: str) -> AsyncIterator[str]:
    """``partial_image`` up to as often as was asked for, spread over the steps; then ``completed`` for each picture."""
    told = shown = 0
    common = {"background": "opaque", "output_format": asked.output_format, "quality": "auto"}

    def event(name: str, data: bytes, **more: Any) -> str:
        size = f"{job.task.request.get('width', 'auto')}x{job.task.request.get('height', 'auto')}"
        fields = {"b64_json": as_base64(data), "created_at": int(time.time()), "size": size, **common, **more}
        return server_sent(f"{kind}.{name}", {"type": f"{kind}.{name}", **fields})

    async for now, progress in watched(here, job):
        wanted = asked.partial * progress.step // progress.steps if progress.steps else 0
        if progress.preview is not None and told < min(wanted, asked.partial) and progress.step < progress.steps:
            yield event("partial_image", progress.preview, partial_image_index=told, output_format="png")
            told += 1
        for data in pictures_of(here, now)[shown:]:
            shown += 1
            yield event("completed", data, usage=_NO_TOKENS)
        if now.state.over and not shown:
            message = {"message": str(NoPicture(now)), "type": "server_error", "code": now.state.value, "param": None}
            yield server_sent("error", {"type": "error", "error": message})
