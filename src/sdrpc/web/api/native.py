"""Requests as stable-diffusion.cpp's own API has them, and what they mean as a :class:`sdrpc.Request`.

Fields as in examples/server/api.md of stable-diffusion.cpp. One that sdrpc has nothing for is refused by its name,
unless it has the value that means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ...diffusion.caching import POLICIES
from ...diffusion.guidance import SKIPPED
from ...diffusion.hires import LATENT
from ...errors import InvalidValue
from ..jobs import Kind
from .common import from_base64
from .described import MAX_FRAMES, MAX_PICTURES, MAX_SEED, MAX_SIDE, MAX_STEPS, Base64, Body, Whole, fault_of

Side = Annotated[Whole, Field(ge=1, le=MAX_SIDE)]
Share = Annotated[float, Field(ge=0, le=1)]


class SkipLayers(Body):
    """Skip layer guidance; a ``scale`` of 0 is none."""

    layers: list[Whole] = list(SKIPPED.layers)
    layer_start: Share = SKIPPED.start
    layer_end: Share = SKIPPED.end
    scale: float = 0.0


class Guidance(Body):
    """``img_cfg``: of models for inpainting, None or the same as ``txt_cfg`` for others."""

    txt_cfg: float | None = None
    img_cfg: float | None = None
    distilled_guidance: float | None = None
    slg: SkipLayers = SkipLayers()


class Sampling(Body):
    """``sample_steps`` below 1: the model's own number."""

    scheduler: str | None = None
    sample_method: str | None = None
    sample_steps: Annotated[Whole, Field(ge=-1, le=MAX_STEPS)] | None = None
    eta: float | None = None
    shifted_timestep: Whole = 0
    custom_sigmas: Annotated[list[float], Field(max_length=MAX_STEPS + 1)] = []
    flow_shift: float | None = None
    guidance: Guidance = Guidance()


class LoraEntry(Body):
    """``path``: a name in the folder of LoRAs."""

    path: str
    multiplier: float = 1.0
    is_high_noise: bool = False


class Hires(Body):
    """A second pass in a larger size; a ``target_width`` and ``target_height`` of 0 mean ``scale``, 0 ``steps`` as many
    as the first has. ``upscaler``: a filter, or the name of a network, which works in tiles of ``upscale_tile_size``
    pixels on a side. ``custom_sigmas``: levels of noise instead of ``steps`` and ``denoising_strength``."""

    enabled: bool = False
    upscaler: str = LATENT
    scale: float = 2.0
    target_width: Annotated[Whole, Field(ge=0, le=MAX_SIDE)] = 0
    target_height: Annotated[Whole, Field(ge=0, le=MAX_SIDE)] = 0
    steps: Annotated[Whole, Field(ge=0, le=MAX_STEPS)] = 0
    denoising_strength: Share = 0.7
    custom_sigmas: list[float] = []
    upscale_tile_size: Whole = 128


class Tiles(Body):
    """The VAE works in tiles of so many latents; sizes of 0 are the usual ones."""

    enabled: bool = False
    temporal_tiling: bool = False
    tile_size_x: Whole = 0
    tile_size_y: Whole = 0
    target_overlap: float = 0.5
    rel_size_x: float = 0.0
    rel_size_y: float = 0.0
    extra_tiling_args: str = ""


class Common(Body):
    """What requests for pictures and films share; what is null or missing is the model's default."""

    prompt: str = ""
    negative_prompt: str = ""
    clip_skip: Whole = -1
    width: Side | None = None
    height: Side | None = None
    strength: Share = 0.75
    seed: Annotated[Whole, Field(ge=-(1 << 63), le=MAX_SEED)] = -1
    sample_params: Sampling = Sampling()
    init_image: Base64 | None = None
    lora: list[LoraEntry] = []
    vae_tiling_params: Tiles = Tiles()
    cache_mode: str = "disabled"
    cache_option: str = ""
    scm_mask: str = ""
    scm_policy_dynamic: bool = True
    output_compression: Annotated[Whole, Field(ge=0, le=100)] = 100
    model: str | None = None


class ImageRequest(Common):
    """A request for pictures."""

    batch_count: Annotated[Whole, Field(ge=1, le=MAX_PICTURES)] = 1
    mask_image: Base64 | None = None
    ref_images: list[Base64] = []
    control_image: Base64 | None = None
    control_strength: float = 0.9
    ip_adapter_image: Base64 | None = None
    ip_adapter_strength: float = 1.0
    auto_resize_ref_image: bool = True
    increase_ref_index: bool = False
    hires: Hires = Hires()
    embed_image_metadata: bool = True
    output_format: Literal["png", "jpeg", "webp"] = "png"


