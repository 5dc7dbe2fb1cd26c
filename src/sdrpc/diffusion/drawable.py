"""What a model can draw: requests with everything filled in, and why some are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    can't draw."""
    family = model.family
    shown = family.references
    drawn = None if shown is None else shown.drawn
    settings = request.resolved(model.defaults, model.size, family.latents.multiple, model.together(video), drawn)
    for name, side in (("width", settings.width), ("height", settings.height)):
        if side < family.latents.least:
            reason = f"{family.title} draws at least {family.latents.least} pixels on a side"
            raise InvalidValue(name, side, reason)
    if settings.prediction is not None:
        predicts_with(model, settings, settings.prediction)
    if settings.ref_images and shown is None:
        reason = f"{family.title} draws without reference pictures"
        raise InvalidValue("ref_images", len(settings.ref_images), reason)
    if settings.ref_images and shown is not None and shown.needs and shown.needs not in model.components:
        needed = family.component(shown.needs)
        raise MissingComponent(needed.option, f"no {needed.title}, which {family.title} sees pictures with")
    if settings.control_image is not None and "control" not in model.components:
        known = "control" in {component.name for component in family.components}
        reason = "needs a ControlNet: name its file (control_net)" if known else "has no ControlNets in sdrpc"
        size = "×".join(map(str, settings.control_image.shape[1::-1]))
        raise InvalidValue("control_image", size, f"{family.title} {reason}", "control_net")
    _check_control(model, settings)
    if request.img_cfg_scale is not None and not inpaints(model):
        reason = "the model is not shown what is around a mask (an inpainting model would be)"
        raise InvalidValue("img_cfg_scale", request.img_cfg_scale, reason)
    if settings.hires is not None and (video or family.latents.films or inpaints(model) or settings.mask is not None):
        reason = "it is for pictures without a mask, of models that are for pictures and not for inpainting"
        raise InvalidValue("hires", "on", reason)
    if HIGH_NOISE not in model.components:
        reason = "there is no model for high noise: name its file (high_noise_diffusion_model)"
        for name in ("steps", "cfg_scale", "sampling_method", "eta"):
            if (said := getattr(request, f"high_noise_{name}")) is not None:
                raise InvalidValue(f"high_noise_{name}", said, reason, "high_noise_diffusion_model")
    if settings.left_out is not None:
        _check_layers(model, settings.left_out.layers)
    if isinstance(settings.cache, dbcache.Options):
        for name in ("diffusion", HIGH_NOISE):
            if name in model.components:
                dbcache.check(settings.cache, family.title, model[name])
    if video and settings.vae_tiling:
        raise InvalidValue("vae_tiling", "on", "films are decoded frame by frame, not in tiles")
    if family.begun is not None:
        first, last = settings.init_image is not None, settings.end_image is not None
        family.begun.check(model.configs, settings.video_frames, first, last)
    elif settings.end_image is not None:
        raise InvalidValue("end_image", "a picture", f"{family.title} draws pictures, no films")
    if family.latents.films and TINY in model.components:
        raise InvalidValue("taesd", model[TINY].found.checkpoint.path, f"there is none for {family.title}")
    if settings.previews is not None:
        mode = settings.previews.mode
        if family.latents.films:
            raise InvalidValue("preview", mode, f"there are none of {family.title}'s latents, which have frames")
        if mode == "tae" and TINY not in model.components:
            raise InvalidValue("preview", mode, "there is no tiny autoencoder: name its file (taesd)", "taesd")
        if mode == "proj" and model.colours is None:
            raise InvalidValue("preview", mode, f"nobody has published the colours of {family.title}'s latents")
    return settings


def _check_control(model: Model, settings: Settings) -> None:
    """Raises :class:`InvalidValue` for what the model's ControlNet can't do with the picture that it is shown."""
    if settings.control_image is None:
        return
    controls, kind = model.family.controls, settings.control_mode
    kinds = controls.kinds(model["control"].config) if controls is not None and "control" in model.components else 0
    if kind is not None and not 0 <= kind < kinds:
        known = (
            f"it can be 0 … {kinds - 1}" if kinds else "there is no ControlNet for several kinds of pictures (Union)"
        )
        raise InvalidValue("control_mode", kind, known)
    if kinds and kind is None:
        reason = f"the ControlNet is for several kinds of pictures (Union): say which this is, 0 … {kinds - 1}"
        raise InvalidValue("control_mode", "nothing", reason)
    if settings.ref_images:
        reason = "there are none beside a control_image"
        raise InvalidValue("ref_images", len(settings.ref_images), reason, "control_image")


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


def _check_layers(model: Model, layers: Sequence[int]) -> None:
    if not model.family.skips_layers:
        raise InvalidValue("slg_scale", "skip layer guidance", f"{model.family.title} has none; leave it 0")
    last = model["diffusion"].config["num_layers"] - 1
    if not 0 <= layers[0] <= layers[-1] <= last:
        raise InvalidValue("skip_layers", ",".join(map(str, layers)), f"they are 0 … {last}")
