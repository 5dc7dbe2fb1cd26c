"""Larger pictures by a network made for it: ESRGAN and whatever else spandrel reads, in tiles, on any device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.expressions import cast, whole_array
from ..device import Device
from ..errors import CheckpointError, InvalidValue, UsageError
from ..ggml.types import F32 as FLOAT
from ..ggml.weight import Weight
from ..runtime.lost import RETRY_SECONDS
from .named_files import by_name, files_in
from .pictures import F32, Pixels, f32, finite, to_pixels
from .tiles import Cell, Tiling, tiled

if TYPE_CHECKING:
    import torch

TILE = 128
"""Pixels on a side of a tile, as in stable-diffusion.cpp."""
OVERLAP = 0.25
MIN_TILE, MAX_TILE = 16, 4096
MAX_PIXELS = 1 << 28
MAX_REPEATS = 8
MAX_NUMBERS = 1 << 30
"""Of a model: those that are known have some ten millions."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".gguf")

MAX_PASSES = 3
"""How often a network enlarges one picture to reach a size, as in AUTOMATIC1111."""

_WRAPPERS = ("params_ema.", "params-ema.", "params.", "state_dict.", "model_state_dict.", "model.state_dict.")
"""What may stand before all names in a file, the better weights first."""


@dataclass(frozen=True)
class Upscalers:
    """The networks in a ``folder``."""

    folder: Path | None = None

    def names(self) -> dict[str, Path]:
        """Name → file of those directly in the folder."""
        if self.folder is None or not self.folder.is_dir():
            return {}
        return by_name(files_in(self.folder.absolute(), SUFFIXES))

    def find(self, name: str, filters: Collection[str], field: str) -> str | Path:
        """The file of a network, by its name with or without its suffix; of the ``filters`` the name itself. Names are
        looked up, never joined to a path. Raises :class:`InvalidValue` for the ``field``."""
        if name in filters:
            return name
        known = self.names()
        for short, path in known.items():
            if name in (short, path.name):
                return path
        where = "a folder of networks can be named" if self.folder is None else f"networks are those in {self.folder}"
        reason = f"there is no such upscaler; there are {', '.join([*filters, *known])}; {where} (hires_upscalers_dir)"
        raise InvalidValue(field, name, reason, "hires_upscalers_dir")


def scale_of(path: Path) -> int | None:
    """How many times as large on a side the network in a file makes pictures; None where that can't be read."""
    try:
        return _scale(path, path.stat().st_mtime_ns)
    except (OSError, UsageError, CheckpointError):
        return None


@lru_cache(256)
def _scale(path: Path, _changed: int) -> int:
    return int(_described(path).scale)


