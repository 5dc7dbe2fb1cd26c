"""Text of other people, made fit for a terminal and a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with what is no printable character (escape sequences, line ends, marks that turn the direction of
    writing) as ``\\\\x1b`` and the like, so that it stays in its line and changes nothing but that line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
