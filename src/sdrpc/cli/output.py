"""Where pictures go: sd-cli's file names, and files that are whole or not there. A picture that is drawn is never lost:
where its file can't be written, it goes elsewhere."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import InvalidValue

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"%%|%(\d{0,3}d)")
"""printf's %d, %3d, %03d; ``%%`` is a percent sign."""

MAX_FILES = 100_000
"""That one command writes: their names are known before anything is drawn."""

DEFAULT_OUTPUT = "./output.png"
DEFAULT_SUFFIX = ".png"
STANDARD = "-"
"""Stands for standard output."""

MAX_SIDES = {".png": 1 << 31, ".jpg": 65500, ".jpeg": 65500, ".webp": 16383}
"""Suffix of a picture's file → pixels that a side of such a file can have (libjpeg's and WebP's limits)."""

FILM_SIDES = {".mp4": 16384, ".webm": 16384, ".avi": 65500, ".webp": 16383, ".gif": 65535}
"""The same of a film's file (x264's and libvpx's limits, and those of the formats)."""

DEFAULT_FILM, DEFAULT_ANIMATION = "./output.mp4", "./output.webp"
"""Where a film goes with PyAV and without."""


def output_paths(
    pattern: str, count: int, first: int = 0, suffixes: Collection[str] = MAX_SIDES, field: str = "output"
) -> list[Path]:
    """The files of ``count`` pictures (or films): numbered where ``pattern`` has a %d (``out_%03d.png``), else with
    ``_0``, ``_1`` … before the suffix, one of ``suffixes``, when there are several. Raises :class:`InvalidValue` for
    ``field``, for a format that can't be written, and for more than :data:`MAX_FILES`."""
    if pattern == STANDARD:
        if count > 1 or suffixes is not MAX_SIDES:
            raise InvalidValue(field, pattern, "standard output takes one picture")
        return [Path(STANDARD)]
    if count > MAX_FILES:
        raise InvalidValue(field, pattern, f"{count:,} files of one command are too many; at most {MAX_FILES:,}")
    path = Path(pattern)
    if path.suffix and path.suffix.lower() not in suffixes:
        what = "pictures" if suffixes is MAX_SIDES else "films"
        known = ", ".join(suffixes)
        raise InvalidValue(field, pattern, f"{what} are written as {known}; {path.suffix} is not supported")
    if pattern.endswith("/") or not path.name or os.path.isdir(path):
        raise InvalidValue(field, pattern, "names a directory, not a file")
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/null, a pipe
        return [path] * count
    pattern, numbers = pattern if path.suffix else pattern + DEFAULT_SUFFIX, range(first, first + count)
    if numbered(pattern):
        return [Path(_NUMBER.sub(partial(_formatted, number), pattern)) for number in numbers]
    if count == 1:
        return [Path(pattern)]
    path = Path(pattern)
    return [path.with_name(f"{path.stem}_{number}{path.suffix}") for number in numbers]


def is_terminal(name: str) -> bool:
    """Whether what is written to ``name`` comes out at a terminal: as standard output, as /dev/stdout or /dev/tty."""
    if name == STANDARD:
        return sys.stdout.isatty()
    try:
        if not stat.S_ISCHR(os.stat(name).st_mode):
            return False
        handle = os.open(name, os.O_WRONLY | getattr(os, "O_NOCTTY", 0))
    except OSError:
        return False
    with os.fdopen(handle, "wb") as file:
        return file.isatty()


def frames_singly(pattern: str) -> bool:
    """Whether a film's frames are to be a picture each: where ``pattern`` is a picture's (``frame_%03d.png``), and not
    one of .webp files without a number, which is an animation's."""
    suffix = Path(pattern).suffix.lower()
    return suffix in MAX_SIDES and (suffix not in FILM_SIDES or numbered(pattern))


def numbered(pattern: str) -> bool:
    """Whether a file name has a place for a number: %d, %03d."""
    return any(_NUMBER.findall(pattern))


def _formatted(number: int, match: re.Match[str]) -> str:
    return f"{number:{match[1]}}" if match[1] else "%"


