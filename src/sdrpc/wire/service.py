"""How a server is announced in the local network (DNS-SD, RFC 6763): its type, and the few facts that go with it.

Everybody in a network can announce anything. So what is said here helps to find a server and to recognise one that let
us in before, by its certificate; whether it is that one is proven when we connect.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..text import printable

TYPE = "_ggml-rpc._tcp.local."
MAX_DEVICES = 16
MAX_TEXT = 63
"""Of a name: what DNS allows for a label."""
SHOWN_BYTES = 16
"""Of a certificate's fingerprint: enough to recognise it."""

_DEVICE = re.compile(r"[A-Za-z0-9_-]{1,16}")


class Announcement(NamedTuple):
    """A server that says that it listens at ``host``:``port``. ``devices`` are names with bytes of memory; with
    ``needs_key`` it lets in only who has a key; ``certificate`` is the beginning of its fingerprint, empty without
    one."""

    name: str
    host: str
    port: int
    devices: tuple[tuple[str, int], ...]
    needs_key: bool
    certificate: bytes


def properties(devices: Sequence[tuple[str, int]], needs_key: bool, fingerprint: bytes) -> dict[str, str]:
    """The facts as DNS-SD has them: key and value, together below 256 bytes each."""
    return {
        "devices": ",".join(f"{name}:{size}" for name, size in devices[:MAX_DEVICES])[:240],
        "key": str(int(needs_key)),
        "certificate": fingerprint[:SHOWN_BYTES].hex(),
    }


def parse(name: str, addresses: Sequence[str], port: int, told: Mapping[bytes, bytes | None]) -> Announcement | None:
    """What an announcement says, whoever may have made it; None for one that makes no sense."""
    hosts = [host for host in addresses if _usable(host)]
    if not hosts or not 1 <= port <= 65535:
        return None
    label = printable(name.removesuffix("." + TYPE))[:MAX_TEXT]
    devices = [_device(text) for text in _text(told, b"devices").split(",")[:MAX_DEVICES]]
    certificate = _text(told, b"certificate")
    known = re.fullmatch(f"[0-9a-f]{{{2 * SHOWN_BYTES}}}", certificate)
    return Announcement(
        label or hosts[0],
        hosts[0],
        port,
        tuple(device for device in devices if device is not None),
        _text(told, b"key") != "0",
        bytes.fromhex(certificate) if known else b"",
    )


def _usable(host: str) -> bool:
    """Whether a server can be at that address: also one of this machine, but not a network's."""
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (parsed.is_multicast or parsed.is_unspecified or (parsed.version == 6 and parsed.is_link_local))


def _device(text: str) -> tuple[str, int] | None:
    name, _, size = text.partition(":")
    if not _DEVICE.fullmatch(name) or not re.fullmatch(r"[0-9]{1,15}", size):
        return None
    return name, int(size)


def _text(told: Mapping[bytes, bytes | None], key: bytes) -> str:
    return (told.get(key) or b"").decode("ascii", "replace")
