"""AUTOMATIC1111's API, as its clients use it: txt2img and img2img that answer when they are done, progress, options.

A field that sdrpc has nothing for is refused by its name, unless it has the value that means nothing.
"""

from __future__ import annotations

import json
import time
from io import BytesIO
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ...diffusion.image_files import read_picture
from ...diffusion.metadata import KEYWORD
from ...diffusion.samplers import SAMPLERS
from ...diffusion.schedules import ALIASES, SCHEDULES
from ...errors import InvalidValue
from ..context import Context
from ..jobs import Job
from .common import as_base64, context, from_base64, over, pictures_of, submit, user
from .masks import prepared, stretched
from .sdcpp import within

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
    "enable_hr": (False,), "restore_faces": (False,), "tiling": (False,), "subseed_strength": (0, 0.0), "styles": ([],),
    "s_churn": (0,), "s_tmin": (0,), "s_tmax": (0,), "s_noise": (1, 1.0), "script_name": (None, ""),
    "script_args": ([],),
    "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1), "refiner_checkpoint": (None, ""),
    "firstphase_width": (0,), "firstphase_height": (0,), "hr_checkpoint_name": (None, ""),
    "inpainting_fill": (0, 1), "initial_noise_multiplier": (0, 1), "image_cfg_scale": (None, 0, 1.5),
}  # fmt: skip
"""Fields that sdrpc's server has nothing for, and the values with which they mean nothing."""


class Asked(BaseModel):
    """A body of txt2img or img2img. Fields that are not named here are looked up in :data:`NEUTRAL`, or change nothing
    of a picture (where it is kept, say)."""

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    steps: int | None = 20
    cfg_scale: float | None = 7.0
    distilled_cfg_scale: float | None = None
    width: int = 512
    height: int = 512
    eta: float | None = None
    clip_skip: int = -1
    denoising_strength: float | None = None
    override_settings: dict[str, Any] = {}
    send_images: bool = True
    init_images: list[str] = []
    mask: str | None = None
    mask_blur: int = Field(4, ge=0, le=256)
    inpainting_mask_invert: int = 0
    inpaint_full_res: bool = False
    resize_mode: int = 0
    alwayson_scripts: dict[str, Any] = {}


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
    for script, arguments in asked.alwayson_scripts.items():
        if (arguments or {}).get("args") not in (None, [], [False]):
            raise InvalidValue("alwayson_scripts", script, "this server has no scripts")
    method, implied = sampler(asked.sampler_name or asked.sampler_index)
    prompt, _, native = within(asked.prompt)
    return {
        "prompt": prompt,
        "negative_prompt": asked.negative_prompt,
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
        "clip_skip": asked.override_settings.get("CLIP_stop_at_last_layers", asked.clip_skip),
        **native,
    }


@router.post("/txt2img")
async def txt2img(asked: Asked, here: Here, who: User) -> dict[str, Any]:
    """Draw from a text; the answer comes with the pictures."""
    return await _drawn(here, who, asked, {})


@router.post("/img2img")
async def img2img(asked: Asked, here: Here, who: User) -> dict[str, Any]:
    """Draw from a picture."""
    if not asked.init_images:
        raise InvalidValue("init_images", [], "a picture is needed")
    begin = from_base64("init_images", asked.init_images[0])
    if asked.resize_mode == 0:
        begin = stretched(begin, asked.width, asked.height)
    elif asked.resize_mode != 1:
        raise InvalidValue("resize_mode", asked.resize_mode, "there are 0 (just resize) and 1 (crop and resize)")
    pictures = {"init_image": [begin]}
    if asked.mask:
        if asked.inpaint_full_res:
            raise InvalidValue("inpaint_full_res", True, "the whole picture is drawn; send false")
        mask = prepared(from_base64("mask", asked.mask), bool(asked.inpainting_mask_invert), asked.mask_blur)
        pictures["mask"] = [stretched(mask, asked.width, asked.height) if asked.resize_mode == 0 else mask]
    return await _drawn(here, who, asked, pictures)


async def _drawn(here: Context, who: str, asked: Asked, pictures: dict[str, list[bytes]]) -> dict[str, Any]:
    fields = fields_of(asked)
    if pictures:
        fields["strength"] = 0.75 if asked.denoising_strength is None else asked.denoising_strength
    model = asked.override_settings.get("sd_model_checkpoint")
    job = await over(here, submit(here, who, model or here.chosen(), fields, pictures))
    files = pictures_of(here, job)
    images = [as_base64(data) for data in files] if asked.send_images else []
    echoed = asked.model_dump(exclude={"init_images", "mask"})
    return {"images": images, "parameters": echoed, "info": json.dumps(_info(job, files, echoed))}


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