class VideoRequest(Common):
    """A request for a film. ``high_noise_sample_params``: of models with another model for high noise, what of its
    sampling is another than ``sample_params``: steps of its own, ``txt_cfg``, ``sample_method`` and ``eta``."""

    video_frames: Annotated[Whole, Field(ge=1, le=MAX_FRAMES)] | None = None
    fps: Annotated[Whole, Field(ge=1, le=1000)] | None = None
    moe_boundary: Share | None = None
    vace_strength: float = 1.0
    end_image: Base64 | None = None
    control_frames: list[Base64] = []
    high_noise_sample_params: Sampling = Sampling(sample_steps=-1)
    output_format: Literal["webm", "webp", "avi", "mp4", "gif"] = "webm"


Asked = ImageRequest | VideoRequest


def check(asked: Asked) -> None:
    """Raises :class:`InvalidValue` for what sdrpc has nothing for, by its field."""
    tiles = asked.vae_tiling_params
    refused: dict[str, Any] = {
        "lora.is_high_noise": any(lora.is_high_noise for lora in asked.lora),
        "vae_tiling_params.temporal_tiling": tiles.enabled and tiles.temporal_tiling,
        "vae_tiling_params.rel_size_x": tiles.enabled and tiles.rel_size_x,
        "vae_tiling_params.rel_size_y": tiles.enabled and tiles.rel_size_y,
        "vae_tiling_params.extra_tiling_args": tiles.enabled and tiles.extra_tiling_args,
    }
    if isinstance(asked, ImageRequest):
        refused |= {
            "ip_adapter_image": asked.ip_adapter_image and "a picture",
            "increase_ref_index": asked.increase_ref_index,
            "auto_resize_ref_image": not asked.auto_resize_ref_image and "false",
        }
    else:
        refused |= {
            "vace_strength": asked.vace_strength != 1.0 and asked.vace_strength,
            "control_frames": len(asked.control_frames),
            "high_noise_sample_params": ", ".join(sorted(_high_noise(asked).keys() - _OWN.keys())),
        }
    for field, value in refused.items():
        if value:
            raise InvalidValue(field, value, "this server does not have it")


_OWN = {
    "sample_steps": "high_noise_steps", "guidance.txt_cfg": "high_noise_cfg_scale",
    "sample_method": "high_noise_sampling_method", "eta": "high_noise_eta",
}  # fmt: skip
"""What of sampling under high noise can be another than usual → the request's field."""


def _high_noise(asked: VideoRequest) -> dict[str, Any]:
    """What is said of sampling under high noise, and is another than usual, by its names here."""

    def flat(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in given.items():
            nested = isinstance(value, dict)
            found |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
        return found

    usual = flat(asked.sample_params.model_dump())
    high = flat(asked.high_noise_sample_params.model_dump(exclude_unset=True))
    steps = high.pop("sample_steps", -1)
    own = {} if steps in (None, -1) else {"sample_steps": steps}  # steps of its own, also where they are as many
    return own | {name: value for name, value in high.items() if value is not None and value != usual[name]}


def fields_of(asked: Asked) -> dict[str, Any]:
    """The fields of a :class:`sdrpc.Request`; None where the default is meant."""
    sampling, tiles = asked.sample_params, asked.vae_tiling_params
    guidance = sampling.guidance
    fields = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "clip_skip": asked.clip_skip,
        "width": asked.width,
        "height": asked.height,
        "strength": asked.strength,
        "seed": asked.seed,
        "scheduler": sampling.scheduler or None,
        "sampling_method": sampling.sample_method or None,
        "steps": sampling.sample_steps if (sampling.sample_steps or 0) > 0 else None,
        "eta": sampling.eta,
        "flow_shift": sampling.flow_shift,
        "timestep_shift": sampling.shifted_timestep,
        "sigmas": tuple(sampling.custom_sigmas),
        "cfg_scale": guidance.txt_cfg,
        "img_cfg_scale": None if guidance.img_cfg == guidance.txt_cfg else guidance.img_cfg,
        "guidance": guidance.distilled_guidance,
        "loras": tuple((lora.path, lora.multiplier) for lora in asked.lora),
        "cache_mode": asked.cache_mode,
        "cache_option": asked.cache_option,
        "scm_mask": asked.scm_mask,
        "scm_policy": POLICIES[not asked.scm_policy_dynamic],
        **_skipped(guidance.slg),
        **_tiles(tiles),
    }
    if isinstance(asked, VideoRequest):
        film = {"video_frames": asked.video_frames, "fps": asked.fps, "moe_boundary": asked.moe_boundary}
        return {**fields, **film, **{_OWN[name]: value for name, value in _high_noise(asked).items() if name in _OWN}}
    return {
        **fields,
        "batch_count": asked.batch_count,
        "control_strength": asked.control_strength,
        **_second_pass(asked.hires),
    }


_SAMPLING, _SKIPPING = "sample_params", "sample_params.guidance.slg"

