"""What there is: models, what they can be drawn with, what enlarges, options and memory."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from pydantic import ConfigDict
from typing_extensions import TypedDict

from ....diffusion.hires import LATENT_FILTERS, PIXEL_FILTERS
from ....diffusion.samplers import SAMPLERS
from ....diffusion.schedules import SCHEDULES
from ....diffusion.upscaling import scale_of
from ....errors import InvalidValue
from ..common import Here
from ..described import Body, Nothing, refusals
from .extras import NO_UPSCALER
from .names import LABELS

router = APIRouter()


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
