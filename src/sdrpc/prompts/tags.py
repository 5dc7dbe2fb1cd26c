"""``<lora:name:0.8>`` in prompts, as in stable-diffusion.cpp and the web UIs: an instruction, no words."""

from __future__ import annotations

import math
import re

from ..errors import InvalidValue

_LORA = re.compile(r"<lora:(?P<name>[^<>:|]+)(?::(?P<strength>[^<>:]*))?>", re.IGNORECASE)


def loras(field: str, text: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    """``text`` without its LoRA tags, and what they name with its strength (1 where the tag says none), in order.

    Raises :class:`InvalidValue` for ``field`` when a strength is no number.
    """
    found = tuple((match["name"].strip(), _strength(field, match)) for match in _LORA.finditer(text))
    return _LORA.sub("", text), found


def _strength(field: str, match: re.Match[str]) -> float:
    if match["strength"] is None:
        return 1.0
    try:
        strength = float(match["strength"])
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise InvalidValue(field, match[0], f"the strength {match['strength']!r} is no number")
    return strength
