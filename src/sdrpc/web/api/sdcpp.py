"""stable-diffusion.cpp's own API: jobs that are submitted and polled. What its sd-server lacks is here too: the list of
jobs, their progress as events, their pictures as files, and the devices.

States and answers as in examples/server/api.md of stable-diffusion.cpp.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Path, Query, Response
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from ...diffusion.films import has_videos
from ...diffusion.hires import UPSCALERS
from ...diffusion.samplers import SAMPLERS
from ...diffusion.schedules import SCHEDULES
from ..context import Context
from ..devices import Said
from ..jobs import FILM_FORMATS, FORMATS, MEDIA_TYPES, Job, Kind, State
from .common import LOOK_SECONDS, Here, User, as_base64, naming, pictures_of, server_sent, submit, watched, why_not
from .described import MAX_PICTURES, MAX_SIDE, Body, EventStream, events, files, leads_to, refusals
from .native import CALLED, ImageRequest, VideoRequest, check, fields_of, kind_of, pictures_in

router = APIRouter(prefix="/sdcpp/v1", tags=["sdcpp"])
Id = Annotated[str, Path(min_length=1, max_length=64)]
Index = Annotated[int, Path(ge=0, lt=1 << 16)]

MAX_PREFERENCES = 16
"""Places of one component, of which the first that has room is used."""

NEWEST = 200
"""Jobs in a list."""


class Image(TypedDict):
    index: int
    b64_json: str


class Result(TypedDict):
    """Pictures have ``images``; a film is one file, ``b64_json``."""

    output_format: str
    images: NotRequired[list[Image]]
    b64_json: NotRequired[str]
    mime_type: NotRequired[str]
    fps: NotRequired[int]
    frame_count: NotRequired[int]


class Failure(TypedDict):
    code: Literal["generation_failed", "cancelled"]
    message: str


class Progress(TypedDict):
    """``step`` of ``steps`` of ``picture``, counted from 1; ``done`` of ``total`` of the ``stage``; ``seat``: who
    draws; ``preview``: the number of the newest one, 0 where there is none yet."""

    stage: str
    component: str
    step: int
    steps: int
    picture: int
    done: int
    total: int
    seat: str
    preview: int


class JobShown(TypedDict):
    """A job. Times are seconds since the epoch; ``queue_position`` is counted from 1, and 0 where it does not wait.
    ``request``: the fields by sd-cli's names; ``inputs``: how many pictures it has for a field."""

    id: str
    kind: Kind
    status: State
    created: int
    started: int | None
    completed: int | None
    queue_position: int
    result: Result | None
    error: Failure | None
    model: str
    user: str
    request: dict[str, Any]
    inputs: dict[str, int]
    seeds: list[int]
    output_format: str
    progress: Progress | None


class Accepted(TypedDict):
    id: str
    kind: Kind
    status: State
    created: int
    poll_url: str


class Named(TypedDict):
    name: str


class NamedFile(TypedDict):
    name: str
    path: str


class Capabilities(TypedDict):
    """``defaults``, ``output_formats`` and ``features`` repeat those of the ``current_mode``."""

    model: dict[str, str]
    models: list[dict[str, Any]]
    current_mode: Kind
    supported_modes: list[Kind]
    defaults: dict[str, Any]
    defaults_by_mode: dict[Kind, dict[str, Any]]
    output_formats: list[str]
    output_formats_by_mode: dict[Kind, list[str]]
    features: dict[str, bool]
    features_by_mode: dict[Kind, dict[str, bool]]
    samplers: list[str]
    schedulers: list[str]
    loras: list[NamedFile]
    upscalers: list[Named]
    limits: dict[str, int]


async def submitted(here: Context, who: str, asked: ImageRequest | VideoRequest) -> Job:
    check(asked)
    metadata = not isinstance(asked, ImageRequest) or asked.embed_image_metadata
    return await submit(
        here, who, asked.model, fields_of(asked), pictures_in(asked), asked.output_format, asked.output_compression,
        metadata, kind_of(asked),
    )  # fmt: skip


def shown(here: Context, job: Job, result: bool = False) -> JobShown:
    """A job as answers have it, with its pictures where ``result`` is wanted."""
    return {
        "id": job.id,
        "kind": job.task.kind,
        "status": job.state,
        "created": int(job.created),
        "started": None if job.started is None else int(job.started),
        "completed": None if job.finished is None else int(job.finished),
        "queue_position": here.store.place(job) if job.state is State.QUEUED else 0,
        "result": _result(here, job) if result and job.state is State.DONE else None,
        "error": _failure(job),
        "model": job.task.model,
        "user": job.user,
        "request": dict(job.task.request),
        "inputs": dict(job.task.inputs),
        "seeds": list(job.seeds),
        "output_format": job.task.output_format,
        "progress": _progress(here, job) if job.state is State.RUNNING else None,
    }