def check_writable(paths: Sequence[Path], field: str = "output") -> None:
    """Make the directories of what the option ``field`` names; raise :class:`InvalidValue` when something can't be
    written, before any work is done."""
    paths = [path for path in paths if str(path) != STANDARD]
    writable = {directory: _why_not(directory) for directory in {path.parent for path in paths}}
    for path in paths:
        refusal = writable[path.parent]
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            pass
        except OSError as error:  # a name that is too long, say
            refusal = error.strerror or str(error)
        else:
            if stat.S_ISDIR(mode):
                raise InvalidValue(field, path, "is a directory")
            # a file that was mounted into a container is no more than that; one that is protected stays as it is
            refusal = "" if os.access(path, os.W_OK) else refusal or "it is read-only"
        if refusal:
            raise InvalidValue(field, path, f"can't write there: {refusal}")


def _why_not(directory: Path) -> str:
    """Why no file can be made in a directory, which is made where it is not there; "" if one can."""
    try:
        if not directory.exists():
            directory.mkdir(parents=True, exist_ok=True)
            log.debug("made the folder %s", directory)
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return error.strerror or str(error)
    except RecursionError:
        return "it is in too many folders, one within the other"


def check_sides(path: Path, width: int, height: int) -> None:
    """Raises :class:`InvalidValue` when a picture has too many pixels on a side for its format."""
    most = (MAX_SIDES | FILM_SIDES)[path.suffix.lower() or DEFAULT_SUFFIX]
    for field, side in (("width", width), ("height", height)):
        if side > most:
            raise InvalidValue(field, side, f"{path.suffix} files have at most {most} pixels on a side; write a .png")


class Saved(NamedTuple):
    """Where a picture is, and ``why`` it is not where it should be; "" if it is."""

    path: Path
    why: str


def save(path: Path, data: bytes) -> Saved:
    """Write ``data`` to a file, or else to another one beside it or in the system's folder for temporary files.

    An old file stays until the new one is whole; a link stays one, and what it points to is written. Raises
    :class:`OSError` when there is no place at all.
    """
    try:
        replace_file(path, data)
        return Saved(path, "")
    except OSError as refusal:
        return keep_elsewhere(path, data, refusal)


def keep_elsewhere(path: Path, data: bytes, refusal: OSError) -> Saved:
    """Keep ``data`` beside ``path``, where it could not be written, or in the system's folder for temporary files;
    only there if ``path`` is a device, a pipe or standard output. Raises :class:`OSError` as :func:`save`."""
    special = str(path) == STANDARD or (path.exists() and not path.is_file() and not path.is_dir())
    for folder in ([] if special else [path.parent]) + [Path(tempfile.gettempdir())]:
        try:
            return Saved(
                _written(folder, "sdrpc-", path.suffix or DEFAULT_SUFFIX, data), refusal.strerror or str(refusal)
            )
        except OSError:
            continue
    raise OSError(refusal.errno, refusal.strerror, str(path)) from refusal


def save_as_made(path: Path, make: Callable[[IO[bytes]], None]) -> Saved:
    """As :meth:`save`, of what ``make`` writes into a file piece by piece: there is only one place that it is made in,
    beside ``path`` where that can be."""
    target = Path(os.path.realpath(path))
    refusal = ""
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".sdrpc-", suffix=path.suffix)
    except OSError as error:
        refusal = error.strerror or str(error)
        handle, name = tempfile.mkstemp(prefix="sdrpc-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "w+b") as file:
            make(file)
        os.chmod(name, 0o666 & ~_umask())
    except BaseException:
        os.unlink(name)
        raise
    try:
        _move(Path(name), target)
    except OSError as error:
        return Saved(Path(name), refusal or error.strerror or str(error))
    return Saved(path, "")


def _move(source: Path, target: Path) -> None:
    """Replace ``target`` by ``source``, or where that can't be (a pipe, a file that was mounted, another disk), write
    what is in it."""
    if not target.exists() or target.is_file():
        try:
            os.replace(source, target)
            return
        except OSError:
            pass
    with source.open("rb") as made, target.open("wb") as file:
        shutil.copyfileobj(made, file)
    os.unlink(source)


def replace_file(path: Path, data: bytes) -> None:
    """Replace the file ``path``, or what it points to; where that can't be (a pipe, a file that was mounted), write
    into it."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        target.write_bytes(data)
        return
    try:
        temporary = _written(target.parent, ".sdrpc-", "", data)
    except PermissionError:  # a folder that takes no new files
        if not target.exists():
            raise
        target.write_bytes(data)
        return
    try:
        os.replace(temporary, target)
    except OSError:
        os.unlink(temporary)
        target.write_bytes(data)


def _written(folder: Path, prefix: str, suffix: str, data: bytes) -> Path:
    """A new file with ``data``, whose name is short whatever the wanted one is. It is whole or not there."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
