"""Kinds of values that options take: what is no such value is refused with the option's name, and how to write it."""

from __future__ import annotations

import ipaddress
import re
from math import isnan
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..errors import InvalidValue

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MOST_SECONDS = 1e8
"""Three years: more than sockets and locks can wait is an error of theirs."""


class OneOf(click.ParamType):  # type: ignore[type-arg] # what it is of, no click before 8.4 can be told
    """A value that has a name: other ones are refused at once, and shells complete these."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices
        self.name = "|".join(choices)

    def convert(self, value: Any, param: click.Parameter | None, _ctx: click.Context | None) -> str:
        if value not in self.choices and param is not None:
            raise InvalidValue(str(param.name), value, f"does not exist; there are {', '.join(self.choices)}")
        return str(value)

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(choice) for choice in self.choices if choice.startswith(incomplete)]


class OnOff(click.ParamType):  # type: ignore[type-arg] # as above
    """A switch that may be followed by ``on`` or ``off``, as in stable-diffusion.cpp."""

    name = "on|off"

    def convert(self, value: Any, param: click.Parameter | None, _ctx: click.Context | None) -> bool:
        if not isinstance(value, bool) and value not in ("on", "off"):
            raise _wrong(param, value, "is on or off")
        return value in (True, "on")

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in ("on", "off") if word.startswith(incomplete)]


class File(click.Path):
    """The name of a file or folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            raise _wrong(param, value, "a name is needed; is a variable of the shell not set?")
        return super().convert(value, param, ctx)


class Seconds(click.FloatRange):
    """How long, at ``least``: a number that clocks can count to. ``unit``: of which it is a number."""

    def __init__(self, least: float = 0, least_open: bool = False, unit: str = "seconds") -> None:
        super().__init__(least, MOST_SECONDS, min_open=least_open)
        self.unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if isnan(found):
            raise _wrong(param, value, f"is no number of {self.unit}")
        return found


class Size(click.ParamType):  # type: ignore[type-arg] # as above
    """A number of bytes: ``512M``, ``2G``, ``1.5GiB``, ``0``; at ``least`` so many."""

    name = "size"

    def __init__(self, least: int = 0) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, _ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        if not match:
            raise _wrong(param, value, "not a size; write it as 512M or 2G")
        size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
        if size < self.least:
            raise _wrong(param, value, f"{size} bytes are too few; write 512M or 2G")
        return size


class Networks(click.ParamType):  # type: ignore[type-arg] # as above
    """Networks and addresses with commas in between: ``192.168.1.0/24,10.0.0.7,fd00::/8``."""

    name = "networks"

    def convert(self, value: Any, param: click.Parameter | None, _ctx: click.Context | None) -> tuple[Network, ...]:
        if not isinstance(value, str):
            return tuple(value)
        return tuple(self._network(text.strip(), str(param and param.name)) for text in value.split(","))

    def _network(self, text: str, field: str) -> Network:
        try:
            found = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise InvalidValue(field, text, "not a network; write it as 192.168.1.0/24 or fd00::/8") from None
        if found.version == 6 and found.network_address.ipv4_mapped:
            raise InvalidValue(field, text, "IPv4 is written as such, without ::ffff:")
        return found


class Numbers(click.ParamType):  # type: ignore[type-arg] # as above
    """Numbers with commas between them, also in brackets, as a tuple."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, _ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self.kind(piece) for piece in value.strip(" []").split(",") if piece.strip())
        except ValueError:
            found = ()
        if not found:
            raise _wrong(param, value, "numbers with commas between them are needed")
        return found


class Sides(click.ParamType):  # type: ignore[type-arg] # as above
    """Width and height: ``32x24``, or ``32`` for both."""

    name = "sides"

    def convert(self, value: Any, param: click.Parameter | None, _ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", value.lower())
        if match is None:
            raise _wrong(param, value, "not a size; write it as 32x32")
        return int(match[1]), int(match[2] or match[1])


def _wrong(param: click.Parameter | None, value: Any, reason: str) -> InvalidValue:
    return InvalidValue(str(param and param.name), value, reason)
