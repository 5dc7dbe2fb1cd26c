"""Pictures and masks from files: what a file claims to be is checked before it is decoded."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InvalidValue
from .pictures import Pixels

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Of files that are read, by Pillow's names."""

MAX_BYTES = 1 << 28
MAX_PIXELS = 1 << 26
"""Of a file. In memory that is 4 bytes each, and as many again while it is scaled."""

PAPER = (255, 255, 255)
"""What shows through where a picture is transparent."""

_BROKEN = (OSError, ValueError, TypeError, KeyError, IndexError, SyntaxError, EOFError, struct.error, zlib.error,
           OverflowError, MemoryError, AttributeError)  # fmt: skip
"""What Pillow raises for files that are no pictures, or are no more than the beginning of one."""


def read_picture(field: str, source: Path | bytes) -> Pixels:
    """The picture in a file, or in the bytes of one: (height, width, 3), upright, on white where it is transparent.

    ``field`` names it in errors. Raises :class:`InvalidValue` for what can't be read, is broken, or has more than
    :data:`MAX_PIXELS`; the latter before anything of it is decoded.
    """
    return opened(field, source, lambda image: np.array(_flattened(ImageOps.exif_transpose(image))))


def read_mask(field: str, source: Path | bytes) -> Pixels:
    """The mask in a file: (height, width), how light its pixels are. As :func:`read_picture`."""
    return opened(field, source, lambda image: np.array(_flattened(ImageOps.exif_transpose(image)).convert("L")))


def pixels_of(field: str, source: Path | bytes) -> int:
    """How many pixels the file of a picture says to have. As :func:`read_picture`."""
    return opened(field, source, lambda image: image.width * image.height)


def opened(field: str, source: Path | bytes, use: Callable[[Image.Image], T]) -> T:
    """What ``use`` makes of a picture file whose header was read. Raises :class:`InvalidValue` as
    :func:`read_picture`."""
    name = source if isinstance(source, Path) else f"{len(source)} bytes"
    try:
        data = source if isinstance(source, bytes) else _bytes(field, source)
    except OSError as error:
        raise InvalidValue(field, name, f"can't be read: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's limit is another, and it warns of what is cut off
            return _used(field, name, data, use)
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise InvalidValue(field, name, f"is no picture that sdrpc reads ({known})") from error
    except (Image.DecompressionBombError, *_BROKEN) as error:
        raise InvalidValue(field, name, f"is a broken picture: {error or type(error).__name__}") from error


def _used(field: str, name: object, data: bytes, use: Callable[[Image.Image], T]) -> T:
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            most = f"up to {MAX_PIXELS // 2**20} mebipixels are read"
            raise InvalidValue(field, name, f"is {width}×{height} pixels; {most}")
        return use(image)


def _bytes(field: str, path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InvalidValue(field, path, f"is larger than {MAX_BYTES // 2**20} MiB")
    return data


def _flattened(image: Image.Image) -> Image.Image:
    """As RGB, on paper. 16 bits a pixel become 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    paper = Image.new("RGBA", layered.size, (*PAPER, 255))
    return Image.alpha_composite(paper, layered).convert("RGB")
