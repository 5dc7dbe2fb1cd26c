"""OpenAI's images API: generations and edits, whole or as a stream, and the list of models.

Shapes as in the ``openai`` package's types. Further fields of a :class:`sdrpc.Request` (``seed``, ``steps``,
``guidance``, ``negative_prompt`` …) are taken beside OpenAI's; those of OpenAI's that have no meaning for a diffusion
model (``quality``, ``style``, ``moderation``, ``user``) are accepted, because its clients send them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, ValidationError
from starlette.datastructures import UploadFile
from typing_extensions import NotRequired, TypedDict

from ...errors import InvalidValue
from ..context import Context
from ..jobs import Job
from . import native
from .common import Here, User, apart, as_base64, naming, over, pictures_of, server_sent, submit, watched, why_not
from .described import (
    FILE,
    MAX_PICTURES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    Body,
    EventStream,
    Whole,
    events,
    first_fault,
    refusals,
)
from .masks import from_alpha
from .native import Share, Side, within

router = APIRouter(prefix="/v1", tags=["OpenAI"])

MAX_PARTIAL = 3
SIZE = r"^(auto|[0-9]{1,4}x[0-9]{1,4})$"


class Generation(Body):
    """A request for pictures. The last five fields mean nothing here."""

    prompt: str
    model: str | None = None
    n: Annotated[Whole, Field(ge=1, le=MAX_PICTURES)] | None = None
    size: Annotated[str, Field(pattern=SIZE)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[Whole, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: Annotated[Whole, Field(ge=0, le=MAX_PARTIAL)] | None = None
    seed: Annotated[Whole, Field(le=MAX_SEED)] | None = None
    steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] | None = None
    width: Side | None = None
    height: Side | None = None
    negative_prompt: str | None = None
    cfg_scale: float | None = None
    guidance: float | None = None
    eta: float | None = None
    flow_shift: float | None = None
    clip_skip: Whole | None = None
    sampling_method: str | None = None
    scheduler: str | None = None
    rng: str | None = None
    sampler_rng: str | None = None
    prediction: str | None = None
    quality: Any = None
    style: Any = None
    moderation: Any = None
    user: Any = None
    safety_identifier: Any = None


class Edit(Generation):
    """The texts of a form that goes with pictures."""

    strength: Share | None = None
    input_fidelity: Any = None


OURS = {"n", "size", "response_format", "output_format", "output_compression", "stream", "partial_images", "model",
        "prompt", "background", "quality", "style", "moderation", "user",
        "safety_identifier", "input_fidelity"}  # fmt: skip
"""Fields that are none of a :class:`sdrpc.Request`."""


CALLED: Mapping[str, str] = {
    **{ours: theirs for ours, theirs in native.CALLED.items() if ours not in Edit.model_fields},
    "batch_count": "n", "init_image": "image", "ref_images": "image", "mask": "mask",
}  # fmt: skip
"""A field of a :class:`sdrpc.Request` → what it is here, if not its own name; what only a prompt can carry
(:func:`native.within`) is called as it is there."""


class Datum(TypedDict):
    b64_json: NotRequired[str]
    url: NotRequired[str]
    seed: int


class Images(TypedDict):
    created: int
    data: list[Datum]
    output_format: str
    background: str
    usage: dict[str, Any]


class ModelShown(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelShown]


_NO_TOKENS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
              "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}  # fmt: skip

_DRAWN = refusals(500) | {200: {
    "model": Images, "description": "The pictures; with stream, events that end with them",
    "content": events(**{f"{kind}.{name}": "" for kind in ("image_generation", "image_edit")
                         for name in ("partial_image", "completed")}, error=""),
}}  # fmt: skip

_FILES = {"image": FILE, "mask": FILE, "image[]": {"type": "array", "items": FILE}}


def _form() -> dict[str, Any]:
    """The description of a form of :class:`Edit` with its files."""
    schema = Edit.model_json_schema()
    with_one = [{"required": ["image"]}, {"required": ["image[]"]}]
    described = {**schema, "properties": {**schema["properties"], **_FILES}, "anyOf": with_one}
    return {"content": {"multipart/form-data": {"schema": described}}, "required": True}


def fields_of(asked: Generation) -> tuple[str | None, dict[str, Any]]:
    """The model, and the fields of a :class:`sdrpc.Request`. Raises :class:`InvalidValue`."""
    prompt, model, native = within(asked.prompt)
    plain = {name: value for name, value in asked.model_dump(exclude=OURS).items() if value is not None}
    said = {} if asked.n is None else {"batch_count": asked.n}
    if asked.size not in (None, "auto"):
        said["width"], said["height"] = (int(side) for side in str(asked.size).split("x"))
        if max(said["width"], said["height"]) > MAX_SIDE:
            raise InvalidValue("size", asked.size, f"a side can have {MAX_SIDE} pixels")
    return asked.model or model, {"seed": -1, **said, **native, **plain, "prompt": prompt}


@router.get("/models", responses=refusals())
def models(here: Here) -> ModelList:
    """The models that can be named."""
    return {"object": "list", "data": [_shown(name) for name in here.shelf.models()]}


@router.get("/models/{name}", responses=refusals(404))
def model(name: str, here: Here) -> ModelShown:
    found, _ = here.shelf.find(name)
    return _shown(found)


def _shown(name: str) -> ModelShown:
    return {"id": name, "object": "model", "created": 0, "owned_by": "local"}


@router.post("/images/generations", response_model=None, responses=_DRAWN)
async def generations(asked: Generation, here: Here, who: User) -> Images | EventStream:
    """Draw from a text."""
    return await _answered(here, who, asked, {}, "image_generation")


@router.post("/images/edits", response_model=None, responses=_DRAWN, openapi_extra={"requestBody": _form()})
async def edits(request: Request, here: Here, who: User) -> Images | EventStream:
    """Draw from a text and pictures: one to begin with (several: references), and a mask."""
    async with request.form(max_files=32, max_fields=64, max_part_size=64 << 20) as form:
        items = form.multi_items()
        texts = {name: value for name, value in items if isinstance(value, str)}
        files: dict[str, list[bytes]] = {"image": [], "mask": []}
        for name, value in items:
            if isinstance(value, UploadFile):
                kind = name.removesuffix("[]")
                if kind not in files:
                    raise InvalidValue(
                        name, value.filename, "is no file of this request; there are image, image[] and mask"
                    )
                files[kind].append(await value.read())
    try:
        asked = Edit.model_validate(texts, strict=False)  # what a form has are texts
    except ValidationError as error:
        field, reason = first_fault(error.errors())
        raise InvalidValue(field, texts.get(field), reason) from error
    if not files["image"]:
        raise InvalidValue("image", None, "a picture is needed")
    whole = here.about(asked.model)["references"] and not files["mask"]
    pictures = {"ref_images": files["image"]} if whole else {"init_image": files["image"][:1]}
    if not whole and len(files["image"]) > 1:
        raise InvalidValue("image", len(files["image"]), "this model begins with one picture")
    masks = await apart(lambda: _opaque_where_kept(files["mask"])) if files["mask"] else []
    return await _answered(here, who, asked, {**pictures, "mask": masks}, "image_edit")


def _opaque_where_kept(masks: list[bytes]) -> list[bytes]:
    """OpenAI's masks are transparent where a picture is drawn anew; ours are light there."""
    return [from_alpha(data) for data in masks[:1]]


