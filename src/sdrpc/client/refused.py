"""What a server of ours says when it refuses, as the error that it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..errors import (
    ComputeError,
    DeviceError,
    GraphError,
    KeyRefused,
    OutOfMemory,
    OverQuota,
    RemoteError,
    RemoteProtocolError,
    SdrpcError,
    ServerStopping,
    UnsupportedOperation,
)
from ..text import printable
from ..wire.refusals import Refusal


class Where(NamedTuple):
    """The device that something was asked of, by our name for it, and its server."""

    device: str
    endpoint: str

    def __str__(self) -> str:
        return f"{self.device} ({self.endpoint})" if self.device else self.endpoint


class Refused(RemoteError):
    """A server refused, with what it ``said``."""

    def __init__(self, endpoint: str, said: Refusal) -> None:
        self.said = said
        super().__init__(endpoint, printable(said.reason))

    def meant(self, device: str = "", computing: bool = False) -> SdrpcError:
        """The error that this is. ``device``: what was at work, if one was; ``computing``: it was to run a graph."""
        where = Where(device, self.endpoint)
        make = _MEANT.get(self.said.kind)
        if make is not None:
            return make(where, self.reason, self.said)
        return ComputeError(f"{where}: {self.reason}") if computing else RemoteError(self.endpoint, self.reason)


def _memory(where: Where, reason: str, said: Refusal) -> SdrpcError:
    numbers = said.numbers
    return OutOfMemory(str(where), numbers.get("asked", 0), reason, numbers.get("free"), numbers.get("others"))


_MEANT: dict[str, Callable[[Where, str, Refusal], SdrpcError]] = {
    "memory": _memory,
    "quota": lambda where, reason, _: OverQuota(reason, where.endpoint),
    "key": lambda where, reason, _: KeyRefused(where.endpoint, reason),
    "stopping": lambda where, reason, _: ServerStopping(where.endpoint, reason),
    "operation": lambda where, reason, said: UnsupportedOperation(f"{reason}, says {where}", printable(said.node)),
    "graph": lambda where, reason, said: GraphError(f"{reason}, says {where}", printable(said.node)),
    "compute": lambda where, reason, _: ComputeError(f"{where}: {reason}"),
    # we did not break it: what we sent was damaged on its way
    "protocol": lambda where, reason, _: RemoteProtocolError(f"{where.endpoint} could not understand us: {reason}"),
    "device": lambda where, reason, _: DeviceError(f"{where}: {reason}"),
}
"""Kind of a refusal (:data:`sdrpc.wire.refusals.KINDS`) → the error here."""
