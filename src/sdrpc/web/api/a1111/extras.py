"""What is done with a picture that is there: it is enlarged, or asked how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field
from typing_extensions import TypedDict

from ....diffusion.image_files import read_picture
from ....diffusion.metadata import KEYWORD
from ....diffusion.metadata_reader import read_metadata
from ....errors import InvalidValue
from ..common import Here, User, apart, as_base64, from_base64, over, pictures_of, submit_task
from ..described import Base64, Body, Whole, refusals
from ..native import Side

router = APIRouter()

NO_UPSCALER = "None"


class PngInfo(Body):
    image: Base64


class PngInfoShown(TypedDict):
    info: str
    items: dict[str, str]
    parameters: dict[str, str]


@router.post("/png-info", responses=refusals())
async def png_info(asked: PngInfo) -> PngInfoShown:
    """The parameters that a picture's file carries."""

    text = await apart(lambda: read_metadata(from_base64("image", asked.image)).parameters or "")
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


CALLED: Mapping[str, str] = {"width": "upscaling_resize", "upscaler": "upscaler_1"}
"""What a task of that kind has → what it is in :class:`Enlarge`, if not its own name."""


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
