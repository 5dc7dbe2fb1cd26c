"""Why there is no file of a name: what an error says about it."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path

LOOKED_AT = 2000
"""Names in a folder that are compared with the one that is not there."""

_ADDRESS = re.compile("[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


MODELS = "models"


def absent(path: Path, kind: str = MODELS) -> str:
    """The reason that an error gives for ``path``, where nothing is: an address, a link to nothing, or a name that is
    nearly one of those there. ``kind``: what was looked for."""
    if _ADDRESS.match(str(path)):
        return f"is an address, not a file: {kind} are not fetched; download it, and give the file's name"
    if path.is_symlink():
        return f"is a link to {os.readlink(path)}, which is not there"
    reason = "No such file or directory"
    if kind == MODELS and len(path.parts) == 2 and not path.parent.exists():  # such as stabilityai/sdxl-turbo
        return f"{reason} (models are not fetched from a hub: download it, and give its folder or file)"
    names = _names(path.parent)
    stem = Path(path.name.strip()).stem.lower()
    near = [n for n in names if Path(n).stem.lower() == stem] or get_close_matches(path.name, names, 1, 0.75)
    return f"{reason}; did you mean {path.parent / near[0]}?" if near else reason


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry, _ in zip(entries, range(LOOKED_AT), strict=False)]
    except OSError:
        return []