CALLED: Mapping[str, str] = {
    "steps": f"{_SAMPLING}.sample_steps", "scheduler": f"{_SAMPLING}.scheduler",
    "sampling_method": f"{_SAMPLING}.sample_method", "eta": f"{_SAMPLING}.eta",
    "flow_shift": f"{_SAMPLING}.flow_shift", "timestep_shift": f"{_SAMPLING}.shifted_timestep",
    "sigmas": f"{_SAMPLING}.custom_sigmas", "cfg_scale": f"{_SAMPLING}.guidance.txt_cfg",
    "img_cfg_scale": f"{_SAMPLING}.guidance.img_cfg", "guidance": f"{_SAMPLING}.guidance.distilled_guidance",
    "slg_scale": f"{_SKIPPING}.scale", "skip_layers": f"{_SKIPPING}.layers",
    "skip_layer_start": f"{_SKIPPING}.layer_start", "skip_layer_end": f"{_SKIPPING}.layer_end",
    "vae_tiling": "vae_tiling_params.enabled", "vae_tile_size": "vae_tiling_params.tile_size_x",
    "vae_tile_overlap": "vae_tiling_params.target_overlap", "loras": "lora", "mask": "mask_image",
    "scm_policy": "scm_policy_dynamic",
    "hires": "hires.enabled", "hires_upscaler": "hires.upscaler", "hires_scale": "hires.scale",
    "hires_width": "hires.target_width", "hires_height": "hires.target_height", "hires_steps": "hires.steps",
    "hires_denoising_strength": "hires.denoising_strength", "hires_sigmas": "hires.custom_sigmas",
    "hires_upscale_tile_size": "hires.upscale_tile_size",
    **{ours: f"high_noise_sample_params.{theirs}" for theirs, ours in _OWN.items()},
}  # fmt: skip
"""A field of a :class:`sdrpc.Request` → where it is in these requests, if not under its own name."""


def _skipped(slg: SkipLayers) -> dict[str, Any]:
    if not slg.scale:
        return {}
    start, end = slg.layer_start, slg.layer_end
    return {
        "slg_scale": slg.scale, "skip_layers": tuple(slg.layers), "skip_layer_start": start, "skip_layer_end": end
    }  # fmt: skip


def _tiles(tiles: Tiles) -> dict[str, Any]:
    if not tiles.enabled:
        return {}
    size = {"vae_tile_size": (tiles.tile_size_x, tiles.tile_size_y)} if tiles.tile_size_x or tiles.tile_size_y else {}
    return {"vae_tiling": True, "vae_tile_overlap": tiles.target_overlap, **size}


def _second_pass(hires: Hires) -> dict[str, Any]:
    if not hires.enabled:
        return {}
    return {
        "hires": True, "hires_upscaler": hires.upscaler, "hires_scale": hires.scale, "hires_steps": hires.steps,
        "hires_width": hires.target_width or None, "hires_height": hires.target_height or None,
        "hires_denoising_strength": hires.denoising_strength, "hires_sigmas": tuple(hires.custom_sigmas),
        "hires_upscale_tile_size": hires.upscale_tile_size,
    }  # fmt: skip


def pictures_in(asked: Asked) -> dict[str, list[bytes]]:
    """The files of pictures that a request begins with."""
    given: dict[str, Sequence[str | None]] = {"init_image": [asked.init_image]}
    if isinstance(asked, VideoRequest):
        given["end_image"] = [asked.end_image]
    else:
        given |= {
            "mask": [asked.mask_image], "ref_images": asked.ref_images, "control_image": [asked.control_image]
        }  # fmt: skip
    return {name: [from_base64(name, text) for text in texts if text] for name, texts in given.items()}


def kind_of(asked: Asked) -> Kind:
    return Kind.FILM if isinstance(asked, VideoRequest) else Kind.PICTURES


def within(prompt: str) -> tuple[str, str | None, dict[str, Any]]:
    """A prompt of another API without the JSON of this one that it may carry between ``<sd_cpp_extra_args>`` tags; the
    model and the fields that this names. Raises :class:`InvalidValue`."""
    before, begins, rest = prompt.partition(BEGIN)
    carried, ends, behind = rest.partition(END)
    if not begins or not ends:
        return prompt, None, {}
    try:
        asked = ImageRequest.model_validate(json.loads(carried))
    except ValidationError as error:
        raise InvalidValue("sd_cpp_extra_args", carried, fault_of(error)) from error
    except (ValueError, RecursionError) as error:
        raise InvalidValue("sd_cpp_extra_args", carried, f"is no JSON: {error}") from error
    check(asked)
    usual = fields_of(ImageRequest())
    said = {name: value for name, value in fields_of(asked).items() if value != usual.get(name)}
    said |= {name: getattr(asked, name) for name in _PLAIN & asked.model_fields_set}
    said.pop("prompt", None)
    return (before + behind).strip(), asked.model, said


BEGIN, END = "<sd_cpp_extra_args>", "</sd_cpp_extra_args>"

_PLAIN = {"negative_prompt", "clip_skip", "width", "height", "strength", "seed", "batch_count", "control_strength"}
"""Fields that have the same name in both, and mean something also where they say what is usual."""
