"""Standard output and standard error that never end the work: closed, broken, full, or of an encoding that lacks a
character.

A name that can't be encoded is escaped, and bytes of file names that are no text go out as they came in. A stream that
can't be written to any more is silent from then on, and remembers why.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TextIO

ESCAPED = "sdrpc.escaped"
"""The name of the error handler for encodings."""

_PLAIN = {"…": "...", "×": "x", "’": "'", "–": "-"}
"""What says the same in ASCII."""


class Steady(io.TextIOWrapper):
    """A text stream whose failures are kept in ``failure`` and not raised."""

    failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._silence(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._silence(error)

    def _silence(self, error: OSError) -> None:
        self.failure = self.failure or error
        _empty(self)


def prepare() -> None:
    """Replace standard output and standard error of the process."""
    codecs.register_error(ESCAPED, _escape)
    if os.environ.get("COLUMNS") == "0":  # of a terminal without a size; rich would print nothing into it
        del os.environ["COLUMNS"]
    _fill_closed_descriptors()
    sys.stdout = _steady(sys.stdout)
    sys.stderr = _steady(sys.stderr)


def give(data: bytes) -> OSError | None:
    """Write ``data`` to standard output; why it is not there, if so. Then nothing else is written there."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        _empty(sys.stdout)
        return error
    return None


def failure(stream: TextIO) -> OSError | None:
    """Why a standard stream can't be written to, if that is so and somebody wanted to read it: a reader that has gone
    has read what it wanted."""
    error = getattr(stream, "failure", None)
    return error if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) else None


def _empty(stream: TextIO) -> None:
    """Let a stream write nowhere, also what is still in its buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _fill_closed_descriptors() -> None:
    """Descriptors 0, 1 and 2 belong to the standard streams: if one is closed, the next socket would get its number,
    and what a library prints would go into it."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)


def _steady(stream: TextIO | None) -> TextIO:
    if stream is None:
        return Steady(open(os.devnull, "wb"), "utf-8", ESCAPED)
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, Steady):
        return stream
    return Steady(stream.buffer, stream.encoding, ESCAPED, None, stream.line_buffering, stream.write_through)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    char = error.object[error.start]
    if "\udc80" <= char <= "\udcff":  # a byte of a file name
        return bytes([ord(char) - 0xDC00]), error.start + 1
    return _PLAIN.get(char) or char.encode("unicode_escape").decode("ascii"), error.start + 1
