"""What a session tells while it works: values that a terminal, a test or a web page can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .pictures import Pixels

Stage = Literal[
    "capture", "upload", "unpacked", "release", "encode", "sample", "decode", "waiting", "reconnected", "moved"
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something that a session does, or how far it is.

    ``stage``: capture (a component's graph is made, which happens once and takes seconds), upload (weights; the
    ``device`` is named where there are several), unpacked (the ``device``, or any device where none is named, does not
    have the types of the file that ``reason`` names: ``done`` bytes become ``total``), release (a component's weights
    leave their device, for a ``reason``), encode (text, or by the ``vae`` a picture), sample, decode, waiting (for a
    ``device`` that was lost or says nothing any more, for a ``reason``), reconnected (it is there again), moved (the
    component goes on with this ``device`` instead). ``component``: whose. ``done`` and ``total``: bytes of an upload or
    release, steps of sampling, frames of a film that is decoded, seconds of waiting and how many it may become; else 0
    when it begins and 1 of 1 when it is over. ``sent``: bytes of an upload that the device did not have yet; None where
    the device is this machine's own. ``picture`` and ``pictures``: which one of how many, counted from 1; 0 where it is
    for all of them. ``seconds``: since the stage began. ``preview``: what the picture looks like after a step, where
    that was asked for: pixels (height, width, 3) of any size.
    """

    stage: Stage
    component: str = ""
    done: int = 0
    total: int = 1
    sent: int | None = None
    picture: int = 0
    pictures: int = 0
    seconds: float = 0.0
    device: str = ""
    reason: str = ""
    preview: Pixels | None = field(default=None, compare=False, repr=False)

    @property
    def over(self) -> bool:
        return self.done >= self.total


OnEvent = Callable[[Event], None]

Cancel = Callable[[], bool]
"""Asked between evaluations and while weights are uploaded: whether to stop."""
