"""stable-diffusion.cpp's own API: jobs that are submitted and polled. What its sd-server lacks is here too: the list of
jobs, their progress as events, and their pictures as files.

Fields, states and answers as in examples/server/api.md of stable-diffusion.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ...diffusion.samplers import SAMPLERS
from ...diffusion.schedules import SCHEDULES
from ...errors import InvalidValue
from ..context import Context
from ..jobs import FORMATS, MEDIA_TYPES, Job, State
from .common import (
    LOOK_SECONDS,
    MAX_PICTURES,
    as_base64,
    context,
    from_base64,
    pictures_of,
    server_sent,
    submit,
    user,
    watched,
)

router = APIRouter(prefix="/sdcpp/v1", tags=["sdcpp"])
Here = Annotated[Context, Depends(context)]
User = Annotated[str, Depends(user)]

NEWEST = 200
"""Jobs in a list."""


class Strict(BaseModel):
    """A field that is not here is refused by its name."""

    model_config = ConfigDict(extra="forbid")


class Guidance(Strict):
    txt_cfg: float | None = None
    img_cfg: float | None = None
    distilled_guidance: float | None = None
    slg: dict[str, Any] = {}


class Sampling(Strict):
    scheduler: str | None = None
    sample_method: str | None = None
    sample_steps: int | None = None
    eta: float | None = None
    shifted_timestep: int = 0
    custom_sigmas: list[float] = []
    flow_shift: float | None = None
    guidance: Guidance = Guidance()


class LoraEntry(Strict):
    """``path``: a name in the folder of LoRAs."""

    path: str
    multiplier: float = 1.0
    is_high_noise: bool = False


class ImageRequest(Strict):
    """A request for pictures; what is null or missing is the model's default."""

    prompt: str = ""
    negative_prompt: str = ""
    clip_skip: int = -1
    width: int | None = None
    height: int | None = None
    strength: float = 0.75
    seed: int = -1
    batch_count: int = 1
    sample_params: Sampling = Sampling()
    init_image: str | None = None
    mask_image: str | None = None
    ref_images: list[str] = []
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    embed_image_metadata: bool = True
    model: str | None = None
    auto_resize_ref_image: bool = True
    increase_ref_index: bool = False
    control_image: str | None = None
    control_strength: float = 0.9
    ip_adapter_image: str | None = None
    ip_adapter_strength: float = 1.0
    lora: list[LoraEntry] = []
    hires: dict[str, Any] = {}
    vae_tiling_params: dict[str, Any] = {}
    cache_mode: str = "disabled"
    cache_option: str = ""
    scm_mask: str = ""
    scm_policy_dynamic: bool = True


def check(asked: ImageRequest) -> None:
    """Raises :class:`InvalidValue` for what sdrpc's server can't do yet, by its field."""
    slg = asked.sample_params.guidance.slg
    for field, refused in (
        ("sample_params.shifted_timestep", asked.sample_params.shifted_timestep),
        ("sample_params.custom_sigmas", asked.sample_params.custom_sigmas),
        ("sample_params.guidance.slg", slg.get("scale")),
        ("ip_adapter_image", asked.ip_adapter_image),
        ("lora.is_high_noise", any(lora.is_high_noise for lora in asked.lora)),
        ("hires", asked.hires.get("enabled")),
        ("vae_tiling_params", asked.vae_tiling_params.get("enabled")),
        ("cache_mode", asked.cache_mode != "disabled" and asked.cache_mode),
        ("increase_ref_index", asked.increase_ref_index),
    ):
        if refused:
            raise InvalidValue(field, refused, "this server does not have it yet")


def fields_of(asked: ImageRequest) -> dict[str, Any]:
    """The fields of a :class:`sdrpc.Request`; None where the model's default is meant."""
    sampling = asked.sample_params
    return {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "clip_skip": asked.clip_skip,
        "width": asked.width,
        "height": asked.height,
        "strength": asked.strength,
        "seed": asked.seed,
        "batch_count": asked.batch_count,
        "scheduler": sampling.scheduler,
        "sampling_method": sampling.sample_method,
        "steps": sampling.sample_steps,
        "eta": sampling.eta,
        "flow_shift": sampling.flow_shift,
        "cfg_scale": sampling.guidance.txt_cfg,
        "guidance": sampling.guidance.distilled_guidance,
        "control_strength": asked.control_strength,
        "loras": [(lora.path, lora.multiplier) for lora in asked.lora],
    }


