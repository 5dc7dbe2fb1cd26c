"""Every error that sdrpc raises on purpose, as one tree.

    SdrpcError
    ├── UsageError                an option or a value that can't be honoured (exit status 2)
    │   ├── InvalidValue            names the field and the value
    │   └── MissingComponent        a component of a model is in none of the named files
    ├── Cancelled                 the caller wanted no more
    ├── DeviceError               a device could not do what was asked of it
    │   ├── OutOfMemory             it has too little memory left
    │   ├── DoesNotFit              a component's weights are more than it has room for
    │   ├── OverQuota               a server gives a client no place, or no more of something
    │   └── ComputeError            a graph failed while it ran, or ran too long
    │       └── Stopped               it was told to stop, since nobody waits for its result
    ├── ConnectionFailed          nobody answers at an endpoint, or nobody who lets us in
    │   ├── KeyNeeded               the server lets in only who has a key for it
    │   ├── KeyRefused              it does not know the key
    │   └── WrongServer             it is not the server that the key is for
    ├── DeviceLost                what was on a server is gone; connecting anew may help
    │   ├── ConnectionLost          a server that answered before is gone
    │   ├── DeviceGone              it did not come back
    │   ├── RemoteProtocolError     (below)
    │   └── ServerStopping          (below)
    ├── VersionMismatch           both sides speak, but no common protocol version
    ├── ProtocolError             bytes or values that the protocol does not allow
    │   ├── LocalProtocolError      we were about to break it
    │   └── RemoteProtocolError     the peer broke it
    ├── RemoteError               an sdrpc server refused, with its reason
    │   └── ServerStopping          it is about to end
    ├── GraphError                a graph that means nothing (names the node)
    │   └── UnsupportedOperation    a graph that means something we can't do
    ├── CaptureError              a torch module that can't be turned into a graph
    └── CheckpointError           a model file that can't be used (names file and tensor)

Messages say what was wrong, where, and what to do about it; facts that a caller may want are attributes. They name
fields of requests, model files and sessions as Python does; a command line has options in those places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class SdrpcError(Exception):
    """Base of everything that sdrpc raises on purpose. ``names``: the fields that its message names."""

    def __init__(self, message: str = "", *names: str) -> None:
        super().__init__(message)
        self.names: Sequence[str] = names

    def told(self, called: Callable[[str], str]) -> str:
        """The message, with what ``called`` makes of the fields in it."""
        return _renamed(str(self), self.names, called)


def _renamed(text: str, names: Sequence[str], called: Callable[[str], str]) -> str:
    words = "|".join(map(re.escape, names))
    apart = rf"(?<![\w/\\.-])(?:{words})(?![\w/\\.])"  # what is part of a path is no field
    return re.sub(apart, lambda word: called(word[0]), text) if names else text


class UsageError(SdrpcError):
    """An option or a value that can't be honoured."""


class InvalidValue(UsageError):
    """A value that can't be honoured: ``InvalidValue("width", 7, "it can be 8 … 16384")``.

    ``field`` is the name that the value has in Python; ``names`` are further fields, in the reason.
    """

    def __init__(self, field: str, value: object, reason: str, *names: str) -> None:
        self.field, self.value, self.reason = field, value, reason
        quoted = isinstance(value, str) and (not value or not value.isprintable() or " " in value)
        self._shown = repr(value) if quoted else str(value)
        super().__init__(f"{field} {self._shown}: {reason}", *names)

    def told(self, called: Callable[[str], str]) -> str:
        return f"{called(self.field)} {self._shown}: {_renamed(self.reason, self.names, called)}"


class MissingComponent(UsageError):
    """A component of a model is in none of the named files. ``field``: of
    :class:`sdrpc.families.model.ModelFiles`, for a file that has it; ``other``: another field that would do."""

    def __init__(self, field: str, reason: str, other: str = "") -> None:
        self.field, self.reason, self.other = field, reason, other
        fields = " or ".join(name for name in (field, other) if name)
        super().__init__(f"{reason}: name a file that has it ({fields})")


class Cancelled(SdrpcError):
    """The caller wanted no more."""

    def __init__(self) -> None:
        super().__init__("cancelled")


class DeviceError(SdrpcError):
    """A device could not do what was asked of it."""


class OutOfMemory(DeviceError):
    """A device has too little memory left for an allocation of ``size`` bytes: ``free`` bytes are, and ``others`` are
    other clients' of its server, as far as that is known."""

    def __init__(
        self, device: str, size: int, hint: str = "", free: int | None = None, others: int | None = None
    ) -> None:
        self.device, self.size, self.hint, self.free, self.others = device, size, hint, free, others
        known = [f"{device}: no room for {size / 2**20:,.1f} MiB"]
        if free is not None:
            known.append(f"{free / 2**20:,.1f} MiB are free")
        if others:
            known.append(f"{others / 2**20:,.1f} MiB are other clients'")
        super().__init__("; ".join([*known, hint] if hint else known))


class Room(NamedTuple):
    """Bytes that a device has for weights, ``limited`` by max_vram and not by its memory."""

    size: int
    limited: bool = False


