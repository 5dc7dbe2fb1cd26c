"""What somebody chose to put where, by model: it outlives the server."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

from ..device import Device
from ..device_names import AUTO, folded
from ..diffusion import placement
from ..errors import InvalidValue
from ..runtime.chain import Chain, Lanes
from ..storage import read_own, write_whole
from .store import on_disk

log = logging.getLogger(__name__)

MAX_FILE = 1 << 20
"""Bytes of a file of placements."""

Chosen = Mapping[str, tuple[str, ...]]
"""Component → names of its devices, in order of preference, each as sd-cli's ``--backend`` has it: ``RPC0&RPC1``; or
``auto`` alone."""


class Placements:
    """Which components somebody put on which of ``devices``, by model, as the file ``path`` keeps it. For any
    thread."""

    def __init__(self, devices: Sequence[Device], path: Path) -> None:
        self._devices = {device.name: device for device in devices}
        self._path = path
        self._lock = Lock()
        self._chosen = self._read()

    def chosen(self, model: str) -> Chosen:
        """What somebody put where, of a model; nothing where the command line decides."""
        with self._lock:
            return self._chosen.get(model, {})

    def choose(self, model: str, components: Sequence[str], wanted: Mapping[str, Sequence[str]]) -> None:
        """Put what is ``wanted`` of a model's ``components`` on devices, from its next job on; nothing: as the command
        line says. Raises :class:`InvalidValue` for a component or device that is not there, and for one without, and
        :class:`NotKept`."""
        named = {part: self._canonical(part, names) for part, names in wanted.items()}
        assigned = placement.assigned(components, named, "components", ())
        placed = {part: names for part, names in assigned.items() if names}
        with self._lock:
            others = {name: there for name, there in self._chosen.items() if name != model}
            chosen = {**others, model: placed} if placed else others
            with on_disk():
                write_whole(self._path, json.dumps(chosen).encode())
            self._chosen = chosen

    def lanes(self, chosen: Chosen) -> dict[str, list[Lanes]]:
        """What is chosen as places; what is left to a plan is not among them."""
        return {part: [self._lanes(name) for name in names] for part, names in chosen.items() if names != (AUTO,)}

    def _lanes(self, name: str) -> Lanes:
        return Lanes(tuple(map(Chain, placement.meant(name, self._devices, "components"))))

    def _canonical(self, part: str, names: Sequence[str]) -> tuple[str, ...]:
        """The names of a component's devices as they are, each once. Raises :class:`InvalidValue`."""
        if not names:
            reason = "no device is named; leave a component out, and it is where the command line says"
            raise InvalidValue("components", part, reason)
        if not self._devices:
            raise InvalidValue("components", part, "a cluster's devices are placed with --backend")
        if any(folded(name) == AUTO for name in names):
            if len(names) > 1:
                raise InvalidValue("components", ",".join(names), "auto stands alone: a plan is no preference")
            return (AUTO,)
        return tuple(dict.fromkeys(self._lanes(name).name for name in names))

    def _is_there(self, name: str) -> bool:
        try:
            return name == AUTO or bool(self._lanes(name))
        except InvalidValue:
            return False

    def _read(self) -> dict[str, Chosen]:
        """What was chosen before; what of it names devices that are not there any more is as if it had not been."""
        data = read_own(self._path, MAX_FILE)
        if data is None:
            return {}
        try:
            kept: dict[str, Chosen] = {
                str(model): {
                    str(component): tuple(name for name in names if self._is_there(str(name)))
                    for component, names in there.items()
                }
                for model, there in json.loads(data).items()
            }
        except (ValueError, AttributeError, TypeError, RecursionError):
            log.warning("%s is no file of placements: components go where the command line says", self._path)
            return {}
        return {
            model: found for model, there in kept.items() if (found := {part: on for part, on in there.items() if on})
        }