def pictures_in(asked: ImageRequest) -> dict[str, list[bytes]]:
    """The files of pictures that a request begins with."""
    given: dict[str, Sequence[str | None]] = {
        "init_image": [asked.init_image],
        "mask": [asked.mask_image],
        "ref_images": asked.ref_images,
        "control_image": [asked.control_image],
    }
    return {name: [from_base64(name, text) for text in texts if text] for name, texts in given.items()}


def within(prompt: str) -> tuple[str, str | None, dict[str, Any]]:
    """A prompt of another API without the JSON of this one that it may carry between ``<sd_cpp_extra_args>`` tags; the
    model and the fields that this names. Raises :class:`InvalidValue`."""
    found = EXTRA_ARGUMENTS.search(prompt)
    if not found:
        return prompt, None, {}
    try:
        extra = json.loads(found[1])
        asked = ImageRequest.model_validate(extra)
    except (ValueError, RecursionError) as error:
        raise InvalidValue("sd_cpp_extra_args", found[1], str(error).partition("\n")[0]) from error
    check(asked)
    sampled = asked.sample_params.model_fields_set | asked.sample_params.guidance.model_fields_set
    named = asked.model_fields_set | ({"scheduler", "sampling_method", "steps", "eta", "flow_shift", "cfg_scale",
                                       "guidance"} if sampled else set())  # fmt: skip
    fields = {name: value for name, value in fields_of(asked).items() if name in named and value is not None}
    fields.pop("prompt", None)
    return EXTRA_ARGUMENTS.sub("", prompt).strip(), asked.model, fields


EXTRA_ARGUMENTS = re.compile(r"<sd_cpp_extra_args>(.*?)</sd_cpp_extra_args>", re.DOTALL)


def submitted(here: Context, who: str, asked: ImageRequest) -> Job:
    check(asked)
    return submit(
        here, who, asked.model, fields_of(asked), pictures_in(asked), asked.output_format, asked.output_compression,
        asked.embed_image_metadata,
    )  # fmt: skip


def shown(here: Context, job: Job, result: bool = False) -> dict[str, Any]:
    """A job as answers have it, with its pictures where ``result`` is wanted."""
    progress = here.board.get(job.id)
    error = None
    if job.state is State.FAILED:
        error = {"code": "generation_failed", "message": job.error}
    elif job.state is State.CANCELLED:
        error = {"code": "cancelled", "message": "job cancelled by client"}
    pictures = pictures_of(here, job) if result and job.state is State.DONE else []
    return {
        "id": job.id,
        "kind": "img_gen",
        "status": job.state.value,
        "created": int(job.created),
        "started": job.started and int(job.started),
        "completed": job.finished and int(job.finished),
        "queue_position": here.store.place(job) if job.state is State.QUEUED else 0,
        "result": {
            "output_format": job.task.output_format,
            "images": [{"index": index, "b64_json": as_base64(data)} for index, data in enumerate(pictures)],
        }
        if pictures
        else None,
        "error": error,
        "model": job.task.model,
        "user": job.user,
        "request": dict(job.task.request),
        "inputs": dict(job.task.inputs),
        "seeds": list(job.seeds),
        "output_format": job.task.output_format,
        "progress": {
            "stage": progress.stage,
            "component": progress.component,
            "step": progress.step,
            "steps": progress.steps,
            "picture": progress.picture,
            "done": progress.done,
            "total": progress.total,
            "seat": progress.seat,
            "preview": progress.previews,
        }
        if job.state is State.RUNNING
        else None,
    }


def found(here: Context, id: str) -> Job:
    job = here.store.get(id)
    if job is None:
        raise HTTPException(404, f"there is no job {id}")
    return job


@router.get("/capabilities")
def capabilities(here: Here) -> dict[str, Any]:
    """What this server can draw with."""
    defaults = ImageRequest().model_dump()
    models = here.shelf.models()
    features = {
        "init_image": True, "mask_image": True, "control_image": False, "ip_adapter_image": False, "ref_images": True,
        "lora": True, "vae_tiling": False, "hires": False, "cache": False, "cancel_queued": True,
        "cancel_generating": True,
    }  # fmt: skip
    return {
        "model": {"name": here.shelf.default, "stem": here.shelf.default, "path": here.shelf.default},
        "models": [here.about(name) for name in models],
        "current_mode": "img_gen",
        "supported_modes": ["img_gen"],
        "defaults": defaults,
        "defaults_by_mode": {"img_gen": defaults},
        "output_formats": list(FORMATS),
        "output_formats_by_mode": {"img_gen": list(FORMATS)},
        "features": features,
        "features_by_mode": {"img_gen": features},
        "samplers": list(SAMPLERS),
        "schedulers": list(SCHEDULES),
        "loras": [{"name": name, "path": path.name} for name, path in here.studio.adapters.names().items()],
        "upscalers": [],
        "limits": {
            "min_width": 8, "max_width": 4096, "min_height": 8, "max_height": 4096, "max_batch_count": MAX_PICTURES,
            "max_queue_size": here.store.max_pending,
        },
    }  # fmt: skip