def _result(here: Context, job: Job) -> Result | None:
    found, task = pictures_of(here, job), job.task
    if not found:
        return None
    if task.kind is Kind.FILM:
        return {
            "output_format": task.output_format, "mime_type": MEDIA_TYPES[task.output_format],
            "fps": task.request["fps"], "frame_count": task.request["video_frames"], "b64_json": as_base64(found[0]),
        }  # fmt: skip
    images: list[Image] = [{"index": index, "b64_json": as_base64(data)} for index, data in enumerate(found)]
    return {"output_format": task.output_format, "images": images}


def _failure(job: Job) -> Failure | None:
    if job.state is State.FAILED:
        return {"code": "generation_failed", "message": why_not(job, naming(CALLED))}
    if job.state is State.CANCELLED:
        return {"code": "cancelled", "message": "job cancelled by client"}
    return None


def _progress(here: Context, job: Job) -> Progress:
    now = here.board.get(job.id)
    return {
        "stage": now.stage, "component": now.component, "step": now.step, "steps": now.steps, "picture": now.picture,
        "done": now.done, "total": now.total, "seat": now.seat, "preview": now.previews,
    }  # fmt: skip


def found(here: Context, id: str) -> Job:
    job = here.store.get(id)
    if job is None:
        raise HTTPException(404, f"there is no job {id}")
    return job


@router.get("/capabilities", responses=refusals())
def capabilities(here: Here) -> Capabilities:
    """What this server can draw with."""
    models = [here.about(name) for name in here.shelf.models()]
    modes = [Kind.PICTURES, *([Kind.FILM] if any(model["films"] for model in models) else [])]
    first = here.about(None)
    current = Kind.FILM if first["films"] else Kind.PICTURES
    control = any("control" in model["components"] for model in models)
    shared = {"init_image": True, "lora": True, "cache": True, "cancel_queued": True, "cancel_generating": True}
    features = {
        Kind.PICTURES: {
            **shared, "mask_image": True, "control_image": control, "ip_adapter_image": False, "ref_images": True,
            "vae_tiling": True, "hires": True,
        },
        Kind.FILM: {
            **shared, "end_image": True, "control_frames": False, "high_noise_sample_params": True,
            "vae_tiling": False,
        },
    }  # fmt: skip
    defaults = {Kind.PICTURES: ImageRequest().model_dump(), Kind.FILM: VideoRequest().model_dump()}
    written = [name for name in FILM_FORMATS if has_videos() or name in ("webp", "gif")]
    formats = {Kind.PICTURES: list(FORMATS), Kind.FILM: written}
    return {
        "model": {"name": here.shelf.default, "stem": here.shelf.default, "path": here.shelf.default},
        "models": models,
        "current_mode": current,
        "supported_modes": modes,
        "defaults": defaults[current],
        "defaults_by_mode": {mode: defaults[mode] for mode in modes},
        "output_formats": formats[current],
        "output_formats_by_mode": {mode: formats[mode] for mode in modes},
        "features": features[current],
        "features_by_mode": {mode: features[mode] for mode in modes},
        "samplers": list(SAMPLERS),
        "schedulers": list(SCHEDULES),
        "loras": [{"name": name, "path": path.name} for name, path in here.studio.loras().items()],
        "upscalers": [{"name": name} for name in (*UPSCALERS, *here.studio.upscalers.names())],
        "limits": {
            "min_width": 8, "max_width": MAX_SIDE, "min_height": 8, "max_height": MAX_SIDE,
            "max_batch_count": MAX_PICTURES, "max_queue_size": here.store.max_pending,
        },
    }  # fmt: skip


_ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"description": "It is in the queue", **leads_to("job", "cancel", "job_events", "preview", "forget")}
}


@router.post("/img_gen", status_code=202, responses=refusals(500) | _ACCEPTED)
async def img_gen(asked: ImageRequest, here: Here, who: User) -> Accepted:
    """Put a request for pictures into the queue."""
    return _accepted(await submitted(here, who, asked))


@router.post("/vid_gen", status_code=202, responses=refusals(500) | _ACCEPTED)
async def vid_gen(asked: VideoRequest, here: Here, who: User) -> Accepted:
    """Put a request for a film into the queue, for a model that draws films."""
    return _accepted(await submitted(here, who, asked))


def _accepted(job: Job) -> Accepted:
    return {
        "id": job.id, "kind": job.task.kind, "status": job.state, "created": int(job.created),
        "poll_url": f"{router.prefix}/jobs/{job.id}",
    }  # fmt: skip


@router.get("/jobs", responses=refusals())
def jobs(here: Here, most: Annotated[int, Query(ge=1, le=NEWEST)] = NEWEST) -> list[JobShown]:
    """The newest jobs, newest first, without their pictures."""
    return [shown(here, job) for job in here.store.jobs(most=most)]


@router.get("/jobs/{id}", operation_id="job", responses=refusals(404))
def job(id: Id, here: Here) -> JobShown:
    """A job, and its pictures when it is over."""
    return shown(here, found(here, id), result=True)


@router.post("/jobs/{id}/cancel", operation_id="cancel", responses=refusals(404, 409))
def cancel(id: Id, here: Here) -> JobShown:
    """End a job: at once where it waits, within a step where it is drawn."""
    known = found(here, id)
    if not here.studio.cancel(id):
        raise HTTPException(409, f"job {id} is {known.state.value}")
    return shown(here, found(here, id))