@router.get("/progress")
def progress(here: Here, skip_current_image: bool = False) -> dict[str, Any]:
    """How far the oldest job is that is being drawn."""
    running = sorted(here.studio.running(), key=lambda job: job.started or 0)
    waiting = len(here.store.waiting())
    state = {"skipped": False, "interrupted": False, "job": "", "job_count": len(running) + waiting, "job_no": 0,
             "job_timestamp": "0", "sampling_step": 0, "sampling_steps": 0}  # fmt: skip
    answer = {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    if not running:
        return answer
    job, now = running[0], here.board.get(running[0].id)
    share = (now.step / now.steps if now.steps else 0) / job.task.pictures + (now.picture - 1) / job.task.pictures
    seconds = time.time() - (job.started or time.time())
    state.update(job=job.id, sampling_step=now.step, sampling_steps=now.steps)
    answer.update(progress=share, eta_relative=seconds / share - seconds if share else 0.0, textinfo=now.stage)
    if now.preview is not None and not skip_current_image:
        answer["current_image"] = as_base64(now.preview)
    return answer


@router.post("/interrupt")
def interrupt(here: Here, who: User) -> dict[str, Any]:
    """End what is being drawn for whoever asks."""
    for job in here.studio.running():
        if job.user == who:
            here.studio.cancel(job.id)
    return {}


@router.post("/skip")
def skip(here: Here, who: User) -> dict[str, Any]:
    return interrupt(here, who)


class Options(BaseModel):
    model_config = ConfigDict(extra="allow")
    sd_model_checkpoint: str | None = None


@router.get("/options")
def options(here: Here) -> dict[str, Any]:
    return {"samples_format": "png", "sd_model_checkpoint": here.chosen(), "sd_vae": "Automatic"}


@router.post("/options")
def set_options(asked: Options, here: Here) -> dict[str, Any]:
    """Choose the model that is meant where a request names none. Other options are refused."""
    others = set(asked.model_extra or {}) - {"samples_format", "sd_vae"}
    if others:
        raise InvalidValue(sorted(others)[0], "…", "this server has no such option")
    if asked.sd_model_checkpoint:
        here.choose(asked.sd_model_checkpoint)
    return {}


@router.get("/sd-models")
def sd_models(here: Here) -> list[dict[str, Any]]:
    return [
        {"title": name, "model_name": name, "filename": str(path) if path else name, "hash": None, "sha256": None,
         "config": None}
        for name, path in here.files().items()
    ]  # fmt: skip


@router.post("/refresh-checkpoints")
def refresh_checkpoints() -> dict[str, Any]:
    """The folder of models is read at every question; there is nothing to refresh."""
    return {}


@router.get("/samplers")
def samplers() -> list[dict[str, Any]]:
    return [{"name": LABELS.get(name, name), "aliases": [name], "options": {}} for name in SAMPLERS]


@router.get("/schedulers")
def schedulers() -> list[dict[str, Any]]:
    return [{"name": name, "label": name} for name in ("automatic", *SCHEDULES)]


@router.get("/upscalers")
def upscalers() -> list[dict[str, Any]]:
    return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}]


@router.get("/loras")
def loras(here: Here) -> list[dict[str, Any]]:
    return [
        {"name": name, "alias": name, "path": str(path), "metadata": {}}
        for name, path in here.studio.adapters.names().items()
    ]


@router.get("/latent-upscale-modes")
@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/prompt-styles")
@router.get("/sd-vae")
def nothing() -> list[Any]:
    """There are none."""
    return []


@router.get("/cmd-flags")
def cmd_flags() -> dict[str, Any]:
    return {"api": True}


@router.get("/memory")
def memory(here: Here) -> dict[str, Any]:
    """Bytes of the first device."""
    first = here.devices()[0]
    system = {"free": first["free"], "used": first["total"] - first["free"], "total": first["total"]}
    return {"ram": {}, "cuda": {"system": system}}


class PngInfo(BaseModel):
    image: str


@router.post("/png-info")
def png_info(asked: PngInfo) -> dict[str, Any]:
    """The parameters that a picture's file carries."""
    data = from_base64("image", asked.image)
    read_picture("image", data)  # refuses what is no picture, or too large
    text = parameters_in(data)
    return {"info": text, "items": {KEYWORD: text} if text else {}, "parameters": {}}
