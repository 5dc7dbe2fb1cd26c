"""AUTOMATIC1111's API, as its clients use it: txt2img and img2img that answer when they are done, progress, options.

A field that sdrpc has nothing for is refused by its name, unless it has the value that means nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends
from PIL import Image
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from ...diffusion.hires import LATENT_FILTERS, PIXEL_FILTERS
from ...diffusion.image_files import read_picture
from ...diffusion.metadata import KEYWORD
from ...diffusion.samplers import SAMPLERS
from ...diffusion.schedules import ALIASES, SCHEDULES
from ...diffusion.upscaling import scale_of
from ...errors import InvalidValue
from ..context import Context
from ..jobs import Job
from . import native
from .common import apart, as_base64, context, from_base64, over, pictures_of, submit, submit_task, user
from .described import MAX_PICTURES, MAX_SEED, MAX_SIDE, MAX_STEPS, Base64, Body, Whole, refusals
from .masks import prepared, stretched
from .native import LoraEntry, Share, Side, within

T = TypeVar("T")

NO_UPSCALER = "None"

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
Here = Annotated[Context, Depends(context)]
User = Annotated[str, Depends(user)]

NAMES = {
    "euler a": "euler_a", "euler": "euler", "heun": "heun", "dpm2": "dpm2", "dpm++ 2s a": "dpm++2s_a",
    "dpm++ 2m": "dpm++2m", "dpm++ 2m sde": "dpm++2m_sde", "lcm": "lcm", "lms": "lms", "ddim": "ddim_trailing",
    "restart": None, "plms": None, "unipc": None,
}  # fmt: skip
"""A1111's samplers → ours; None: sdrpc lacks it."""

LABELS = {"euler_a": "Euler a", "euler": "Euler", "heun": "Heun", "dpm2": "DPM2", "dpm++2s_a": "DPM++ 2S a",
          "dpm++2m": "DPM++ 2M", "dpm++2m_sde": "DPM++ 2M SDE", "lcm": "LCM", "lms": "LMS",
          "ddim_trailing": "DDIM"}  # fmt: skip
"""Ours → the name that A1111's clients expect, where there is one."""

SCHEDULER_NAMES = {"automatic": None, "uniform": "discrete", "sgm uniform": "sgm_uniform", "kl optimal": "kl_optimal",
                   "align your steps": "ays", "normal": "discrete"}  # fmt: skip

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "restore_faces": (False,), "tiling": (False,), "subseed_strength": (0, 0.0), "styles": ([],),
    "s_churn": (0,), "s_tmin": (0,), "s_tmax": (0,), "s_noise": (1, 1.0), "script_name": (None, ""),
    "script_args": ([],),
    "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1), "refiner_checkpoint": (None, ""),
    "firstphase_width": (0,), "firstphase_height": (0,), "hr_checkpoint_name": (None, "", "Use same checkpoint"),
    "hr_sampler_name": (None, "", "Use same sampler"), "hr_scheduler": (None, "", "Use same scheduler"),
    "hr_prompt": (None, ""), "hr_negative_prompt": (None, ""), "hr_cfg": (None, 1.0, 1, 7.0, 7),
    "inpainting_fill": (0, 1), "initial_noise_multiplier": (0, 1), "image_cfg_scale": (None, 0, 1.5),
}  # fmt: skip
"""Fields that sdrpc's server has nothing for, and the values with which they mean nothing."""


class Asked(Body):
    """A body of txt2img or img2img. Fields that are not named here are looked up in :data:`NEUTRAL`, or change nothing
    of a picture (where it is kept, say). ``lora`` and ``extra_images``, which are references, as in
    stable-diffusion.cpp's sd-server."""

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: Annotated[Whole, Field(le=MAX_SEED)] = -1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: Annotated[Whole, Field(ge=1, le=MAX_PICTURES)] = 1
    n_iter: Annotated[Whole, Field(ge=1, le=MAX_PICTURES)] = 1
    steps: Annotated[Whole, Field(ge=1, le=MAX_STEPS)] | None = 20
    cfg_scale: float | None = 7.0
    distilled_cfg_scale: float | None = None
    width: Side = 512
    height: Side = 512
    eta: float | None = None
    clip_skip: Whole = -1
    denoising_strength: Share | None = None
    override_settings: dict[str, Any] | None = {}
    send_images: bool = True
    alwayson_scripts: dict[str, Any] | None = {}
    lora: list[LoraEntry] = []
    extra_images: list[Base64] = []


