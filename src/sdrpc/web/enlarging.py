"""Pictures made larger: by a filter, or by a network from the folder of upscalers, then to the size that is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..device import Device
from ..diffusion.hires import PIXEL_FILTERS
from ..diffusion.pictures import Pixels
from ..diffusion.upscaling import TILE, Upscaler
from ..errors import Cancelled, InvalidValue

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".gguf")
COMPONENT = "upscaler"
"""What placements call it."""

MAX_PASSES = 3
"""How often a network enlarges one picture, as in AUTOMATIC1111."""


@dataclass(frozen=True)
class Larger:
    """A request: which ``upscaler``, by name, and how large the picture is to be."""

    upscaler: str
    width: int
    height: int


@dataclass(frozen=True)
class Upscalers:
    """The networks in a ``folder``."""

    folder: Path | None = None

    def names(self) -> dict[str, Path]:
        """Name → file of those directly in the folder."""
        if self.folder is None or not self.folder.is_dir():
            return {}
        return {path.stem: path for path in sorted(self.folder.iterdir()) if path.suffix.lower() in SUFFIXES}

    def find(self, name: str) -> Path | None:
        """The file of a network; None for a filter. Names are looked up, never joined to a path. Raises
        :class:`InvalidValue`."""
        known = self.names()
        if name in known:
            return known[name]
        if name in PIXEL_FILTERS:
            return None
        raise InvalidValue(
            "upscaler", name, f"there is no such upscaler; there are {', '.join([*PIXEL_FILTERS, *known])}"
        )


def enlarged(
    image: Pixels,
    wanted: Larger,
    network: tuple[Path, Device, float] | None,
    on_tile: Callable[[int, int], None],
    cancel: Callable[[], bool],
) -> Pixels:
    """``image`` as large as is ``wanted``, cut around its middle to that shape. ``network``: its file, where it runs,
    and how long that is waited for; None: the filter that is wanted.

    Raises :class:`Cancelled`, and what the network and its device raise.
    """

    def tile(done: int, total: int) -> None:
        if cancel():
            raise Cancelled
        on_tile(done, total)

    size, how = (wanted.width, wanted.height), Image.Resampling.LANCZOS
    if network is None:
        how = PIXEL_FILTERS[wanted.upscaler]
    else:
        upscaler = Upscaler(*network)
        try:
            for _ in range(MAX_PASSES):
                if image.shape[1] < wanted.width or image.shape[0] < wanted.height:
                    image = upscaler(image, 1, TILE, tile)
        finally:
            upscaler.close()
    return np.asarray(ImageOps.fit(Image.fromarray(image), size, how))
