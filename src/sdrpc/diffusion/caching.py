"""What of a picture's steps is not computed: sd-cli's --cache-mode and what says more of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from ..errors import InvalidValue
from . import dbcache, easycache

CacheOptions = easycache.Options | dbcache.Options

MODES: dict[str, Callable[[], CacheOptions] | None] = {
    "disabled": None, "easycache": easycache.Options, "dbcache": dbcache.Options,
}  # fmt: skip
"""Those that are here, each with its defaults; None: every step is computed."""

ELSEWHERE = ("ucache", "taylorseer", "cache-dit", "spectrum")
"""Those that only stable-diffusion.cpp has."""

POLICIES = ("dynamic", "static")
"""Whether steps that --scm-mask lets reuse something do so where little changes, or always."""


def find_options(mode: str, text: str, mask: str = "", policy: str = POLICIES[0]) -> CacheOptions | None:
    """What ``mode`` means with its options (``name=number,…``), and with ``mask`` and ``policy``: --scm-mask, in which
    1 stands for a step that is computed and 0 for one that may reuse something (``1,1,0``). None: every step is
    computed. Raises :class:`InvalidValue` for what does not exist or makes no sense."""
    if mode not in MODES:
        reason = "is not supported yet" if mode in ELSEWHERE else "does not exist"
        raise InvalidValue("cache_mode", mode, f"{reason}; there are {', '.join(MODES)}")
    if policy not in POLICIES:
        raise InvalidValue("scm_policy", policy, f"there are {', '.join(POLICIES)}")
    if mask and mode != "dbcache":
        raise InvalidValue("scm_mask", mask, "is of cache_mode dbcache", "cache_mode")
    if policy == "static" and not mask:
        raise InvalidValue("scm_policy", policy, "says what scm_mask means, and there is none", "scm_mask")
    steps = [step.strip() for step in mask.split(",")] if mask else []
    if not set(steps) <= {"0", "1"}:
        raise InvalidValue("scm_mask", mask, "has a 0 or a 1 for each step: 1,1,0,0,1")
    make = MODES[mode]
    if make is None:
        if text:
            raise InvalidValue("cache_option", text, "says something of a cache_mode, and none is chosen", "cache_mode")
        return None
    options = parsed(text, make())
    if isinstance(options, dbcache.Options):
        return replace(options, mask=tuple(map(int, steps)), always=policy == "static")
    return options


def parsed(text: str, defaults: CacheOptions) -> CacheOptions:
    """``defaults`` with what ``text`` says: numbers by the names of its fields, ``threshold=0.2,start=0.15``. Raises
    :class:`InvalidValue` for anything else."""
    kinds = {entry.name: type(getattr(defaults, entry.name)) for entry in fields(defaults)}
    known = {name: kind for name, kind in kinds.items() if kind in (int, float)}
    given: dict[str, Any] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, number = (part.strip() for part in item.partition("="))
        if name not in known:
            raise InvalidValue("cache_option", text, f"{name!r} does not exist; there are {', '.join(known)}")
        if name in given:
            raise InvalidValue("cache_option", text, f"{name} is given twice")
        try:
            given[name] = known[name](number)
        except ValueError as error:
            whole = "a whole number" if known[name] is int else "a number"
            raise InvalidValue("cache_option", text, f"{name} needs {whole}") from error
    options = replace(defaults, **given)
    if wrong := options.wrong:
        raise InvalidValue("cache_option", text, wrong)
    return options
