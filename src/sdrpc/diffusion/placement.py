"""Which component of a model runs on which device: the grammar of sd-cli's ``--backend``.

    cuda0                             everything there
    te=RPC1,diffusion=RPC0,vae=CPU    part by part; te is all text encoders, all= (default=, *=) the rest
    t5xxl=RPC1,te=CPU,all=RPC0        a component by its own name goes before te
    diffusion=RPC0,RPC1,vae=CPU       several devices, in order of preference
    diffusion=RPC0&RPC1               its layers over two devices, one after the other
    diffusion=RPC0|RPC1               on both, side by side: two prompts, or two pictures, at the same time
    diffusion=RPC0&RPC1|RPC2&RPC3,CPU all of it: "&" binds before "|", and that before ","

The first of several preferences that has room is used, and the next one when it is lost. Names are case-insensitive,
``-`` and ``_`` don't matter. How devices are named: :mod:`sdrpc.device_names`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TypeVar, cast

from ..device_names import AUTO, resolve
from ..device_names import folded as folded_name
from ..errors import InvalidValue
from .rooms import NO_LIMIT

T = TypeVar("T")

TEXT_ENCODERS, REST = "te", ""

UPSCALER = "upscaler"
"""A network that enlarges pictures: it has a device, and is no component of a model."""

ALIASES: dict[str, tuple[str, ...]] = {
    "clip_l": ("clipl",),
    "clip_g": ("clipg",),
    "t5xxl": ("t5xxl", "t5"),
    "llm": ("llm",),
    "llm_vision": ("llmvision", "qwen2vlvision"),
    "clip_vision": ("clipvision", "vision"),
    "connectors": ("connectors",),
    "diffusion": ("diffusion", "model", "unet", "dit"),
    "control": ("control", "controlnet"),
    "high_noise_diffusion": ("highnoisediffusion", "highnoise", "highnoisediffusionmodel"),
    "vae": ("vae", "firststage", "autoencoder"),
    "audio_vae": ("audiovae",),
    "vocoder": ("vocoder",),
    "taesd": ("taesd", "tae"),
    UPSCALER: ("upscaler", "esrgan", "hires"),
    TEXT_ENCODERS: ("te", "clip", "text", "textencoder", "textencoders", "conditioner", "cond"),
    REST: ("all", "default", "*"),
}
"""Names of components, of all text encoders and of all that has no device of its own. They are stable-diffusion.cpp's
module names, but that a text encoder can be placed on its own."""

NOT_HERE_YET = (
    "photomaker", "photomakerid", "pmid", "photo", "detector", "adetailer", "yolo",
)  # fmt: skip

NEGATIVE = "cfg"
"""stable-diffusion.cpp's name for a second copy of the diffusion model, which has the negative prompt."""

_COMPONENTS = {alias: name for name, aliases in ALIASES.items() for alias in aliases}


Names = tuple[str, ...]
"""Of devices, in order of preference; each may be several, as :func:`side_by_side` takes it apart."""


def parse(text: str) -> dict[str, Names]:
    """``te=RPC1,vae=CPU`` as component → names of devices; the key ``te`` stands for every text encoder, "" for the
    rest. An entry without ``=`` is a further device for what the entry before it is about, at first for all.

    Raises :class:`InvalidValue` for what is not in the grammar.
    """
    placed: dict[str, Names] = {}
    name = REST
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        module, equals, device = item.partition("=")
        if equals:
            name = _component(module)
            if name in placed:
                raise InvalidValue("backend", text, f"{module} is placed twice")
        device = (device if equals else module).strip()
        if not device:
            raise InvalidValue("backend", item, "no device is named after '='")
        side_by_side(device, item)
        placed[name] = (*placed.get(name, ()), device)
    for names in placed.values():
        _check_auto(names, text)
    return placed


def listed(text: str) -> Names:
    """``RPC0,RPC1``: the value of an option for the devices of one component. Raises as :func:`parse` does."""
    names = tuple(filter(None, (piece.strip() for piece in text.split(","))))
    for name in names:
        side_by_side(name, text)
    _check_auto(names, text)
    return names


def _check_auto(names: Names, text: str) -> None:
    if len(names) > 1 and any(folded_name(name) == AUTO for name in names):
        raise InvalidValue("backend", text, "auto stands alone: it chooses among all devices that are there")


WAITING = ("auto", "cpu", "disk")
"""Where weights are that nobody uses: on their device as long as there is room; in this machine's memory; in their
file."""


def waiting(text: str) -> dict[str, str]:
    """``disk`` or ``te=cpu,diffusion=disk`` (``--params-backend``) as component → one of :data:`WAITING`, with the keys
    of :func:`parse`. Raises :class:`InvalidValue`."""
    found: dict[str, str] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        module, equals, place = item.rpartition("=")
        name = _component(module, "params_backend") if equals else REST
        if folded_name(place) not in WAITING:
            reason = f"weights wait for their turn in one of: {', '.join(WAITING)}"
            raise InvalidValue("params_backend", item, reason)
        if name in found:
            raise InvalidValue("params_backend", text, f"{module or 'the rest'} is placed twice")
        found[name] = folded_name(place)
    return found


