"""Files in a folder that are asked for by name: models, LoRAs, networks that enlarge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path


def files_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files directly in ``folder`` whose names end so, whatever the case, in order; a folder is none of them."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())


def by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """Name → path: without the suffix, but with it where several share the rest, so that none stands for another."""
    known = list(paths)
    shared = Counter(path.stem for path in known)
    return {path.stem if shared[path.stem] == 1 else path.name: path for path in known}