class Upscaler:
    """The network in a file, on a device. Close it when done.

    Raises :class:`UsageError` where spandrel is not installed, and :class:`CheckpointError` for a file that it does not
    know, or that does not enlarge pictures of three colours.
    """

    def __init__(self, path: Path, device: Device, retry: float = RETRY_SECONDS) -> None:
        from ..lowering.offload import offload

        descriptor = _described(path)
        requirements = descriptor.size_requirements
        self.scale, self._least = int(descriptor.scale), max(1, int(requirements.minimum or 1))
        self._multiple, self._square = max(1, int(requirements.multiple_of or 1)), bool(requirements.square)
        self.title = str(descriptor.architecture.name)
        # the device's precision decides, as for all else that draws a picture
        self._module: Any = offload(descriptor.model.eval(), device, retry, float32_matmul_precision="medium")

    def __call__(
        self,
        image: Pixels,
        repeats: int = 1,
        tile: int = TILE,
        on_tile: Callable[[int, int], None] = lambda *_: None,
    ) -> Pixels:
        """``image`` (height, width, 3), ``scale`` times as large on a side, ``repeats`` times over.

        ``tile``: pixels on a side of what goes through the network at once. ``on_tile`` is told how many are done, of
        how many, each time anew. Raises :class:`InvalidValue` for a result of more than :data:`MAX_PIXELS`.
        """
        self.check(image.shape[1], image.shape[0], repeats, tile)
        for _ in range(repeats):
            x = np.ascontiguousarray(image.transpose(2, 0, 1)[None]).astype(f32) / f32(255)
            larger = tiled(x, Tiling(tile, tile, OVERLAP), Cell(1, self.scale), self._run, on_tile)
            image = to_pixels(finite(larger, "the upscaler's picture")[0] * f32(2) - f32(1))
        return image

    def up_to(
        self, image: Pixels, width: int, height: int, tile: int, on_tile: Callable[[int, int], None] = lambda *_: None
    ) -> Pixels:
        """``image`` enlarged until it has at least ``width`` and ``height``, or :data:`MAX_PASSES` times."""
        for _ in range(MAX_PASSES):
            if image.shape[1] >= width and image.shape[0] >= height:
                break
            image = self(image, 1, tile, on_tile)
        return image

    def check(self, width: int, height: int, repeats: int, tile: int) -> tuple[int, int]:
        """Width and height of a picture of this size when it is enlarged. Raises :class:`InvalidValue` for what can't
        be done."""
        if not 1 <= repeats <= MAX_REPEATS:
            raise InvalidValue("upscale_repeats", repeats, f"it can be 1 … {MAX_REPEATS}")
        if not MIN_TILE <= tile <= MAX_TILE:
            raise InvalidValue("upscale_tile_size", tile, f"it can be {MIN_TILE} … {MAX_TILE}")
        times = self.scale**repeats
        if width * height * times**2 > MAX_PIXELS:
            most = f"{width * times}×{height * times} pixels are more than {MAX_PIXELS // 2**20} mebipixels"
            raise InvalidValue("upscale_repeats", repeats, most)
        return width * times, height * times

    def close(self) -> None:
        """Free what it has on the device."""
        self._module.close()

    def _run(self, x: F32) -> F32:
        """One tile, with its border repeated where the network wants another size."""
        import torch

        rows, columns = x.shape[2:]
        height, width = (self._up(side) for side in (rows, columns))
        if self._square:
            height = width = max(height, width)
        padded = np.pad(x, ((0, 0), (0, 0), (0, height - rows), (0, width - columns)), "edge")
        with torch.inference_mode():
            larger: F32 = self._module(torch.from_numpy(padded)).numpy()
        return larger[:, :, : rows * self.scale, : columns * self.scale]

    def _up(self, side: int) -> int:
        return -(-max(side, self._least) // self._multiple) * self._multiple


def _described(path: Path) -> Any:
    """spandrel's description of the network in a file, with its module."""
    checkpoint = open_checkpoint(path)
    state = _state(path, checkpoint.tensors)
    library = _spandrel()
    try:
        found = library.ModelLoader().load_from_state_dict(state)
    except Exception as error:  # whatever a file of other names and shapes leads to
        raise CheckpointError(path, f"is no upscaler that spandrel knows ({type(error).__name__})") from error
    if not isinstance(found, library.ImageModelDescriptor) or (found.input_channels, found.output_channels) != (3, 3):
        raise CheckpointError(path, f"is {found.architecture.name}, which does not enlarge pictures of three colours")
    return found


def _state(path: Path, tensors: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """A file's tensors as torch's, in float32, without what wraps them."""
    import torch

    prefix = next((each for each in _WRAPPERS if any(name.startswith(each) for name in tensors)), "")
    named = {name[len(prefix) :]: weight for name, weight in tensors.items() if name.startswith(prefix)}
    if sum(prod(weight.shape) for weight in named.values()) > MAX_NUMBERS:
        raise CheckpointError(path, "is too large for an upscaler")
    return {
        name: torch.from_numpy(whole_array(cast(weight, FLOAT)).view(f32).reshape(weight.shape).copy())
        for name, weight in named.items()
    }


def _spandrel() -> ModuleType:
    try:
        with _without_torchvision():
            import spandrel
    except ImportError as error:
        raise UsageError(f"upscaling needs spandrel ({error}): pip install 'sdrpc[upscale]'") from error
    module: ModuleType = spandrel
    return module


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """spandrel imports torchvision for two networks that don't enlarge pictures. Where torchvision is not there, or is
    built for another torch, these two are imported without it."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # a build for another torch fails in its own ways
        missing = {name: ModuleType(name) for name in ("torchvision", *_PARTS)}
        for function in ("InterpolationMode", "normalize", "rotate"):
            setattr(missing[_PARTS[-1]], function, None)
        before = {name: sys.modules.get(name) for name in missing}
        sys.modules.update(missing)
        try:
            yield
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module
    else:
        yield


_PARTS = ("torchvision.transforms", "torchvision.transforms.functional")