@router.post("/img_gen", status_code=202)
def img_gen(asked: ImageRequest, here: Here, who: User) -> dict[str, Any]:
    """Put a request into the queue."""
    job = submitted(here, who, asked)
    return {
        "id": job.id, "kind": "img_gen", "status": job.state.value, "created": int(job.created),
        "poll_url": f"{router.prefix}/jobs/{job.id}",
    }  # fmt: skip


@router.get("/jobs")
def jobs(here: Here, most: Annotated[int, Query(ge=1, le=NEWEST)] = NEWEST) -> list[dict[str, Any]]:
    """The newest jobs, newest first, without their pictures."""
    return [shown(here, job) for job in here.store.jobs(most=most)]


@router.get("/jobs/{id}")
def job(id: str, here: Here) -> dict[str, Any]:
    """A job, and its pictures when it is over."""
    return shown(here, found(here, id), result=True)


@router.post("/jobs/{id}/cancel")
def cancel(id: str, here: Here) -> dict[str, Any]:
    """End a job: at once where it waits, within a step where it is drawn."""
    known = found(here, id)
    if not here.studio.cancel(id):
        raise HTTPException(409, f"job {id} is {known.state.value}")
    return shown(here, found(here, id))


@router.delete("/jobs/{id}", status_code=204)
def forget(id: str, here: Here) -> None:
    """Delete a job that is over, and its pictures."""
    found(here, id)
    if not here.store.forget(id):
        raise HTTPException(409, f"job {id} is not over; cancel it first")


@router.get("/jobs/{id}/images/{index}")
def image(id: str, index: int, here: Here) -> Response:
    """A picture's file."""
    known = found(here, id)
    data = here.store.picture(known, index)
    if data is None:
        raise HTTPException(404, f"job {id} has no picture {index}")
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return Response(data, media_type=MEDIA_TYPES[known.task.output_format], headers=headers)


@router.get("/jobs/{id}/inputs/{field}/{index}")
def input_image(id: str, field: str, index: int, here: Here) -> Response:
    """The file of a picture that a job began with."""
    known = found(here, id)
    files = here.store.inputs(known, field)
    if not 0 <= index < len(files):
        raise HTTPException(404, f"job {id} has no {field} {index}")
    return Response(files[index], media_type="application/octet-stream")


@router.get("/jobs/{id}/preview")
def preview(id: str, here: Here) -> Response:
    """What is there so far of the picture that is being drawn, as a small PNG."""
    found(here, id)
    data = here.board.get(id).preview
    if data is None:
        raise HTTPException(404, f"job {id} has no preview")
    return Response(data, media_type=MEDIA_TYPES["png"], headers={"Cache-Control": "no-store"})


@router.get("/jobs/{id}/events")
async def job_events(id: str, here: Here) -> StreamingResponse:
    """A job whenever it has changed, as server-sent events called ``job``; the last one has the pictures."""
    known = found(here, id)

    async def events() -> AsyncIterator[str]:
        async for now, _ in watched(here, known):
            yield server_sent("job", shown(here, now, result=True))

    return StreamingResponse(events(), media_type="text/event-stream", headers=_UNBUFFERED)


@router.get("/events")
async def all_events(here: Here) -> StreamingResponse:
    """All that waits or is drawn, whenever something changed, as server-sent events called ``queue``."""

    def state() -> Mapping[str, Any]:
        active = [*here.store.jobs([State.RUNNING]), *here.store.waiting()[:NEWEST]]
        newest = here.store.jobs(most=1)
        return {"jobs": [shown(here, job) for job in active], "newest": newest[0].id if newest else None,
                "over": here.store.last_over()}  # fmt: skip

    async def events() -> AsyncIterator[str]:
        last: Mapping[str, Any] | None = None
        with here.board.listen() as bell:
            while True:
                now = state()
                yield server_sent("queue", now) if now != last else ": still here\n\n"
                last = now
                await here.board.news(bell, LOOK_SECONDS)

    return StreamingResponse(events(), media_type="text/event-stream", headers=_UNBUFFERED)


@router.get("/devices")
def devices(here: Here) -> list[dict[str, Any]]:
    """The devices that are drawn with: memory in bytes."""
    return here.devices()


_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
