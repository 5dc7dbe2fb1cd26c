"""A prompt from a file, or from standard input."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from ..errors import InvalidValue

MAX_BYTES = 1 << 20
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""What Windows' PowerShell begins a text with that is sent to a file by >."""


def read_prompt(field: str, name: str) -> str:
    """The text in a file that the option ``field`` names, without the line ends behind it; ``-``: standard input.

    Raises :class:`InvalidValue` for what can't be read, is neither UTF-8 nor UTF-16 that says so, or more than a
    mebibyte.
    """
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        from ..checkpoints.absent import absent

        raise InvalidValue(field, name, absent(Path(name), "prompts")) from error
    except OSError as error:
        raise InvalidValue(field, name, f"can't be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise InvalidValue(field, name, "is larger than a mebibyte")
    try:
        return data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidValue(field, name, f"is no text in UTF-8 or UTF-16 (byte {error.start})") from error
