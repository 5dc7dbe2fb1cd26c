"""What requests work with: the queue, who draws it, the models and devices, and what was chosen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import SdrpcError
from .board import Board
from .metrics import Metrics
from .shelf import Shelf
from .store import JobStore
from .studio import Shown, Studio

MEMORY_SECONDS = 2.0
"""How old what is said about a device's memory may be: a busy one answers between two steps."""


class Context:
    """The parts of one server. ``devices`` gives those that its seats draw on now."""

    def __init__(
        self, store: JobStore, studio: Studio, board: Board, shelf: Shelf, metrics: Metrics,
        devices: Callable[[], Sequence[Shown]],
    ) -> None:  # fmt: skip
        self.store, self.studio, self.board, self.shelf, self.metrics = store, studio, board, shelf, metrics
        self._devices = devices
        self._lock = Lock()
        self._known: tuple[float, list[dict[str, Any]]] = (float("-inf"), [])
        self._chosen = shelf.default

    def devices(self) -> list[dict[str, Any]]:
        """Name, description, free and total bytes of each device, and who draws there; None for what a device that is
        gone doesn't say."""
        with self._lock:
            then, known = self._known
            if time.monotonic() - then > MEMORY_SECONDS:
                known = [_said(device) for device in self._devices()]
                self._known = time.monotonic(), known
            return known

    def about(self, name: str | None) -> dict[str, Any]:
        """A model's family, its defaults, and whether it is shown reference pictures. Raises :class:`InvalidValue`, and
        :class:`CheckpointError` for a file that can't be used."""
        found, model = self.shelf.open(name)
        width, height = model.size
        defaults = model.defaults
        return {
            "name": found,
            "family": model.family.title,
            "references": bool(model.family.references),
            "defaults": {
                "width": width, "height": height, "steps": defaults.steps, "cfg_scale": defaults.cfg_scale,
                "guidance": defaults.guidance, "sampling_method": defaults.sampler, "scheduler": defaults.scheduler,
            },
        }  # fmt: skip

    def files(self) -> Mapping[str, Path | None]:
        """Model → its file; the diffusion model's where it is in parts."""
        return {
            name: files.model or files.diffusion_model or next(iter(files.named.values()), None)
            for name, files in self.shelf.models().items()
        }

    def chosen(self) -> str:
        """The model that A1111's clients have chosen, who name one in their options and not in a request."""
        with self._lock:
            return self._chosen

    def choose(self, name: str) -> None:
        """Raises :class:`InvalidValue` where there is none of that name."""
        found, _ = self.shelf.find(name)
        with self._lock:
            self._chosen = found


def _said(device: Shown) -> dict[str, Any]:
    try:
        memory = device.memory()
    except SdrpcError:
        return {"name": device.name, "description": device.description, "free": None, "total": None}
    return {"name": device.name, "description": device.description, "free": memory.free, "total": memory.total}
