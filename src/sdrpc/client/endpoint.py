"""``host:port`` as users write it."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import UsageError

DEFAULT_PORT = 50052
"""The port of ggml's rpc-server."""


class Endpoint(NamedTuple):
    """Where a server listens. ``host`` is a name or an address, IPv6 without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """``host``, ``host:port``, ``[v6]`` or ``[v6]:port``; the port is 50052 unless given.

    Raises :class:`UsageError` for anything else.
    """
    text = text.strip()
    advice = _advice(text)
    if advice:
        raise UsageError(f"{text!r} is no server: {advice}")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise UsageError(f"{text!r} is no server: an IPv6 address is written [address]:port")
        port = rest[1:] if rest else str(DEFAULT_PORT)
    else:
        host, colon, port = text.partition(":")
        port = port if colon else str(DEFAULT_PORT)
    if not host or any(char.isspace() or char in "/@[]" for char in host):
        raise UsageError(f"{text!r} is no server: write host:port, such as 192.168.1.20:{DEFAULT_PORT}")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise UsageError(f"{text!r} is no server: {port!r} is no port (1 to 65535)")
    return Endpoint(host, int(port))


def _advice(text: str) -> str:
    """What to write in place of what people write for a server; "" where it may be one."""
    if "://" in text:
        scheme, _, rest = text.partition("://")
        return f"write it without {scheme}://, as {rest.rstrip('/') or 'host:port'}"
    if re.search(r"[\s;,]", text):
        return "write host:port, and separate servers with commas"
    if "@" in text:
        return "there are no user names; write host:port"
    if text.count(":") > 1 and re.fullmatch(r"[0-9a-fA-F:.]+(%\w+)?", text):
        return f"write an IPv6 address in brackets, [{text}]:{DEFAULT_PORT}"
    if text.count(":") > 1 and not text.startswith("["):
        return f"it has several colons; write host:port, such as 192.168.1.20:{DEFAULT_PORT}"
    return ""
