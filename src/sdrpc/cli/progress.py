"""How far the work is: one line at the bottom of a terminal while something goes on, and one that stays when it is
over."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import RLock

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType

from ..diffusion.events import Event
from ..diffusion.placement import UPSCALER

Say = Callable[[str], None]
REDRAW_SECONDS = 0.1
LITTLE = 0.01
"""A share of an upload that is not worth a word: small tensors are always sent, equal ones once."""
BAR = 20
"""Columns of a bar, without its ends."""
LEAST_LABEL = 12

_ERASE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class StatusLine:
    """The line at the bottom. It is there on terminals only, and always shorter than they are wide, so that what comes
    next can take its place. For any thread."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = RLock()
        self._shown = False
        self._drawn = 0.0

    def show(self, label: str, fraction: float | None = None, amount: str = "") -> None:
        """``fraction`` of the work that is done, None where nobody knows."""
        with self._lock:
            now = time.monotonic()
            if not self.possible or (self._shown and now - self._drawn < REDRAW_SECONDS):
                return
            self._drawn = now
            line = fitted(label, fraction, amount, self._console.width - 1)
            self._console.control(_ERASE)
            self._console.print(line, end="", markup=False, highlight=False)
            self._console.file.flush()
            self._shown = True

    def clear(self) -> None:
        """Take the line away; the next :meth:`show` draws it again."""
        with self._lock:
            if self._shown:
                self._console.control(_ERASE)
                self._console.file.flush()
                self._shown = False

    @property
    def possible(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal


def fitted(label: str, fraction: float | None, amount: str, width: int) -> str:
    """A line of at most ``width`` columns: the label, a bar where there is room for it, and the amount."""
    bar = "" if fraction is None else f" [{'=' * round(BAR * fraction):{BAR}}]"
    amount = f" {amount}" if amount else ""
    room = width - cell_len(bar + amount)
    if room < min(LEAST_LABEL, cell_len(label)):
        bar, room = "", width - cell_len(amount)
    if cell_len(label) > room:
        label = set_cell_size(label, max(room - 3, 0)) + "..."
    return set_cell_size(label + bar + amount, width).rstrip()


class Meter:
    """A session's events for people: what goes on in the status line, what is over in a line that stays (``say``)."""

    def __init__(self, status: StatusLine, say: Say, preparing: Callable[[], float] = lambda: 0.0) -> None:
        """``preparing``: seconds so far that went into what captures and uploads are a part of, as far as it is
        known."""
        self._status, self._say, self._preparing = status, say, preparing
        self._waited, self._prepared, self._before = 0.0, 0.0, 0.0
        """Seconds of the picture that is being sampled which went into waiting, and into captures and uploads; and what
        ``preparing`` was before it."""
        self._waited_for = ("", "")
        """Device and component that the last line was about, until it is there again."""

    def bytes(self, what: str, done: int, total: int) -> None:
        """How far something else is that is made of bytes, such as a file."""
        self._status.show(what, done / max(total, 1), f"{mebibytes(done)} of {mebibytes(total)}")

    def steps(self, what: str, done: int, total: int) -> None:
        """How far something else is that is made of steps."""
        self._status.show(what, done / max(total, 1), f"{done} of {total}")

    def tell(self, event: Event) -> None:
        """Show what a session does."""
        _SHOWN[event.stage](self, event)

    def _capture(self, event: Event) -> None:
        if event.over:
            self._prepared += event.seconds
            self._say(f"{event.component}: captured its graph, once, in {event.seconds:.1f} s")
        else:
            self._status.show(f"{event.component}: capturing its graph, once")

    def _upload(self, event: Event) -> None:
        if event.over:
            self._prepared += event.seconds
            where = f", on {event.device}" if event.device else ""
            self._say(f"{event.component}: {uploaded(event)}{where}")
        else:
            speed = f"  {mebibytes(event.done / event.seconds)}/s" if event.sent and event.seconds else ""
            amount = f"{mebibytes(event.done)} of {mebibytes(event.total)}{speed}"
            self._status.show(f"{event.component}: weights", event.done / max(event.total, 1), amount)

    def _unpacked(self, event: Event) -> None:
        sizes = f"{mebibytes(event.done)} of weights are sent and held as {mebibytes(event.total)}"
        who = f"{event.device} has no" if event.device else "no device holds"
        self._say(f"{event.component}: {who} {event.reason}: {sizes}")

    def _release(self, event: Event) -> None:
        self._say(f"{event.component}: its weights left their device, {event.reason}")

    def _encode(self, event: Event) -> None:
        if not event.over:
            self._status.show("encoding the picture" if event.component == "vae" else "encoding the prompt")

    def _sample(self, event: Event) -> None:
        if not event.done:
            self._waited, self._prepared, self._before = 0.0, 0.0, self._preparing()
        prepared = max(self._prepared, self._preparing() - self._before)
        seconds = max(event.seconds - self._waited - prepared, 0.0)
        label = f"picture {event.picture} of {event.pictures}"
        if event.over:
            self._say(f"{label}: {event.total} steps in {seconds:.1f} s{pace(event.total, seconds)}")
        else:
            amount = f"step {event.done} of {event.total}{pace(event.done, seconds)}"
            self._status.show(label, event.done / event.total, amount)

    def _waiting(self, event: Event) -> None:
        if (event.device, event.component) != self._waited_for:
            self._waited_for = event.device, event.component
            self._say(f"{event.component}: waiting for {event.device}: {event.reason}")
        amount = f"{event.done} of {event.total} s"
        self._status.show(f"{event.component}: waiting for {event.device}", event.done / event.total, amount)

    def _reconnected(self, event: Event) -> None:
        self._waited_for = ("", "")
        self._waited += event.seconds
        self._say(f"{event.component}: {event.device} is there again after {event.seconds:.1f} s, going on")

    def _moved(self, event: Event) -> None:
        self._waited_for = ("", "")
        self._waited += event.seconds
        self._say(f"{event.component}: goes on with {event.device}, after {event.seconds:.1f} s")

    def _decode(self, event: Event) -> None:
        if event.total > 1:
            label, what = ("upscaling", "tile") if event.component == UPSCALER else ("decoding", "frame")
            self._status.show(label, event.done / event.total, f"{what} {event.done} of {event.total}")
        elif not event.over:
            self._status.show("decoding")


_SHOWN = {
    "capture": Meter._capture,
    "upload": Meter._upload,
    "unpacked": Meter._unpacked,
    "release": Meter._release,
    "encode": Meter._encode,
    "sample": Meter._sample,
    "decode": Meter._decode,
    "waiting": Meter._waiting,
    "reconnected": Meter._reconnected,
    "moved": Meter._moved,
}


def uploaded(event: Event) -> str:
    """What an upload that is over has cost."""
    size = mebibytes(event.total)
    if event.sent is None:
        return f"{size} of weights loaded in {event.seconds:.1f} s"
    if event.sent < event.total * LITTLE:
        return f"nothing had to be sent, its server has the {size} of weights"
    speed = f", {mebibytes(event.sent / event.seconds)}/s" if event.seconds else ""
    whole = event.sent > event.total * (1 - LITTLE)
    rest = "" if whole else f" of {size}, the server has the rest"
    return f"{mebibytes(event.sent)} of weights sent{rest}, in {event.seconds:.1f} s{speed}"


def pace(steps: int, seconds: float) -> str:
    """Steps per second, or seconds per step where that is the larger number, as sd-cli writes it."""
    if not steps or not seconds:
        return ""
    return f", {steps / seconds:.2f} it/s" if steps >= seconds else f", {seconds / steps:.2f} s/it"


def mebibytes(size: float) -> str:
    if 0 < size < 0.1 * 2**20:
        return f"{size / 2**10:,.1f} KiB"
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:,.1f} MiB"
