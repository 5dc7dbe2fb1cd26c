"""Pictures and masks from files: what a file claims to be is checked before it is decoded."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..checkpoints.absent import absent
from ..checkpoints.mapped import HEAD, mistaken
from ..errors import InvalidValue
from .pictures import Pixels

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Of files that are read, by Pillow's names."""

BRANDS = {
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), "a HEIC picture (as iPhones take)"
    ),
    **dict.fromkeys((b"avif", b"avis"), "an AVIF picture"),
}
"""What those files say of themselves that are made as films are."""

OTHERS = {
    b"\xff\x0a": "a JPEG XL picture", b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"\0\0\0\x0cjP": "a JPEG 2000 picture", b"8BPS": "a Photoshop picture", b"<svg": "a drawing (SVG)",
    b"%PDF": "a document (PDF)", b"\0\0\1\0": "an icon", b"\x1aE\xdf\xa3": "a film",
}  # fmt: skip
"""What other files begin with that people have for pictures."""

MAX_BYTES = 1 << 28
MAX_PIXELS = 1 << 26
"""Of a file. In memory that is 4 bytes each, and as many again while it is scaled."""

_MOST = f"up to {MAX_PIXELS // 2**20} mebipixels are read"

DEEPEST = (1 << 16) - 1
"""The largest number of a pixel of 16 bits."""

PAPER = (255, 255, 255)
"""What shows through where a picture is transparent."""

_BROKEN = (OSError, ValueError, TypeError, KeyError, IndexError, SyntaxError, EOFError, struct.error, zlib.error,
           OverflowError, MemoryError, AttributeError)  # fmt: skip
"""What Pillow raises for files that are no pictures, or are no more than the beginning of one."""


class _NotRead(Exception):
    """A picture that is whole, but of a kind that is not read."""


def read_picture(field: str, source: Path | bytes) -> Pixels:
    """The picture in a file, or in the bytes of one: (height, width, 3), upright, on white where it is transparent.

    ``field`` names it in errors. Raises :class:`InvalidValue` for what can't be read, is broken, or has more than
    :data:`MAX_PIXELS`; the latter before anything of it is decoded.
    """
    return opened(field, source, lambda image: np.array(_flattened(ImageOps.exif_transpose(image))))


def read_mask(field: str, source: Path | bytes) -> Pixels:
    """The mask in a file: (height, width), how light its pixels are. As :func:`read_picture`."""
    return opened(field, source, lambda image: np.array(_flattened(ImageOps.exif_transpose(image)).convert("L")))


READERS: Mapping[str, Callable[[str, Path | bytes], Pixels]] = {
    "init_image": read_picture, "end_image": read_picture, "control_image": read_picture, "mask": read_mask,
    "ref_images": read_picture,
}  # fmt: skip
"""The fields of a request that are pictures, with what reads their files."""


def read_pictures(files: Mapping[str, Sequence[Path | bytes]]) -> dict[str, Any]:
    """The fields of a request whose pictures are in ``files``: ``ref_images`` takes all that it has, each other field
    one. Raises :class:`InvalidValue` as :func:`read_picture`."""
    read = {field: tuple(READERS[field](field, file) for file in each) for field, each in files.items() if each}
    return {field: pictures if field == "ref_images" else pictures[0] for field, pictures in read.items()}


def pixels_of(field: str, source: Path | bytes) -> int:
    """How many pixels the file of a picture says to have. As :func:`read_picture`."""
    return opened(field, source, lambda image: image.width * image.height)


def opened(field: str, source: Path | bytes, use: Callable[[Image.Image], T]) -> T:
    """What ``use`` makes of a picture file whose header was read. Raises :class:`InvalidValue` as
    :func:`read_picture`."""
    name = source if isinstance(source, Path) else f"{len(source)} bytes"
    try:
        data = source if isinstance(source, bytes) else _bytes(field, source)
    except FileNotFoundError as error:
        raise InvalidValue(field, name, absent(Path(error.filename), "pictures")) from error
    except OSError as error:
        raise InvalidValue(field, name, f"can't be read: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's limit is another, and it warns of what is cut off
            return _used(field, name, data, use)
    except UnidentifiedImageError as error:
        raise InvalidValue(field, name, _no_picture(data[:HEAD])) from error
    except _NotRead as error:
        raise InvalidValue(field, name, str(error)) from error
    except Image.DecompressionBombError as error:
        raise InvalidValue(field, name, f"has too many pixels; {_MOST}") from error
    except _BROKEN as error:
        raise InvalidValue(field, name, f"is a broken picture: {error or type(error).__name__}") from error


def _no_picture(head: bytes) -> str:
    """What a file seems to be that Pillow does not know, as the reason of an error."""
    known = ", ".join(FORMATS)
    if not head:
        return "is empty"
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    kind = BRANDS.get(brand, "a film" if brand else "")
    kind = kind or next((what for magic, what in OTHERS.items() if head.startswith(magic)), "")
    if kind:
        return f"is {kind}, which sdrpc does not read; save it as one of {known}"
    return mistaken(head, "a picture") or f"is no picture that sdrpc reads ({known})"


def _used(field: str, name: object, data: bytes, use: Callable[[Image.Image], T]) -> T:
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise InvalidValue(field, name, f"is {width}×{height} pixels; {_MOST}")
        return use(image)


def _bytes(field: str, path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InvalidValue(field, path, f"is larger than {MAX_BYTES // 2**20} MiB")
    return data


def _flattened(image: Image.Image) -> Image.Image:
    """As RGB, on paper. 16 bits a pixel become 8. Raises :class:`_NotRead` for numbers of which nobody says how bright
    they are."""
    if image.mode.startswith("F"):
        raise _NotRead("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > DEEPEST:
            raise _NotRead("its pixels have more than 16 bits; save it with 8 or 16")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    paper = Image.new("RGBA", layered.size, (*PAPER, 255))
    return Image.alpha_composite(paper, layered).convert("RGB")