class FromText(Asked):
    """A body of txt2img. ``hr_resize_x`` and ``hr_resize_y`` of 0: ``hr_scale``; ``hr_second_pass_steps`` (or
    ``hr_steps``) of 0: as many as the first pass has."""

    enable_hr: bool = False
    hr_upscaler: str | None = None
    hr_scale: float = 2.0
    hr_resize_x: Annotated[Whole, Field(ge=0, le=MAX_SIDE)] = 0
    hr_resize_y: Annotated[Whole, Field(ge=0, le=MAX_SIDE)] = 0
    hr_second_pass_steps: Annotated[Whole, Field(ge=0, le=MAX_STEPS)] = 0
    hr_steps: Annotated[Whole, Field(ge=0, le=MAX_STEPS)] = 0


class FromPicture(Asked):
    """A body of img2img."""

    init_images: list[Base64] = []
    mask: Base64 | None = None
    mask_blur: Annotated[Whole, Field(ge=0, le=256)] = 4
    inpainting_mask_invert: Whole | bool = 0
    inpaint_full_res: bool = False
    resize_mode: Whole = 0


CALLED: Mapping[str, str] = {
    **{ours: theirs for ours, theirs in native.CALLED.items() if ours not in FromText.model_fields},
    "batch_count": "batch_size", "guidance": "distilled_cfg_scale", "sampling_method": "sampler_name",
    "init_image": "init_images", "ref_images": "extra_images", "mask": "mask", "strength": "denoising_strength",
    "hires": "enable_hr", "hires_upscaler": "hr_upscaler", "hires_scale": "hr_scale", "hires_width": "hr_resize_x",
    "hires_height": "hr_resize_y", "hires_steps": "hr_second_pass_steps",
    "hires_denoising_strength": "denoising_strength", "model": "override_settings.sd_model_checkpoint",
}  # fmt: skip
"""A field of a :class:`sdrpc.Request` → what it is here, if not its own name; what only a prompt can carry
(:func:`native.within`) is called as it is there."""


class Drawn(TypedDict):
    """Pictures in base64, what was asked for, and JSON about what was drawn."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def sampler(name: str | None) -> tuple[str | None, str | None]:
    """Sampler and schedule of A1111's ``DPM++ 2M Karras``, or of our own names. Raises :class:`InvalidValue`."""
    if not name or name.lower() == "automatic":
        return None, None
    folded = name.lower().strip()
    for ending in ("karras", "exponential"):
        if folded.endswith(f" {ending}"):
            return sampler(folded.removesuffix(f" {ending}"))[0], ending
    ours = folded if folded in SAMPLERS else NAMES.get(folded)
    if ours is None:
        raise InvalidValue("sampler_name", name, f"does not exist; there are {', '.join(SAMPLERS)}")
    return ours, None


def schedule(name: str | None) -> str | None:
    """A schedule of A1111's, or one of ours. Raises :class:`InvalidValue`."""
    folded = (name or "automatic").lower()
    if folded in SCHEDULER_NAMES:
        return SCHEDULER_NAMES[folded]
    if folded not in SCHEDULES and folded not in ALIASES:
        raise InvalidValue("scheduler", name, f"does not exist; there are {', '.join(SCHEDULES)}")
    return folded


def fields_of(asked: Asked) -> dict[str, Any]:
    """The fields of a :class:`sdrpc.Request`. Raises :class:`InvalidValue` for what there is nothing for."""
    extra = asked.model_extra or {}
    for name, value in extra.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise InvalidValue(name, value, "this server does not have it")
    for script, arguments in (asked.alwayson_scripts or {}).items():
        if arguments and (not isinstance(arguments, dict) or arguments.get("args") not in (None, [], [False])):
            raise InvalidValue("alwayson_scripts", script, "this server has no scripts")
    method, implied = sampler(asked.sampler_name or asked.sampler_index)
    prompt, _, native = within(asked.prompt)
    return {
        "prompt": prompt,
        "negative_prompt": asked.negative_prompt or "",
        "seed": asked.seed,
        "steps": asked.steps,
        "cfg_scale": asked.cfg_scale,
        "guidance": asked.distilled_cfg_scale,
        "width": asked.width,
        "height": asked.height,
        "batch_count": asked.batch_size * asked.n_iter,
        "sampling_method": method,
        "scheduler": schedule(asked.scheduler) or implied,
        "eta": None if asked.eta == 1.0 else asked.eta,  # what A1111 means where nothing is said
        "clip_skip": _overridden(asked, "CLIP_stop_at_last_layers", int) or asked.clip_skip,
        "loras": tuple((lora.path, lora.multiplier) for lora in asked.lora),
        **(_second_pass(asked) if isinstance(asked, FromText) else {}),
        **native,
    }


