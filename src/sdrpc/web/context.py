"""What requests work with: the queue, who draws it, the models and devices, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from .board import Board
from .devices import Devices
from .metrics import Metrics
from .placements import Placements
from .shelf import Shelf
from .store import JobStore
from .studio import Studio


class Context:
    """The parts of one server."""

    def __init__(
        self,
        store: JobStore,
        studio: Studio,
        board: Board,
        shelf: Shelf,
        metrics: Metrics,
        devices: Devices,
        placements: Placements,
    ) -> None:
        self.store, self.studio, self.board, self.shelf, self.metrics = store, studio, board, shelf, metrics
        self.devices, self.placements = devices, placements
        self._lock = Lock()
        self._chosen = shelf.default

    def about(self, name: str | None) -> dict[str, Any]:
        """A model's family, its components, its defaults, and whether it is shown reference pictures or draws films.
        Raises :class:`InvalidValue`, and :class:`CheckpointError` for a file that can't be used."""
        found, model = self.shelf.open(name)
        width, height = model.size
        defaults = model.defaults
        films = {"video_frames": defaults.frames, "fps": defaults.fps} if model.frames else {}
        return {
            "name": found,
            "family": model.family.title,
            "components": list(model.components),
            "references": bool(model.family.references),
            "films": bool(model.frames),
            "defaults": {
                "width": width, "height": height, "steps": defaults.steps, "cfg_scale": defaults.cfg_scale,
                "guidance": defaults.guidance, "sampling_method": defaults.sampler, "scheduler": defaults.scheduler,
                **films,
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
