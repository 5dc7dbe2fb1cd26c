"""Questions that a client asks again with the same bytes, and what they were answered with.

A native client's allocator asks for the sizes of what some operations give, three times each, before each graph: 96
questions of eleven records each for an evaluation of a UNet. It waits for every answer, with nothing for the device to
do meanwhile, so neither the question nor the answer is made anew.
"""

from __future__ import annotations

from ..device import Bytes
from ..wire.framing import REQUEST_HEADER
from ..wire.messages import Command
from .version_memory import Versions

ASKED_AGAIN = frozenset({Command.GET_ALLOC_SIZE.value})
"""What is answered alike each time: it depends on the question and on what the client speaks."""
REMEMBERED = 384 << 10
"""Bytes of questions that are kept, of 3 kB each with usual names; when they are full, all are forgotten."""


class AskedAgain:
    """Those of one client."""

    def __init__(self) -> None:
        self._answers: dict[bytes, bytes] = {}
        self._size = 0
        self._versions: Versions = ()

    def question(self, ahead: memoryview) -> bytes:
        """The question that ``ahead`` begins with, header and all; empty if it is none of these, or not all of it is
        there."""
        if len(ahead) < REQUEST_HEADER.size or ahead[0] not in ASKED_AGAIN:
            return b""
        end = REQUEST_HEADER.size + REQUEST_HEADER.unpack_from(ahead)[1]
        return bytes(ahead[:end]) if end <= len(ahead) else b""

    def answer(self, question: bytes, versions: Versions) -> bytes | None:
        """What ``question`` was answered with when the client could speak the same ``versions``."""
        return self._answers.get(question) if versions is self._versions else None

    def keep(self, question: bytes, versions: Versions, answer: list[Bytes]) -> None:
        """``question`` is answered with ``answer``, in parts, to a client that may speak ``versions``."""
        if versions is not self._versions or self._size + len(question) > REMEMBERED:
            self._answers.clear()
            self._size, self._versions = 0, versions
        if len(question) <= REMEMBERED:
            self._answers[question] = b"".join(answer)
            self._size += len(question)