def _overridden(asked: Asked, name: str, kind: type[T]) -> T | None:
    """An option that holds for this request alone. Raises :class:`InvalidValue` for one of another type."""
    value = (asked.override_settings or {}).get(name)
    if value is None or isinstance(value, kind):
        return value
    raise InvalidValue(f"override_settings.{name}", value, f"a value of another type is needed ({kind.__name__})")


def _second_pass(asked: FromText) -> dict[str, Any]:
    if not asked.enable_hr:
        return {}
    return {
        "hires": True, "hires_upscaler": asked.hr_upscaler, "hires_scale": asked.hr_scale,
        "hires_width": asked.hr_resize_x or None, "hires_height": asked.hr_resize_y or None,
        "hires_steps": asked.hr_second_pass_steps or asked.hr_steps,
        "hires_denoising_strength": asked.denoising_strength,
    }  # fmt: skip


@router.post("/txt2img", responses=refusals(500))
async def txt2img(asked: FromText, here: Here, who: User) -> Drawn:
    """Draw from a text; the answer comes with the pictures."""
    return await _drawn(here, who, asked, {})


@router.post("/img2img", responses=refusals(500))
async def img2img(asked: FromPicture, here: Here, who: User) -> Drawn:
    """Draw from a picture."""
    if not asked.init_images:
        raise InvalidValue("init_images", [], "a picture is needed")
    if asked.resize_mode not in (0, 1):
        raise InvalidValue("resize_mode", asked.resize_mode, "there are 0 (just resize) and 1 (crop and resize)")
    if asked.mask and asked.inpaint_full_res:
        raise InvalidValue("inpaint_full_res", True, "the whole picture is drawn; send false")
    return await _drawn(here, who, asked, await apart(lambda: _begun(asked)))


def _begun(asked: FromPicture) -> dict[str, list[bytes]]:
    """The files of the pictures that it begins with, as ours are."""

    def sized(data: bytes) -> bytes:
        return data if asked.resize_mode else stretched(data, asked.width, asked.height)

    pictures = {"init_image": [sized(from_base64("init_images", asked.init_images[0]))]}
    if asked.mask:
        mask = prepared(from_base64("mask", asked.mask), bool(asked.inpainting_mask_invert), asked.mask_blur)
        pictures["mask"] = [sized(mask)]
    return pictures


async def _drawn(here: Context, who: str, asked: Asked, pictures: dict[str, list[bytes]]) -> Drawn:
    fields = fields_of(asked)
    if pictures:
        fields["strength"] = 0.75 if asked.denoising_strength is None else asked.denoising_strength
    references = [from_base64("extra_images", text) for text in asked.extra_images]
    model = _overridden(asked, "sd_model_checkpoint", str) or here.chosen()
    job = await over(here, await submit(here, who, model, fields, {**pictures, "ref_images": references}))
    found = pictures_of(here, job)
    images = [as_base64(data) for data in found] if asked.send_images else []
    echoed = asked.model_dump(exclude={"init_images", "mask", "extra_images"})
    return {"images": images, "parameters": echoed, "info": json.dumps(_info(job, found, echoed))}


def _info(job: Job, files: list[bytes], asked: dict[str, Any]) -> dict[str, Any]:
    """What A1111 says about pictures."""
    request, count = job.task.request, len(files)
    return {
        "prompt": request["prompt"],
        "all_prompts": [request["prompt"]] * count,
        "negative_prompt": request.get("negative_prompt", ""),
        "all_negative_prompts": [request.get("negative_prompt", "")] * count,
        "seed": job.seeds[0],
        "all_seeds": list(job.seeds),
        "subseed": -1,
        "subseed_strength": 0,
        "width": asked["width"],
        "height": asked["height"],
        "sampler_name": request.get("sampling_method", ""),
        "cfg_scale": asked["cfg_scale"],
        "steps": asked["steps"],
        "batch_size": count,
        "sd_model_name": job.task.model,
        "clip_skip": request.get("clip_skip", -1),
        "infotexts": [parameters_in(data) for data in files],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "styles": [],
    }


def parameters_in(data: bytes) -> str:
    """The parameters that a PNG file carries; nothing where there are none."""
    with Image.open(BytesIO(data)) as image:
        return str(image.info.get(KEYWORD, ""))


class ProgressState(TypedDict):
    skipped: bool
    interrupted: bool
    job: str
    job_count: int
    job_no: int
    job_timestamp: str
    sampling_step: int
    sampling_steps: int


