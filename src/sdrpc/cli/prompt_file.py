"""A prompt from a file, or from standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import InvalidValue

MAX_BYTES = 1 << 20


def read_prompt(name: str) -> str:
    """The text in a file, without the line ends behind it; ``-``: standard input. Raises :class:`InvalidValue` for what
    can't be read, is no UTF-8, or more than a mebibyte."""
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidValue("prompt_file", name, f"can't be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise InvalidValue("prompt_file", name, "is larger than a mebibyte")
    try:
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidValue("prompt_file", name, f"is no text in UTF-8 (byte {error.start})") from error
