"""Files that we keep for the user: where they are, how they are written and read, which go first.

Folders are the user's alone. What is found in them is untrusted input all the same: somebody may have changed it, or
filled the folder for us. Several processes may share a folder; any of them, or the user, may delete it at any time.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import UsageError

log = logging.getLogger(__name__)

PART = ".part"
"""What the names of unfinished files end with."""
NOWHERE = Path(os.devnull)
"""Stands for a user's folders where there can be none. Nothing below it can be made: whoever keeps something there is
told so by the system, as by a disk that refuses."""

_SAFELY = os.O_RDONLY
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # no links, no waiting for pipes; where there are
    _SAFELY |= getattr(os, _flag, 0)


# --- where


def cache_folder(kind: str) -> Path:
    """Where the user's cache keeps ``kind``: ``$SDRPC_CACHE/kind``, else ``kind`` in the system's place for caches."""
    return _folder("SDRPC_CACHE", "user_cache_path") / kind


def state_folder() -> Path:
    """Where the state of programs is kept: ``$SDRPC_STATE``, else the system's place for it."""
    return _folder("SDRPC_STATE", "user_state_path")


def _folder(variable: str, kind: str) -> Path:
    chosen = os.environ.get(variable)
    if chosen:
        return Path(os.path.expanduser(chosen))  # no shell has read it where a unit or a container says it
    import platformdirs

    try:
        path: Path = getattr(platformdirs, kind)("sdrpc")
    except RuntimeError:  # HOME is not set, and the system does not know this user
        return _for_this_run()
    return path


@cache
def _for_this_run() -> Path:
    """A folder that is deleted when the process ends, for a user without a home, such as an unknown one in a container;
    :data:`NOWHERE` if there is no place for it."""
    log.warning(
        "nothing is kept for the next run, because this user has no home directory: "
        "set HOME, or SDRPC_CACHE and SDRPC_STATE"
    )
    try:
        folder = Path(tempfile.mkdtemp(prefix="sdrpc-"))
    except OSError:
        return NOWHERE
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def make_own(folder: Path) -> None:
    """Make ``folder``, which must be this user's alone. Raises :class:`UsageError` where that can't be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except FileExistsError as error:
        raise UsageError(f"{folder} is no folder{_remedy(folder)}") from error
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror or error}{_remedy(folder)}") from error
    if not stat.S_ISDIR(facts.st_mode):
        raise UsageError(f"{folder} is a symbolic link{_remedy(folder)}")
    if not is_mine(facts) or (hasattr(os, "getuid") and facts.st_mode & 0o022):
        raise UsageError(f"others can write to {folder}: it must be yours alone (chmod 700)")


def _remedy(folder: Path) -> str:
    """How the user chooses another place for one of our own folders."""
    places = {"SDRPC_STATE": state_folder(), "SDRPC_CACHE": cache_folder("x").parent}
    variable = next((name for name, place in places.items() if folder.is_relative_to(place)), None)
    return f"; set {variable} to choose another place" if variable else ""


# --- writing


def create(folder: Path) -> tuple[BinaryIO, Path]:
    """A new file in ``folder``, for :func:`commit` when it is complete; the folder is made if it is gone. Raises
    :class:`OSError`."""
    try:
        handle, name = tempfile.mkstemp(PART, dir=folder)
    except FileNotFoundError:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(PART, dir=folder)
    return open(handle, "wb", buffering=0), Path(name)


def commit(part: Path, path: Path) -> None:
    """Let the complete file ``part`` appear as ``path``, in the place of any other. Raises :class:`OSError`."""
    os.replace(part, path)


def write_whole(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write all of ``data`` to ``path`` or nothing: another file of that name stays until the new one is whole. Its
    folder is made if it is gone. Raises :class:`OSError`."""
    file, part = create(path.parent)
    try:
        with file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        os.chmod(part, mode)
        commit(part, path)
    except BaseException:
        remove(part)
        raise


def remove(path: Path) -> None:
    """Delete a file if it is there and the system lets us."""
    with contextlib.suppress(OSError):  # another process was faster, or has it open on Windows
        path.unlink()


# --- reading


def open_own(path: Path) -> BinaryIO | None:
    """A regular file of this user's, not followed through links; None for anything else."""
    try:
        handle = os.open(path, _SAFELY)
    except OSError:
        return None
    try:
        facts = os.fstat(handle)
        if stat.S_ISREG(facts.st_mode) and is_mine(facts):
            return open(handle, "rb", buffering=0)
    except OSError:
        pass
    os.close(handle)
    return None


def read_own(path: Path, most: int) -> bytes | None:
    """What is in a regular file of this user's of at most that many bytes; None for anything else."""
    file = open_own(path)
    if file is None:
        return None
    with file:
        try:
            if os.fstat(file.fileno()).st_size > most:
                return None
            return file.read(most)
        except OSError:
            return None


def read_secret(path: Path, most: int) -> bytes | None:
    """What is in a file that nobody else may read; None if it is not there.

    Raises :class:`UsageError` for one that others can read or write, and for anything that is no such file.
    """
    try:
        facts = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        remedy = "; HOME, or SDRPC_STATE, must be a folder of yours" if isinstance(error, PermissionError) else ""
        raise UsageError(f"{path}: {error.strerror or error}{remedy}") from error
    if hasattr(os, "getuid") and stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o077:
        raise UsageError(f"others can read {path}: it must be yours alone (chmod 600)")
    data = read_own(path, most)
    if data is None:
        raise UsageError(f"{path}: not a file of this user's of at most {most} bytes")
    return data


def is_mine(facts: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or facts.st_uid == os.getuid()


# --- keeping within limits


class Entry(NamedTuple):
    """A file of a folder, when it was last used (nanoseconds), and its bytes."""

    path: Path
    used: int
    size: int


def mark_used(path: Path) -> None:
    """Note that a file was of use: those used longest ago go first."""
    with contextlib.suppress(OSError):  # thrown out meanwhile
        os.utime(path)


def entries(folder: Path, suffix: str | tuple[str, ...]) -> Iterator[Entry]:
    """The files in ``folder`` whose names end with ``suffix``, or one of several; none if it is gone. Raises
    :class:`OSError`."""
    try:
        found = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with found:
        for entry in found:
            if entry.name.endswith(suffix):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    facts = entry.stat(follow_symlinks=False)
                    yield Entry(Path(entry.path), facts.st_mtime_ns, facts.st_size)


def shrink(
    folder: Path, suffix: str | tuple[str, ...], budget: int, files: int = 1 << 16, spare: int = 0
) -> list[Entry]:
    """Throw out what was used longest ago, so that at most ``files`` files of ``suffix`` with ``budget`` bytes in all
    stay; those. If any has to go, there is room for ``spare`` bytes then. Raises :class:`OSError`."""
    kept: list[Entry] = []
    total = 0
    found = sorted(entries(folder, suffix), key=lambda each: each.used, reverse=True)
    if len(found) > files or sum(entry.size for entry in found) > budget:
        budget -= spare
    for entry in found:
        if total + entry.size > budget or len(kept) == files:
            remove(entry.path)
        else:
            total += entry.size
            kept.append(entry)
    return kept
