"""What pictures say of how they were made, read back: of stable-diffusion.cpp, the web UIs, and sdrpc itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import unescape

from PIL import ExifTags, Image

from .image_files import opened
from .metadata import KEYWORD

_XMP = re.compile(r"<sdcpp:parameters[^>]*>(.*?)</sdcpp:parameters>", re.DOTALL)
_JSON = re.compile(r"(?:^|, |\n)SDCPP: (\{.*\})\s*$", re.DOTALL)
_COMMENT_CODES = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii", b"\0" * 8: "utf-8"}
"""How the comment of EXIF begins, and what follows; the web UIs write JPEG and WebP so."""


@dataclass(frozen=True)
class Metadata:
    """What a file says. ``parameters``: the text about how it was made; ``entries``: whatever else there is, by name,
    texts and bytes."""

    format: str
    width: int
    height: int
    parameters: str | None
    entries: Mapping[str, str | bytes] = field(default_factory=dict)

    @property
    def structured(self) -> Any:
        """What the parameters repeat as JSON; None where there is none."""
        match = _JSON.search(self.parameters or "")
        try:
            return json.loads(match[1]) if match else None
        except (ValueError, RecursionError):
            return None


def read_metadata(source: Path | bytes) -> Metadata:
    """The metadata of a picture; a PNG is decoded for it, since text may stand behind its pixels. Raises
    :class:`InvalidValue` (``image``) for what is no picture, as :func:`sdrpc.diffusion.image_files.read_picture`."""
    return opened("image", source, _read)


def _read(image: Image.Image) -> Metadata:
    entries = {str(name): told for name, value in image.info.items() if (told := _told(value)) is not None}
    exif = image.getexif()
    for number, value in (*exif.items(), *exif.get_ifd(ExifTags.IFD.Exif).items()):
        if number != ExifTags.IFD.Exif and (told := _told(value)) is not None:
            entries[f"exif {ExifTags.TAGS.get(number, number)}"] = told
    for name in (KEYWORD, "comment", "xmp", "exif UserComment"):
        text = _parameters(name, entries.get(name))
        if text is not None:
            rest = {other: told for other, told in entries.items() if other not in (name, "exif")}
            return Metadata(str(image.format), *image.size, text, rest)
    return Metadata(str(image.format), *image.size, None, entries)


def _told(value: Any) -> str | bytes | None:
    if isinstance(value, str | bytes):
        return value
    return str(value) if isinstance(value, int | float | tuple) else None


def _parameters(name: str, told: str | bytes | None) -> str | None:
    """The parameters in an entry, if they are what it holds."""
    if told is None:
        return None
    if name == KEYWORD:
        return told if isinstance(told, str) else told.decode("utf-8", "replace")
    data = told.encode("utf-8", "surrogateescape") if isinstance(told, str) else told
    if name == "comment":
        key, zero, text = data.partition(b"\0")
        return text.decode("utf-8", "replace") if zero and key == KEYWORD.encode() else None
    if name == "xmp":
        match = _XMP.search(data.decode("utf-8", "replace"))
        return unescape(match[1]) if match else None
    code = _COMMENT_CODES.get(data[:8])
    return None if code is None else data[8:].decode(code, "replace")