async def _answered(
    here: Context, who: str, asked: Generation, pictures: Mapping[str, list[bytes]], kind: str
) -> Images | EventStream:
    model, fields = fields_of(asked)
    output_format = asked.output_format or "png"
    quality = 100 if asked.output_compression is None else asked.output_compression
    job = await submit(here, who, model, fields, pictures, output_format, quality)
    if asked.stream:
        return EventStream(_events(here, job, asked.partial_images or 0, kind))
    done = await over(here, job)
    as_url = asked.response_format == "url"
    return {
        "created": int(time.time()),
        "data": [_datum(here, done, index, as_url) for index in range(len(done.seeds))],
        "output_format": output_format,
        "background": "opaque",
        "usage": _NO_TOKENS,
    }


def _datum(here: Context, job: Job, index: int, as_url: bool) -> Datum:
    if as_url:
        return {"url": f"/sdcpp/v1/jobs/{job.id}/images/{index}", "seed": job.seeds[index]}
    return {"b64_json": as_base64(here.store.picture(job, index) or b""), "seed": job.seeds[index]}


async def _events(here: Context, job: Job, partial: int, kind: str) -> AsyncIterator[str]:
    """``partial_image`` up to as often as was asked for, spread over the steps; then ``completed`` for each picture."""
    told = shown = 0
    common = {"background": "opaque", "output_format": job.task.output_format, "quality": "auto"}

    def event(name: str, data: bytes, **more: Any) -> str:
        size = f"{job.task.request.get('width', 'auto')}x{job.task.request.get('height', 'auto')}"
        fields = {"b64_json": as_base64(data), "created_at": int(time.time()), "size": size, **common, **more}
        return server_sent(f"{kind}.{name}", {"type": f"{kind}.{name}", **fields})

    async for now, progress in watched(here, job):
        wanted = partial * progress.step // progress.steps if progress.steps else 0
        if progress.preview is not None and told < min(wanted, partial) and progress.step < progress.steps:
            yield event("partial_image", progress.preview, partial_image_index=told, output_format="png")
            told += 1
        for data in pictures_of(here, now)[shown:]:
            shown += 1
            yield event("completed", data, usage=_NO_TOKENS)
        if now.state.over and not shown:
            message = {
                "message": why_not(now, naming(CALLED)),
                "type": "server_error",
                "code": now.state.value,
                "param": None,
            }
            yield server_sent("error", {"type": "error", "error": message})