class ProgressShown(TypedDict):
    """``progress``: 0 … 1; ``eta_relative``: seconds that are left."""

    progress: float
    eta_relative: float
    state: ProgressState
    current_image: str | None
    textinfo: str | None


@router.get("/progress", responses=refusals())
def progress(here: Here, skip_current_image: bool = False) -> ProgressShown:
    """How far the oldest job is that is being drawn."""
    running = sorted(here.studio.running(), key=lambda job: job.started or 0)
    state: ProgressState = {
        "skipped": False, "interrupted": False, "job": "", "job_count": len(running) + here.store.pending(),
        "job_no": 0, "job_timestamp": "0", "sampling_step": 0, "sampling_steps": 0,
    }  # fmt: skip
    if not running:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    job, now = running[0], here.board.get(running[0].id)
    share = ((now.step / now.steps if now.steps else 0) + now.picture - 1) / job.task.pictures
    seconds = time.time() - (job.started or time.time())
    shown = now.preview is not None and not skip_current_image
    return {
        "progress": share,
        "eta_relative": seconds / share - seconds if share else 0.0,
        "state": {**state, "job": job.id, "sampling_step": now.step, "sampling_steps": now.steps},
        "current_image": as_base64(now.preview or b"") if shown else None,
        "textinfo": now.stage,
    }


class Nothing(TypedDict):
    """It was done."""


@router.post("/interrupt", responses=refusals())
def interrupt(here: Here, who: User) -> Nothing:
    """End what is being drawn for whoever asks."""
    for job in here.studio.running():
        if job.user == who:
            here.studio.cancel(job.id)
    return {}


@router.post("/skip", responses=refusals())
def skip(here: Here, who: User) -> Nothing:
    return interrupt(here, who)


class Options(Body):
    model_config = ConfigDict(extra="allow")
    sd_model_checkpoint: str | None = None


class OptionsShown(TypedDict):
    samples_format: str
    sd_model_checkpoint: str
    sd_vae: str


@router.get("/options", responses=refusals())
def options(here: Here) -> OptionsShown:
    return {"samples_format": "png", "sd_model_checkpoint": here.chosen(), "sd_vae": "Automatic"}


@router.post("/options", responses=refusals())
def set_options(asked: Options, here: Here) -> Nothing:
    """Choose the model that is meant where a request names none. Other options are refused."""
    others = set(asked.model_extra or {}) - {"samples_format", "sd_vae"}
    if others:
        raise InvalidValue(sorted(others)[0], "…", "this server has no such option")
    if asked.sd_model_checkpoint:
        here.choose(asked.sd_model_checkpoint)
    return {}


class ModelShown(TypedDict):
    title: str
    model_name: str
    filename: str
    hash: str | None
    sha256: str | None
    config: str | None


@router.get("/sd-models", responses=refusals())
def sd_models(here: Here) -> list[ModelShown]:
    return [
        {"title": name, "model_name": name, "filename": str(path) if path else name, "hash": None, "sha256": None,
         "config": None}
        for name, path in here.files().items()
    ]  # fmt: skip


@router.post("/refresh-checkpoints", responses=refusals())
def refresh_checkpoints() -> Nothing:
    """The folder of models is read at every question; there is nothing to refresh."""
    return {}


class SamplerShown(TypedDict):
    name: str
    aliases: list[str]
    options: dict[str, str]


@router.get("/samplers", responses=refusals())
def samplers() -> list[SamplerShown]:
    return [{"name": LABELS.get(name, name), "aliases": [name], "options": {}} for name in SAMPLERS]


class SchedulerShown(TypedDict):
    name: str
    label: str


@router.get("/schedulers", responses=refusals())
def schedulers() -> list[SchedulerShown]:
    return [{"name": name, "label": name} for name in ("automatic", *SCHEDULES)]


class UpscalerShown(TypedDict):
    name: str
    model_name: str | None
    model_path: str | None
    model_url: str | None
    scale: float | None


FILTER_SCALE = 4
"""What A1111 says of those that have no scale of their own."""


@router.get("/upscalers", responses=refusals())
def upscalers(here: Here) -> list[UpscalerShown]:
    """What enlarges pictures: nothing, filters, and the networks in the folder of upscalers."""
    known: dict[str, Path | None] = {NO_UPSCALER: None, **dict.fromkeys(PIXEL_FILTERS), **here.studio.upscalers.names()}
    return [
        {"name": name, "model_name": None if path is None else path.stem,
         "model_path": None if path is None else str(path), "model_url": None,
         "scale": FILTER_SCALE if path is None else scale_of(path)}
        for name, path in known.items()
    ]  # fmt: skip


