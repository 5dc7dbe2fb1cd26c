"""Configurations: what shapes tell, and what a file says of itself where they can't.

A file's metadata entry ``sdrpc.config`` may hold a JSON object, ``{"prediction": "eps", "scaling_factor": 0.18215,
"unet": {...}, "vae": {...}, "text_encoder": {...}}``, whose inner objects are arguments of the components' classes in
diffusers and transformers, such as ``attention_head_dim`` (diffusers' name for the number of heads),
``norm_num_groups`` or the UNet's ``sample_size`` (of the latents that it was trained at). A diffusers directory says
all of it in its own config.json files. ``latent_rgb_factors`` and ``latent_rgb_factors_bias`` (ComfyUI's names) say
what latents look like: red, green and blue, -1 … 1, of each channel, and what is added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError
from .base import Colours, Config, Found

METADATA_KEY = "sdrpc.config"
MAX_SAMPLE_SIZE = 2048
"""Latents on a side that a file may say that it was trained at: pictures of 16,384 pixels."""

MAX_SCALE = 64
"""By which positions may be stretched."""

PREDICTIONS = ("eps", "v", "edm_v", "sd3_flow", "flux_flow", "flux2_flow")

_SCHEDULERS = {"epsilon": "eps", "v_prediction": "v"}
"""diffusers' names of predictions."""

_AXES = ("axes_dims_rope", "axes_dims", "axes_dim_rope")
"""Keys that say how positions share a head."""

_ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu", "quick_gelu")


@dataclass(frozen=True)
class Told:
    """What a file says about itself beyond its tensors. None and empty: nothing."""

    prediction: str | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, Config] = field(default_factory=dict)
    colours: Colours | None = None


def told_by(checkpoint: Checkpoint) -> Told:
    """What the file's metadata or, for a diffusers directory, its JSON files say.

    Raises :class:`CheckpointError` for metadata that can't be understood.
    """
    if checkpoint.configs:
        return _directory(checkpoint)
    text = checkpoint.metadata.get(METADATA_KEY)
    if text is None:
        return Told()
    try:
        content = json.loads(text)
        told = Told(
            content.get("prediction"),
            _factor("scaling_factor", content),
            _factor("shift_factor", content),
            dict(content.get("scheduler", {})),
            {name: dict(value) for name, value in content.items() if isinstance(value, dict)},
            _colours(content.get("latent_rgb_factors"), content.get("latent_rgb_factors_bias", (0, 0, 0))),
        )
        unknown = [name for name, value in content.items() if name in _COMPONENTS and not isinstance(value, dict)]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(checkpoint.path, f"metadata {METADATA_KEY!r} is not understood: {error}") from error
    if unknown:
        raise CheckpointError(
            checkpoint.path, f"metadata {METADATA_KEY!r} is not understood: {unknown[0]} is no object"
        )
    if told.prediction is not None and told.prediction not in PREDICTIONS:
        reason = f"prediction is one of {', '.join(PREDICTIONS)}, not {told.prediction!r}"
        raise CheckpointError(checkpoint.path, f"metadata {METADATA_KEY!r}: {reason}")
    return told


_COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def _factor(name: str, content: Mapping[str, Any]) -> float | None:
    """A finite number; what latents are divided by is above 0."""
    value = content.get(name)
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number) or (name == "scaling_factor" and number <= 0):
        raise ValueError(f"{name} is {value!r}")
    return number


def _colours(factors: Any, bias: Any) -> Colours | None:
    if factors is None:
        return None
    rows = [tuple(map(float, row)) for row in (*factors, bias)]
    if not all(len(row) == 3 and all(map(math.isfinite, row)) for row in rows):
        raise ValueError("latent_rgb_factors are red, green and blue, finite numbers, for each channel")
    *channels, added = ((red, green, blue) for red, green, blue in rows)
    return Colours(tuple(channels), added)


