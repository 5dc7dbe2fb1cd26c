"""txt2img and img2img, which answer when their pictures are drawn."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from io import BytesIO
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter
from PIL import Image
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from ....diffusion.metadata import KEYWORD
from ....errors import InvalidValue
from ...context import Context
from ...jobs import Job
from .. import native
from ..common import Here, User, apart, as_base64, from_base64, over, pictures_of, submit
from ..described import MAX_PICTURES, MAX_SEED, MAX_SIDE, MAX_STEPS, Base64, Body, Whole, refusals
from ..masks import prepared, stretched
from ..native import LoraEntry, Share, Side, within
from .names import sampler, schedule

T = TypeVar("T")

router = APIRouter()

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
        "infotexts": [_infotext(data) for data in files],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(job.created)),
        "styles": [],
    }


def _infotext(data: bytes) -> str:
    """The parameters in a PNG file of ours, which stand before its pixels: nothing is decoded for them."""
    with Image.open(BytesIO(data)) as image:
        return str(image.info.get(KEYWORD, ""))
