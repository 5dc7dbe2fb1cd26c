"""What a model can draw: requests with everything filled in, and why some are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..errors import InvalidValue, MissingComponent
from ..families.model import Model
from . import dbcache
from .autoencoder import TINY
from .halves import HIGH_NOISE
from .predictions import Eps, NoiseScale, Prediction, flux2_shift, flux_shift_by_size, prediction
from .request import Request, Settings

TOKEN_SIDES = {"flux_flow": 2, "flux2_flow": 1}
"""Latents on a side that FLUX.1 and FLUX.2 make one token of: their shifts follow from the number of tokens."""


def settings_of(model: Model, request: Request, video: bool = False) -> Settings:
    """``request`` with everything filled in, for pictures or for films. Raises :class:`InvalidValue` for what the model
    can't draw, and :class:`MissingComponent` where it lacks what that takes."""
    family = model.family
    drawn = None if family.references is None else family.references.drawn
    settings = request.resolved(model.defaults, model.size, family.latents.multiple, model.together(video), drawn)
    for check in _CHECKS:
        check(Asked(model, request, settings, video))
    return settings


class Asked(NamedTuple):
    """What is checked: a request, also with everything filled in, of a model, for a film if ``video``."""

    model: Model
    request: Request
    settings: Settings
    video: bool


def _check_size(asked: Asked) -> None:
    family, settings = asked.model.family, asked.settings
    for name, side in (("width", settings.width), ("height", settings.height)):
        if side < family.latents.least:
            reason = f"{family.title} draws at least {family.latents.least} pixels on a side"
            raise InvalidValue(name, side, reason)


def _check_prediction(asked: Asked) -> None:
    if asked.settings.prediction is not None:
        predicts_with(asked.model, asked.settings, asked.settings.prediction)


def _check_references(asked: Asked) -> None:
    model, pictures, shown = asked.model, asked.settings.ref_images, asked.model.family.references
    if not pictures:
        return
    if shown is None:
        raise InvalidValue("ref_images", len(pictures), f"{model.family.title} draws without reference pictures")
    if shown.needs and shown.needs not in model.components:
        needed = model.family.component(shown.needs)
        raise MissingComponent(needed.option, f"no {needed.title}, which {model.family.title} sees pictures with")


def _check_control(asked: Asked) -> None:
    model, settings, controls = asked.model, asked.settings, asked.model.family.controls
    if settings.control_image is None:
        return
    if "control" not in model.components or controls is None:
        known = "control" in {component.name for component in model.family.components}
        reason = "needs a ControlNet: name its file (control_net)" if known else "has no ControlNets in sdrpc"
        size = "×".join(map(str, settings.control_image.shape[1::-1]))
        raise InvalidValue("control_image", size, f"{model.family.title} {reason}", "control_net")
    kind, kinds = settings.control_mode, controls.kinds(model["control"].config)
    if kind is not None and not 0 <= kind < kinds:
        none = "there is no ControlNet for several kinds of pictures (Union)"
        raise InvalidValue("control_mode", kind, f"it can be 0 … {kinds - 1}" if kinds else none)
    if kinds and kind is None:
        reason = f"the ControlNet is for several kinds of pictures (Union): say which this is, 0 … {kinds - 1}"
        raise InvalidValue("control_mode", "nothing", reason)
    if settings.ref_images:
        reason = "there are none beside a control_image"
        raise InvalidValue("ref_images", len(settings.ref_images), reason, "control_image")


def _check_inpainting(asked: Asked) -> None:
    if asked.request.img_cfg_scale is not None and not inpaints(asked.model):
        reason = "the model is not shown what is around a mask (an inpainting model would be)"
        raise InvalidValue("img_cfg_scale", asked.request.img_cfg_scale, reason)


def _check_hires(asked: Asked) -> None:
    films = asked.video or asked.model.family.latents.films
    if asked.settings.hires is not None and (films or inpaints(asked.model) or asked.settings.mask is not None):
        reason = "it is for pictures without a mask, of models that are for pictures and not for inpainting"
        raise InvalidValue("hires", "on", reason)


def _check_high_noise(asked: Asked) -> None:
    if HIGH_NOISE in asked.model.components:
        return
    reason = "there is no model for high noise: name its file (high_noise_diffusion_model)"
    for name in ("steps", "cfg_scale", "sampling_method", "eta"):
        if (said := getattr(asked.request, f"high_noise_{name}")) is not None:
            raise InvalidValue(f"high_noise_{name}", said, reason, "high_noise_diffusion_model")