def _directory(checkpoint: Checkpoint) -> Told:
    scheduler, vae = (checkpoint.configs.get(name, {}) for name in ("scheduler", "vae"))
    kind = scheduler.get("prediction_type")
    if kind is not None and kind not in _SCHEDULERS:
        raise CheckpointError(checkpoint.path, f"prediction type {kind!r} is not supported")

    def factor(name: str) -> float | None:
        try:
            return _factor(name, vae)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(checkpoint.path, f"{name} of the VAE can't be {vae[name]!r}") from error

    prediction = _SCHEDULERS[kind] if kind is not None else None
    return Told(prediction, factor("scaling_factor"), factor("shift_factor"), scheduler, checkpoint.configs)


def merged(found: Found, inferred: dict[str, Any], told: Config, keys: Sequence[str]) -> dict[str, Any]:
    """What shapes say, and of what they can't tell (``keys``) what the file says.

    Raises :class:`CheckpointError` for a value that makes no sense for its key.
    """
    here = {key: told[key] for key in keys if told.get(key) is not None}
    for key, value in here.items():
        if not _sensible(key, value):
            raise found.error(f"{key} of the {found.component.title} can't be {value!r}")
    return inferred | here


def check_divides(found: Found, config: Config, key: str, numbers: Sequence[int]) -> None:
    """Raises :class:`CheckpointError` unless the configuration's ``key`` (one number, or one for each of ``numbers``)
    divides ``numbers``."""
    divisor = config[key]
    divisors = divisor if isinstance(divisor, list) else [divisor] * len(numbers)
    what = f"{key} of the {found.component.title} is {divisor!r}"
    if len(divisors) != len(numbers) or not all(type(each) is int and each > 0 for each in divisors):
        raise found.error(f"{what}, not a number above 0")
    if any(number % each for number, each in zip(numbers, divisors, strict=True)):
        hint = f"the file's metadata {METADATA_KEY!r} can say another"
        raise found.error(f"{what}, which does not divide {list(numbers)}; {hint}")


def sample_size(found: Found, name: str, patch: int, otherwise: int) -> int:
    """Latents on a side that a model was trained at, from its table ``name`` of positions, a row for each token of
    ``patch`` latents on a side; ``otherwise`` where it has none. Raises :class:`CheckpointError` for what is none."""
    table = found.tensors.get(name)
    if table is None:
        return otherwise
    size = patch * isqrt(table.shape[1]) if len(table.shape) == 3 else 0
    if not 0 < size <= MAX_SAMPLE_SIZE:
        raise found.error(f"{list(table.shape)} is no table of positions", table.name)
    return size


def axes(head: int, part: int, whole: int) -> list[int]:
    """How positions (text, row, column) share a head where nothing tells: rows and columns get ``part`` of ``whole``
    each, all of them even numbers."""
    rows = head * part // whole // 2 * 2
    return [head - 2 * rows, rows, rows]


def check_axes(found: Found, config: Config, key: str, head: int, count: int = 3) -> None:
    """Raises :class:`CheckpointError` unless the parts of a head that ``key`` gives to positions are ``count`` and make
    up ``head``."""
    if len(config[key]) != count or sum(config[key]) != head:
        raise found.error(f"{key} {config[key]} is no division of heads of {head}")


def _is_size(value: Any) -> bool:
    """Of one side, or of height and width."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and 1 <= side <= MAX_SAMPLE_SIZE for side in sides)


_SENSIBLE: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("act_fn", "hidden_act", "decoder_conv_act_fn"), lambda value: value in _ACTIVATIONS),
    **dict.fromkeys(
        _AXES, lambda value: isinstance(value, list) and all(type(n) is int and n > 0 and not n % 2 for n in value)
    ),
    "rope_theta": lambda value: isinstance(value, float) and 1 < value < 1e12,
    "flip_sin_to_cos": lambda value: isinstance(value, bool),
    "sample_size": _is_size,
    "interpolation_scale": lambda value: isinstance(value, int | float) and 0 < value <= MAX_SCALE,
}
"""Arguments → whether a value is of their kind, where that is not a number or several."""


def _sensible(key: str, value: Any) -> bool:
    """Whether a value is of its argument's kind; numbers that divide channels are checked against them later."""
    if key in _SENSIBLE:
        return _SENSIBLE[key](value)
    if key.endswith(("eps", "epsilon")):
        return isinstance(value, float) and 0 < value < 1
    return isinstance(value, int | list)
