"""What an offloaded module has on its device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ..device import Device
from ..errors import SdrpcError
from ..ggml.weight import Weight
from ..runtime.lost import first_back, surviving
from ..runtime.lowered import Lowered
from ..runtime.run import Executable, WeightStore
from .structure import Description


@dataclass(eq=False)
class Bound:
    """A method for one signature of inputs: its graph, and how its results are put together."""

    lowered: Lowered
    result: Description


class ModuleMemory:
    """The weights and graphs of a module. It holds no reference to the module, which it survives shortly."""

    def __init__(self, device: Device, source: str, retry: float) -> None:
        self.device, self.retry = device, retry
        self._life = device.life
        self.weights: dict[str, Weight] = {}
        self._store = WeightStore(device, self.weights, source=source)
        self._executables: dict[Bound, Executable] = {}

    def run(self, bound: Bound, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """The graph's results; a device that is lost, now or since the last call, is waited for."""

        def work() -> tuple[np.ndarray, ...]:
            with self.device.turns:
                if self._life != self.device.life:
                    self._free()
                    self._life = self.device.life
                if bound not in self._executables:
                    self._executables[bound] = Executable(bound.lowered, self.device, self._store)
                return self._executables[bound](**arrays)

        return surviving(work, lambda lost: first_back([self.device], lost, self.retry))

    def drop(self, bound: Bound) -> None:
        """Free what a graph has; the weights stay."""
        with self.device.turns:
            executable = self._executables.pop(bound, None)
            if executable is not None:
                executable.close()

    def close(self) -> None:
        """Free everything; what runs next uploads again."""
        with self.device.turns:
            self._free()

    def forget(self) -> None:
        """Free everything, in the device's turn; what is lost with the device is no error."""
        self.weights.clear()
        with suppress(SdrpcError):
            self._free()

    def _free(self) -> None:
        while self._executables:
            self._executables.popitem()[1].close()
        self._store.close()
