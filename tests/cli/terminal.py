"""A program in a terminal of a size, and what is on the screen when it ends."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_PIECE = re.compile(r"\x1b\[(?P<mode>[\d;?]*)(?P<control>[A-Za-z])|(?P<text>[^\x1b])", re.DOTALL)


class Screen:
    """As much of a terminal as the commands use. It wraps what is too long, as terminals do."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.column = 0

    def feed(self, text: str) -> None:
        for piece in _PIECE.finditer(text):
            if piece["text"]:
                self._put(piece["text"])
            elif piece["control"] == "K":
                row = self.rows[-1]
                self.rows[-1] = [] if piece["mode"] == "2" else row[: self.column]
            else:
                assert piece["control"] == "m", f"an escape sequence that the screen does not have: {piece[0]!r}"

    @property
    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.rows]

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._line()
        else:
            if self.column == self.columns:
                self._line()
                self.column = 0
            row = self.rows[-1]
            row.extend(" " * (self.column + 1 - len(row)))
            row[self.column] = char
            self.column += 1

    def _line(self) -> None:
        self.rows.append([])


class Ended(NamedTuple):
    status: int
    written: str
    """All that the program sent to the terminal."""
    lines: list[str]
    """What is on the screen at the end."""


def in_terminal(
    arguments: Sequence[object], columns: int = 80, env: Mapping[str, str] | None = None, **files: int
) -> Ended:
    """``python -m sdrpc`` with ``arguments`` in a terminal; ``files``: streams that go elsewhere (stdout=…)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs} | files
    command = [sys.executable, "-m", "sdrpc", *map(str, arguments)]
    own = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}  # xdist's
    process = subprocess.Popen(command, env=own | {"TERM": "xterm"} | dict(env or {}), **streams)  # type: ignore[call-overload]
    os.close(theirs)
    received = bytearray()
    while True:
        try:
            data = os.read(ours, 1 << 16)
        except OSError:  # Linux's way to say that nobody has the other end any more
            break
        if not data:
            break
        received += data
    os.close(ours)
    screen = Screen(columns)
    text = received.decode()
    screen.feed(text)
    return Ended(process.wait(), text, screen.lines)