class Named(TypedDict):
    name: str


@router.get("/latent-upscale-modes", responses=refusals())
def latent_upscale_modes() -> list[Named]:
    return [{"name": name} for name in LATENT_FILTERS]


class LoraShown(TypedDict):
    name: str
    alias: str
    path: str
    metadata: dict[str, str]


@router.get("/loras", responses=refusals())
def loras(here: Here) -> list[LoraShown]:
    return [
        {"name": name, "alias": name, "path": str(path), "metadata": {}} for name, path in here.studio.loras().items()
    ]


@router.get("/hypernetworks", responses=refusals())
@router.get("/face-restorers", responses=refusals())
@router.get("/prompt-styles", responses=refusals())
@router.get("/sd-vae", responses=refusals())
def nothing() -> list[Named]:
    """There are none."""
    return []


class Flags(TypedDict):
    api: bool


@router.get("/cmd-flags", responses=refusals())
def cmd_flags() -> Flags:
    return {"api": True}


class Bytes(TypedDict):
    free: int
    used: int
    total: int


class Memory(TypedDict):
    ram: dict[str, int]
    cuda: dict[str, Bytes]


@router.get("/memory", responses=refusals())
def memory(here: Here) -> Memory:
    """Bytes of the first device."""
    first = here.devices.said()[0]
    free, total = first["free"] or 0, first["total"] or 0
    return {"ram": {}, "cuda": {"system": {"free": free, "used": total - free, "total": total}}}


class PngInfo(Body):
    image: Base64


class PngInfoShown(TypedDict):
    info: str
    items: dict[str, str]
    parameters: dict[str, str]


@router.post("/png-info", responses=refusals())
async def png_info(asked: PngInfo) -> PngInfoShown:
    """The parameters that a picture's file carries."""

    def read() -> str:
        data = from_base64("image", asked.image)
        read_picture("image", data)  # refuses what is no picture, or too large
        return parameters_in(data)

    text = await apart(read)
    return {"info": text, "items": {KEYWORD: text} if text else {}, "parameters": {}}


class Enlarge(Body):
    """A body of extra-single-image. ``resize_mode`` 0: ``upscaling_resize`` times as large; 1: as large as
    ``upscaling_resize_w`` and ``upscaling_resize_h``, cut to their shape with ``upscaling_crop``."""

    image: Base64
    resize_mode: Annotated[Whole, Field(ge=0, le=1)] = 0
    upscaling_resize: Annotated[float, Field(gt=0, le=16)] = 2.0
    upscaling_resize_w: Side = 512
    upscaling_resize_h: Side = 512
    upscaling_crop: bool = True
    upscaler_1: str = NO_UPSCALER
    upscaler_2: str = NO_UPSCALER
    extras_upscaler_2_visibility: float = 0.0
    gfpgan_visibility: float = 0.0
    codeformer_visibility: float = 0.0
    codeformer_weight: float = 0.0
    show_extras_results: bool = True
    upscale_first: bool = False


CALLED_BY_ENLARGE: Mapping[str, str] = {"width": "upscaling_resize", "upscaler": "upscaler_1"}
"""The same of :class:`Enlarge`, of what a task of that kind has."""


class Enlarged(TypedDict):
    html_info: str
    image: str


@router.post("/extra-single-image", responses=refusals(500))
async def extra_single_image(asked: Enlarge, here: Here, who: User) -> Enlarged:
    """Enlarge a picture; without an ``upscaler_1`` it stays as it is."""
    for field in ("extras_upscaler_2_visibility", "gfpgan_visibility", "codeformer_visibility"):
        if getattr(asked, field):
            raise InvalidValue(field, getattr(asked, field), "this server does not have it; send 0")
    data = from_base64("image", asked.image)
    height, width = (await apart(lambda: read_picture("image", data))).shape[:2]
    if asked.upscaler_1 == NO_UPSCALER:
        return {"html_info": "", "image": as_base64(data)}
    factors = asked.upscaling_resize_w / width, asked.upscaling_resize_h / height
    factor = max(factors) if asked.resize_mode else asked.upscaling_resize
    size = round(width * factor), round(height * factor)
    if asked.resize_mode and asked.upscaling_crop:
        size = asked.upscaling_resize_w, asked.upscaling_resize_h
    task = here.studio.enlarged(asked.upscaler_1, *size)
    job = await over(here, submit_task(here, who, task, {"image": [data]}))
    return {"html_info": "", "image": as_base64(pictures_of(here, job)[0])}
