"""Where pictures go: sd-cli's file names, and files that are whole or not there."""

from __future__ import annotations

import os
import re
import tempfile
from functools import partial
from pathlib import Path

from ..errors import UsageError
from ..storage import write_whole

_NUMBER = re.compile(r"%%|%(\d{0,3}d)")
"""printf's %d, %3d, %03d; ``%%`` is a percent sign."""

DEFAULT_OUTPUT = "./output.png"
FORMATS = (".png", "")


def output_paths(pattern: str, count: int, first: int = 0) -> list[Path]:
    """The files of ``count`` pictures: numbered where ``pattern`` has a %d (``out_%03d.png``), else with ``_0``, ``_1``
    … before the suffix when there are several. Raises :class:`UsageError` for a format that is not PNG."""
    path = Path(pattern)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--output {pattern}: pictures are written as .png; {path.suffix} is not supported yet")
    if not path.name or path.is_dir():
        raise UsageError(f"--output {pattern}: names a directory, not a file")
    pattern, numbers = pattern if path.suffix else f"{pattern}.png", range(first, first + count)
    if any(_NUMBER.findall(pattern)):
        return [Path(_NUMBER.sub(partial(_formatted, number), pattern)) for number in numbers]
    if count == 1:
        return [Path(pattern)]
    path = Path(pattern)
    return [path.with_name(f"{path.stem}_{number}{path.suffix}") for number in numbers]


def _formatted(number: int, match: re.Match[str]) -> str:
    return f"{number:{match[1]}}" if match[1] else "%"


def check_writable(paths: list[Path]) -> None:
    """Make the directories; raise :class:`UsageError` when nothing can be written there, before any work is done."""
    for directory in {path.parent for path in paths}:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise UsageError(f"--output: can't write to {directory}: {error.strerror}") from error


def write_file(path: Path, data: bytes) -> None:
    """Write all of ``data`` or nothing: an old file stays until the new one is whole."""
    write_whole(path, data, 0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