def _check_layers(asked: Asked) -> None:
    model, left_out = asked.model, asked.settings.left_out
    if left_out is None:
        return
    if not model.family.skips_layers:
        said = f"{model.family.title} has no skip layer guidance; leave it 0"
        raise InvalidValue("slg_scale", f"{left_out.scale:g}", said)
    layers, last = left_out.layers, model["diffusion"].config["num_layers"] - 1
    if not 0 <= layers[0] <= layers[-1] <= last:
        raise InvalidValue("skip_layers", ",".join(map(str, layers)), f"they are 0 … {last}")


def _check_cache(asked: Asked) -> None:
    if isinstance(asked.settings.cache, dbcache.Options):
        for name in ("diffusion", HIGH_NOISE):
            if name in asked.model.components:
                dbcache.check(asked.settings.cache, asked.model.family.title, asked.model[name])


def _check_film(asked: Asked) -> None:
    model, family, settings = asked.model, asked.model.family, asked.settings
    if asked.video and settings.vae_tiling:
        raise InvalidValue("vae_tiling", "on", "films are decoded frame by frame, not in tiles")
    if family.begun is not None:
        first, last = settings.init_image is not None, settings.end_image is not None
        family.begun.check(model.configs, settings.video_frames, first, last)
    elif settings.end_image is not None:
        raise InvalidValue("end_image", "a picture", f"{family.title} draws pictures, no films")
    if family.latents.films and TINY in model.components:
        raise InvalidValue("taesd", model[TINY].found.checkpoint.path, f"there is none for {family.title}")


def _check_previews(asked: Asked) -> None:
    model, family, previews = asked.model, asked.model.family, asked.settings.previews
    if previews is None:
        return
    if family.latents.films:
        raise InvalidValue("preview", previews.mode, f"there are none of {family.title}'s latents, which have frames")
    if previews.mode == "tae" and TINY not in model.components:
        raise InvalidValue("preview", previews.mode, "there is no tiny autoencoder: name its file (taesd)", "taesd")
    if previews.mode == "proj" and model.colours is None:
        raise InvalidValue("preview", previews.mode, f"nobody has published the colours of {family.title}'s latents")


_CHECKS: tuple[Callable[[Asked], None], ...] = (
    _check_size, _check_prediction, _check_references, _check_control, _check_inpainting, _check_hires,
    _check_high_noise, _check_layers, _check_cache, _check_film, _check_previews,
)  # fmt: skip
"""In this order; each raises what is wrong."""


def latents_shape(model: Model, settings: Settings) -> tuple[int, ...]:
    """Of what is drawn: (1, c, h, w), or of models that draw films (1, c, frames, h, w)."""
    frames = ((settings.video_frames - 1) // model.frames + 1,) if model.frames else ()
    side = settings.height // model.pixels, settings.width // model.pixels
    return (1, model.latent_channels, *frames, *side)


def with_sound(model: Model, settings: Settings, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what is drawn with latents of this ``shape``: of models of films with sound that has more frames,
    as many as the sound's latents fill."""
    sound = model.family.latents.sound(settings.video_frames, settings.fps)
    if not sound:
        return shape
    batch, channels, frames, *side = shape
    return (batch, channels, frames + -(-sound // int(np.prod(side))), *side)


def predicts_with(model: Model, settings: Settings, name: str) -> Prediction:
    """The prediction called ``name`` for pictures with these settings, with the shift that follows from them. Raises
    :class:`InvalidValue` for settings that mean nothing with it."""
    shift = settings.flow_shift
    if shift is None and name in TOKEN_SIDES:
        side = model.pixels * TOKEN_SIDES[name]
        tokens = settings.width // side * (settings.height // side)
        shift = flux_shift_by_size(tokens) if name == "flux_flow" else flux2_shift(tokens, settings.steps)
    found = prediction(name, shift=shift)
    if model.family.betas is not None and isinstance(found, Eps):
        found = replace(found, scale=NoiseScale(*model.family.betas, linear=True))
    if settings.timestep_shift and found.flow:
        raise InvalidValue("timestep_shift", settings.timestep_shift, f"models that predict {name} have none")
    return found


def inpaints(model: Model) -> bool:
    """Whether the model was made for inpainting: it is shown what is around a mask."""
    inpainting = model.family.inpainting
    return inpainting is not None and inpainting.takes(model["diffusion"].config)
