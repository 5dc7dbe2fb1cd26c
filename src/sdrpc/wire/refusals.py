"""Why a server refuses: in words for people, and as values for programs.

An error reply carries text. To a peer that knows of it (``Capability.REASONS``) the text is a JSON object with the
``kind`` of a refusal, its ``reason`` in words, and numbers that belong to it. What anybody else sends is only words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import (
    ComputeError,
    DeviceError,
    GraphError,
    KeyRefused,
    OutOfMemory,
    OverQuota,
    RemoteProtocolError,
    SdrpcError,
    ServerStopping,
    Stopped,
    UnsupportedOperation,
)

MAX_NUMBER = 1 << 64
MAX_NODE = 512


class Refusal(NamedTuple):
    """``kind`` is a key of :data:`KINDS`, or "" where there is none. To a peer that does not know kinds, ``reason`` is
    all."""

    kind: str
    reason: str
    numbers: Mapping[str, int] = {}
    node: str = ""


KINDS: dict[str, type[SdrpcError]] = {
    "memory": OutOfMemory,
    "key": KeyRefused,
    "quota": OverQuota,
    "stopping": ServerStopping,
    "operation": UnsupportedOperation,
    "graph": GraphError,
    "compute": ComputeError,
    "protocol": RemoteProtocolError,
    "device": DeviceError,
}
"""Kind → the error that it is at both ends. An error is of the first kind whose class it has."""


def refusal(error: SdrpcError) -> Refusal:
    """What to say about ``error``."""
    kind = "stopping" if isinstance(error, Stopped) else _kind(error)
    if isinstance(error, OutOfMemory):
        known = {"asked": error.size, "free": error.free, "others": error.others}
        return Refusal(kind, error.hint, {name: n for name, n in known.items() if n is not None})
    if isinstance(error, GraphError):
        return Refusal(kind, error.reason, node=error.node)
    return Refusal(kind, error.reason if isinstance(error, OverQuota | Stopped) else str(error))


def _kind(error: SdrpcError) -> str:
    return next((kind for kind, made in KINDS.items() if isinstance(error, made)), "")


def to_text(said: Refusal) -> str:
    facts = {"kind": said.kind, "reason": said.reason, **({"node": said.node} if said.node else {}), **said.numbers}
    return json.dumps(facts, ensure_ascii=False, separators=(",", ":"))


def from_text(text: str) -> Refusal:
    """A refusal as it came, whatever that is."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return Refusal("", text)
    if not isinstance(facts, dict) or not isinstance(facts.get("reason"), str):
        return Refusal("", text)
    kind, node = facts.get("kind"), facts.get("node")
    return Refusal(
        kind if isinstance(kind, str) and kind in KINDS else "",
        facts["reason"],
        {name: n for name in ("asked", "free", "others") if type(n := facts.get(name)) is int and 0 <= n < MAX_NUMBER},
        node[:MAX_NODE] if isinstance(node, str) else "",
    )
