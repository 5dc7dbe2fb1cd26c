"""``sd-cli --mode metadata``: what a picture says of how it was made."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..text import printable
from . import report

if TYPE_CHECKING:
    from ..diffusion.metadata_reader import Metadata

FORMATS = ("text", "json")

BRIEF = 100
"""Characters of a line of --metadata-brief."""


def show(chosen: Mapping[str, Any]) -> int:
    """Write what the picture ``--image`` says to standard output; the exit status is 1 where it says nothing."""
    from ..diffusion.metadata_reader import read_metadata

    if chosen["image"] is None:
        raise UsageError("--mode metadata: name a picture with --image")
    found = read_metadata(Path(chosen["image"]))
    entries = _entries(found, chosen["metadata_all"], chosen["metadata_raw"])
    if chosen["metadata_format"] == "json":
        lines = [json.dumps(_structured(chosen["image"], found, entries), ensure_ascii=False, indent=2)]
    else:
        lines = _lines(chosen["image"], found, entries)
    for line in lines:
        text = line if chosen["metadata_format"] == "json" else printable(line)
        brief = chosen["metadata_brief"] and len(text) > BRIEF
        sys.stdout.write((text[: BRIEF - 3] + "..." if brief else text) + "\n")
    if found.parameters is None:
        report.say(f"{chosen['image']}: says nothing of how it was made")
        return report.FAILURE
    return 0


def _entries(found: Metadata, every: bool, raw: bool) -> dict[str, str]:
    """What else the file says: texts if ``every`` entry is wanted, and bytes as hexadecimal if ``raw``."""
    texts = {name: told for name, told in found.entries.items() if isinstance(told, str) and every}
    return texts | {name: told.hex() for name, told in found.entries.items() if isinstance(told, bytes) and raw}


def _lines(name: str, found: Metadata, entries: Mapping[str, str]) -> list[str]:
    lines = [f"{name}: {found.format}, {found.width}×{found.height}", *(found.parameters or "").splitlines()]
    return lines + [f"{entry}: {told}" for entry, told in entries.items()]


def _structured(name: str, found: Metadata, entries: Mapping[str, str]) -> dict[str, Any]:
    size = {"format": found.format, "width": found.width, "height": found.height}
    return {"file": name, **size, "parameters": found.parameters, "sdcpp": found.structured, "entries": dict(entries)}
