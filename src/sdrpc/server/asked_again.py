"""Questions that a client asks again with the same bytes, and what they were answered with.

A native client's allocator asks for the sizes of what some operations give, three times each, before each graph: 96
questions of eleven records each for an evaluation of a UNet. It waits for every answer, with nothing for the device to
do meanwhile, so neither the question nor the answer is made anew.
"""

from __future__ import annotations

from typing import NamedTuple

from ..device import Bytes
from ..wire.framing import REQUEST_HEADER
from ..wire.messages import Command
from .version_memory import Versions

ASKED_AGAIN = frozenset({Command.GET_ALLOC_SIZE.value})
"""What is answered alike each time: it depends on the question and on what the client speaks."""
REMEMBERED = 384 << 10
"""Bytes of questions that are kept, of 3 kB each with usual names; when they are full, all are forgotten."""


class Known(NamedTuple):
    """A question, header and all, and its answer."""

    question: bytes
    answer: bytes


class AskedAgain:
    """Those of one client. The next question is mostly the last one again, or what came behind that before: it is
    compared with these, which takes a tenth of the time that its hash takes."""

    def __init__(self) -> None:
        self._known: list[Known] = []
        self._numbers: dict[bytes, int] = {}
        self._behind: dict[int, int] = {}
        self._last: int | None = None
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
        if versions is not self._versions:
            return None
        last = self._last
        likely = () if last is None else (last, self._behind.get(last, last))
        for each in likely:
            if self._known[each].question == question:
                self._last = each
                return self._known[each].answer
        number = self._numbers.get(question)
        if number is None:
            return None
        self._comes(number)
        return self._known[number].answer

    def keep(self, question: bytes, versions: Versions, answer: list[Bytes]) -> None:
        """``question``, which is not known, is answered with ``answer``, in parts, to a client that may speak
        ``versions``."""
        if versions is not self._versions or self._size + len(question) > REMEMBERED:
            for each in (self._known, self._numbers, self._behind):
                each.clear()
            self._last = None
            self._size, self._versions = 0, versions
        if len(question) <= REMEMBERED:
            self._numbers[question] = len(self._known)
            self._known.append(Known(question, b"".join(answer)))
            self._size += len(question)
            self._comes(len(self._known) - 1)

    def _comes(self, number: int) -> None:
        """The question with this ``number`` comes behind the last one."""
        if self._last is not None:
            self._behind[self._last] = number
        self._last = number