class DoesNotFit(DeviceError):
    """Weights of components, of so many bytes, are more than there is room for: ``rooms`` are those of each place where
    they could be, one for each of its devices. ``hint``: what would do."""

    def __init__(self, sizes: Mapping[str, int], rooms: Mapping[str, Sequence[Room]], hint: str = "") -> None:
        self.sizes, self.rooms, self.hint = sizes, rooms, hint
        takes = ", ".join(f"{name} takes {size / 2**20:,.0f} MiB" for name, size in sizes.items())
        room = " or ".join(" + ".join(map(_written, each)) for each in rooms.values())
        rest = hint or "place it on another device, or use a quantized file"
        names = ("backend", "params_backend", "max_vram", "rpc")
        super().__init__(f"{' or '.join(rooms)}: {takes}, and there is room for {room}; {rest}", *names)


def _written(room: Room) -> str:
    return f"{room.size / 2**20:,.0f} MiB{' (max_vram)' if room.limited else ''}"


class OverQuota(DeviceError):
    """A server, that at ``endpoint`` if we are its client, has no place for another client, or gives one no more of
    something: buffers, time."""

    def __init__(self, reason: str, endpoint: str = "") -> None:
        self.endpoint, self.reason = endpoint, reason
        super().__init__(f"{endpoint}: {reason}" if endpoint else reason)


class ComputeError(DeviceError):
    """A graph failed while it ran, or ran too long."""


class Stopped(ComputeError):
    """A computation was told to stop; ``reason`` is why."""

    def __init__(self, message: str, reason: str) -> None:
        self.reason = reason
        super().__init__(message)


class ConnectionFailed(SdrpcError):
    """Nobody answers at ``endpoint``, or nobody who lets us in."""

    def __init__(self, endpoint: str, reason: str) -> None:
        self.endpoint, self.reason = endpoint, reason
        super().__init__(f"{endpoint}: {reason}")


class KeyNeeded(ConnectionFailed):
    """The server at ``endpoint`` lets in only who has a key for it, and we have none."""


class KeyRefused(ConnectionFailed):
    """The server at ``endpoint`` knows none of the keys that we have for it, or wants no more of them."""


class WrongServer(ConnectionFailed):
    """Whoever answers at ``endpoint`` can't prove to be the server that our key is for."""


class DeviceLost(SdrpcError):
    """A device is gone in the middle of something, with all that was on it: a connection has to be made anew, and what
    was there be brought there again (:mod:`sdrpc.runtime.lost`)."""


class DeviceGone(DeviceLost):
    """``device`` was lost, which ``lost`` tells, and ``why`` it could not be had again within ``seconds``."""

    def __init__(self, device: str, lost: DeviceLost, seconds: float, why: object) -> None:
        self.device, self.lost, self.seconds, self.why = device, lost, seconds, why
        super().__init__(f"{device} was lost ({lost}) and did not come back within {seconds:g} s: {why}")


class ConnectionLost(DeviceLost):
    """The server at ``endpoint`` went away while we were ``doing`` something."""

    def __init__(self, endpoint: str, doing: str, reason: str = "the connection was closed") -> None:
        self.endpoint, self.doing, self.reason = endpoint, doing, reason
        super().__init__(f"{endpoint}: {reason} while {doing}")


class VersionMismatch(SdrpcError):
    """The server at ``endpoint`` speaks a protocol version that we don't know."""

    def __init__(self, endpoint: str, theirs: str, ours: str) -> None:
        self.endpoint, self.theirs, self.ours = endpoint, theirs, ours
        super().__init__(f"{endpoint}: the server speaks RPC protocol {theirs}; this client knows {ours}")


class ProtocolError(SdrpcError):
    """Bytes or values that the protocol does not allow."""


class LocalProtocolError(ProtocolError):
    """We were about to break the protocol: a fault in the caller."""


class RemoteProtocolError(ProtocolError, DeviceLost):
    """The peer broke the protocol, or bytes were damaged on their way; nothing that follows has a meaning."""


class RemoteError(SdrpcError):
    """An sdrpc server refused a request; ``reason`` is what it said."""

    def __init__(self, endpoint: str, reason: str) -> None:
        self.endpoint, self.reason = endpoint, reason
        super().__init__(f"{endpoint}: {reason}")


class ServerStopping(RemoteError, DeviceLost):
    """The server at ``endpoint`` is about to end."""

    def __init__(self, endpoint: str, reason: str = "this server is stopping") -> None:
        super().__init__(endpoint, reason)


class GraphError(SdrpcError):
    """A graph that means nothing. ``node`` says which node (position, operation and name), if one is to blame."""

    def __init__(self, reason: str, node: str = "") -> None:
        self.reason, self.node = reason, node
        super().__init__(f"{node}: {reason}" if node else reason)


class UnsupportedOperation(GraphError):
    """A graph that is well formed but uses an operation, type or parameter that this side can't compute."""


class CaptureError(SdrpcError):
    """A torch module that can't be turned into a ggml graph."""


class CheckpointError(SdrpcError):
    """A model file that can't be used. ``tensor`` is the tensor to blame, if one is."""

    def __init__(self, path: object, reason: str, tensor: str = "") -> None:
        self.path, self.reason, self.tensor = path, reason, tensor
        super().__init__(f"{path}: {f'tensor {tensor!r}: ' if tensor else ''}{reason}")