def limits(text: str) -> dict[str, int]:
    """``8`` or ``RPC0=6,RPC1=512M`` (``--max-vram``) as name of a device → bytes; "" stands for all others. A number
    alone is one of GiB; 0 is no limit, and one below 0 says how much of what is free stays so, as for
    stable-diffusion.cpp. Raises :class:`InvalidValue`."""
    found: dict[str, int] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, size = item.rpartition("=")
        match = re.fullmatch(r"(-?\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]?)(?:i?B)?", size.strip(), re.IGNORECASE)
        if match is None:
            raise InvalidValue("max_vram", item, "not a size; write it as 8 (GiB), 6.5G or 512M, also RPC0=6,RPC1=8")
        if name.strip() in found:
            raise InvalidValue("max_vram", text, f"{name.strip() or 'the rest'} is limited twice")
        found[name.strip()] = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or "G")) or NO_LIMIT
    return found


def side_by_side(text: str, item: str = "", field: str = "backend") -> tuple[Names, ...]:
    """``RPC0&RPC1|RPC2`` as (("RPC0", "RPC1"), ("RPC2",)): what is side by side, each devices that compute one after
    the other. Raises :class:`InvalidValue` for ``field`` where a name is missing (in ``item``), or one of several is
    ``auto``."""
    found = tuple(tuple(name.strip() for name in names.split("&")) for names in text.split("|"))
    if not all(chain(*found)):
        raise InvalidValue(field, item or text, "a device is named before and after each '&' and '|'")
    if sum(map(len, found)) > 1 and any(folded_name(name) == AUTO for name in chain(*found)):
        raise InvalidValue(field, item or text, "auto stands alone: it cuts by itself what has room nowhere")
    return found


def meant(text: str, there: Mapping[str, T], field: str = "backend") -> tuple[tuple[T, ...], ...]:
    """The devices that ``RPC0&RPC1|RPC2`` means, as :func:`side_by_side` takes it apart, of those that are ``there`` by
    name. Raises :class:`InvalidValue` for ``field`` where one does not exist, or stands there twice."""
    names = [[resolve(name, there, AUTO, field) for name in some] for some in side_by_side(text, field=field)]
    if len(set(chain(*names))) < sum(map(len, names)):
        raise InvalidValue(field, text, "'&' and '|' stand between different devices")
    return tuple(tuple(there[name] for name in some) for some in names)


def wanted(
    components: Sequence[str], placed: Mapping[str, Names], main: str = "", by_option: Mapping[str, str] | None = None
) -> dict[str, Names]:
    """Component → the names that the user gave its devices, ``auto`` where none was given.

    ``components``: of the model, by name. ``by_option`` (``--vae-backend-device`` …: keys as :func:`parse` gives them)
    beats ``placed``, which beats ``main`` (``--main-backend-device``); a component's own name beats ``te``, which beats
    the rest. Raises :class:`InvalidValue` for a component that the model does not have.
    """
    options = {name: names for name, text in (by_option or {}).items() if (names := listed(text))}
    strangers = {*placed, *options} - {*components, TEXT_ENCODERS, REST}
    if strangers:
        reason = f"this model has no {' and no '.join(sorted(strangers))}; it has {', '.join(components)}"
        raise InvalidValue(
            "backend", ",".join(f"{name}={','.join(placed.get(name, ()))}" for name in sorted(strangers)), reason
        )

    def devices(component: str) -> Names:
        named = [table[key] for table in (options, placed) for key in keys_of(component) if key in table]
        return named[0] if named else placed.get(REST) or listed(main) or ("auto",)

    return {component: devices(component) for component in components}


def keys_of(component: str) -> tuple[str, ...]:
    """The names that place a component, the strongest first, without the one for the rest."""
    return (component, *_WITH.get(component, (TEXT_ENCODERS,)))


_WITH: dict[str, tuple[str, ...]] = {
    "clip_vision": (), "control": (), "diffusion": (), "vae": (), "taesd": ("vae",), "upscaler": (),
    "audio_vae": ("vae",), "vocoder": ("audio_vae", "vae"),
    "high_noise_diffusion": ("diffusion",),
}  # fmt: skip
"""What a component is placed with that has no device of its own; text encoders are with each other."""


def assigned(
    components: Sequence[str], given: Mapping[str, T], field: str = "placement", rest: T | None = None
) -> dict[str, T]:
    """Component → what is its own, from a mapping whose keys are names as in the grammar: ``{"te": cpu, "all":
    remote}``; ``rest`` for all others.

    Raises :class:`InvalidValue` for ``field`` where a key is none of the model's, two mean the same, or there is
    nothing for a component.
    """
    by_name: dict[str, T] = {}
    for key, one in given.items():
        name = _component(key, field) if key else REST
        if name in by_name:
            raise InvalidValue(field, key, "is placed twice")
        by_name[name] = one
    strangers = by_name.keys() - {*components, TEXT_ENCODERS, REST}
    if strangers:
        raise InvalidValue(field, sorted(strangers)[0], f"this model has {', '.join(components)}")
    found: dict[str, T] = {}
    for component in components:
        named = [by_name[key] for key in (*keys_of(component), REST) if key in by_name]
        if not named and rest is None:
            raise InvalidValue(field, component, 'no device is given; the key "all" stands for the rest')
        found[component] = named[0] if named else cast(T, rest)
    return found


def _component(module: str, field: str = "backend") -> str:
    folded = folded_name(module)
    if folded in NOT_HERE_YET:
        raise InvalidValue(field, module, f"sdrpc has no {module} yet")
    if folded == NEGATIVE:
        raise InvalidValue(field, module, "the negative prompt has a device beside the prompt's with diffusion=A|B")
    if folded not in _COMPONENTS:
        raise InvalidValue(field, module, f"no such component; there are {', '.join(filter(None, ALIASES))} and all")
    return _COMPONENTS[folded]
