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
from ..errors import Cancelled


@dataclass(frozen=True)
class Larger:
    """A request: which ``upscaler``, by name, and how large the picture is to be."""

    upscaler: str
    width: int
    height: int


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
            image = upscaler.up_to(image, wanted.width, wanted.height, TILE, tile)
        finally:
            upscaler.close()
    return np.asarray(ImageOps.fit(Image.fromarray(image), size, how))
