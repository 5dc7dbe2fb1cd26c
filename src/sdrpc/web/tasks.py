"""Requests as tasks of the queue, which are kept as JSON beside their pictures, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..diffusion.image_files import READERS, read_pictures
from ..diffusion.request import Request, Settings
from ..errors import InvalidValue
from .jobs import Kind

MAX_PIXELS = 1 << 24
"""Of one picture: 4096 × 4096. Who draws larger ones uses sd-cli."""

MAX_FILM_PIXELS = 1 << 28
"""Of all frames of a film: 129 of 1920 × 1080."""

_NOTHING = Request("")


def check_size(settings: Settings) -> None:
    """Raises :class:`InvalidValue` for more than this server draws."""
    width, height = settings.final_size
    for field, value, pixels, most in (
        ("width", width, width * height, MAX_PIXELS),
        ("video_frames", settings.video_frames, width * height * settings.video_frames, MAX_FILM_PIXELS),
    ):
        if pixels > most:
            what = "a picture" if field == "width" else "a film"
            raise InvalidValue(field, value, f"{what} can have {most >> 20} mebipixels, and {pixels >> 20} are wanted")


def fields_of(request: Request, settings: Settings, kind: Kind) -> dict[str, Any]:
    """What a task keeps of ``request``, which ``settings`` is with everything filled in: all that was asked for but its
    pictures, and what has to be the same whenever it is drawn."""
    fields = {
        entry: value
        for entry, value in vars(request).items()
        if entry not in READERS and value is not None and value != getattr(_NOTHING, entry)
    }
    fields |= {"prompt": request.prompt, "seed": settings.seed}
    if kind is Kind.FILM:
        fields |= {"video_frames": settings.video_frames, "fps": settings.fps}
    return fields


def request_of(fields: Mapping[str, Any], pictures: Mapping[str, Sequence[bytes]]) -> Request:
    """The request that a task keeps as ``fields``, with the files of its ``pictures``, by field."""
    asked = {name: _tuples(value) for name, value in fields.items()}
    return Request(**asked | read_pictures(pictures))


def _tuples(value: Any) -> Any:
    """JSON has lists where a request has tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