@router.delete("/jobs/{id}", status_code=204, operation_id="forget", responses=refusals(404, 409))
def forget(id: Id, here: Here) -> None:
    """Delete a job that is over, and its pictures."""
    found(here, id)
    if not here.store.forget(id):
        raise HTTPException(409, f"job {id} is not over; cancel it first")


@router.get(
    "/jobs/{id}/images/{index}",
    response_class=Response,
    responses=refusals(404) | files(*dict.fromkeys(MEDIA_TYPES.values())),
)
def image(id: Id, index: Index, here: Here) -> Response:
    """A picture's or a film's file."""
    known = found(here, id)
    data = here.store.picture(known, index)
    if data is None:
        raise HTTPException(404, f"job {id} has no picture {index}")
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return Response(data, media_type=MEDIA_TYPES[known.task.output_format], headers=headers)


@router.get(
    "/jobs/{id}/inputs/{field}/{index}",
    response_class=Response,
    responses=refusals(404) | files("application/octet-stream"),
)
def input_image(id: Id, field: str, index: Index, here: Here) -> Response:
    """The file of a picture that a job began with."""
    data = here.store.input(found(here, id), field, index)
    if data is None:
        raise HTTPException(404, f"job {id} has no {field} {index}")
    return Response(data, media_type="application/octet-stream")


@router.get(
    "/jobs/{id}/preview",
    operation_id="preview",
    response_class=Response,
    responses=refusals(404) | files(MEDIA_TYPES["png"]),
)
def preview(id: Id, here: Here) -> Response:
    """What is there so far of the picture that is being drawn, as a small PNG."""
    found(here, id)
    data = here.board.get(id).preview
    if data is None:
        raise HTTPException(404, f"job {id} has no preview")
    return Response(data, media_type=MEDIA_TYPES["png"], headers={"Cache-Control": "no-store"})


@router.get(
    "/jobs/{id}/events",
    operation_id="job_events",
    response_class=EventStream,
    responses=refusals(404) | {200: {"content": events(job="JobShown"), "description": "Until the job is over"}},
)
async def job_events(id: Id, here: Here) -> EventStream:
    """A job whenever it has changed, as server-sent events called ``job``; the last one has the pictures."""
    known = found(here, id)

    async def told() -> AsyncIterator[str]:
        async for now, _ in watched(here, known):
            yield server_sent("job", shown(here, now, result=True))

    return EventStream(told(), headers=_UNBUFFERED)


@router.get(
    "/events",
    response_class=EventStream,
    responses=refusals() | {200: {"content": events(queue=""), "description": "Without end"}},
)
async def all_events(here: Here) -> EventStream:
    """All that waits or is drawn, whenever something changed, as server-sent events called ``queue``, without end."""

    def state() -> Mapping[str, Any]:
        active = [*here.store.jobs([State.RUNNING]), *here.store.waiting()[:NEWEST]]
        newest = here.store.jobs(most=1)
        return {"jobs": [shown(here, job) for job in active], "newest": newest[0].id if newest else None,
                "over": here.store.last_over()}  # fmt: skip

    async def told() -> AsyncIterator[str]:
        last: Mapping[str, Any] | None = None
        with here.board.listen() as bell:
            while not here.board.closed:
                now = state()
                yield server_sent("queue", now) if now != last else ": still here\n\n"
                last = now
                await here.board.news(bell, LOOK_SECONDS)

    return EventStream(told(), headers=_UNBUFFERED)


@router.get("/devices", responses=refusals())
def devices(here: Here) -> list[Said]:
    """The devices that components can be on: memory in bytes, and how busy they are."""
    return here.devices.said()


class Placement(TypedDict):
    """Component → its devices, in order of preference, each as sd-cli's ``--backend`` has it (``RPC0&RPC1``: its layers
    one after the other, ``RPC0|RPC1``: side by side); ``auto``: a plan will say, when the model is next drawn with.
    ``chosen``: what somebody put there, in these words; the others are where the command line says."""

    model: str
    components: dict[str, list[str]]
    chosen: dict[str, list[str]]


class Placing(Body):
    """Where to put components, by the names that ``--backend`` knows (``te`` and ``all``, too), each as there, or
    ``auto`` alone; those that are not named go where the command line says."""

    model: str | None = None
    components: dict[str, Annotated[list[str], Field(max_length=MAX_PREFERENCES)]]


@router.get("/placement", responses=refusals())
def placement(here: Here, model: str | None = None) -> Placement:
    """Where the components of a model are."""
    name, _ = here.shelf.find(model)
    chosen = {part: list(names) for part, names in here.placements.chosen(name).items()}
    return {"model": name, "components": here.studio.placed(name), "chosen": chosen}


@router.put("/placement", responses=refusals())
def place(asked: Placing, here: Here) -> Placement:
    """Put components of a model on other devices, from its next picture on."""
    name, opened = here.shelf.open(asked.model)
    here.placements.choose(name, list(opened.components), asked.components)
    here.board.ring()
    return placement(here, name)


_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
