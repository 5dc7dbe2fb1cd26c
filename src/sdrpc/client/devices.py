"""The devices of servers, by where these listen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from ..errors import OverQuota, UsageError
from ..wire.limits import MAX_NAME_LENGTH
from ..wire.records import is_name_length
from .connection import DEFAULT_TIMEOUTS, Connection, Timeouts, greet, open_connection
from .endpoint import parse_endpoint
from .keychain import Keychain
from .remote import RemoteDevice
from .server import Server

log = logging.getLogger(__name__)


def connect(
    endpoints: Sequence[str],
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    name_length: int | None = None,
    keychain: Keychain | None = None,
    apart: bool = False,
) -> list[RemoteDevice]:
    """All devices of the servers at ``endpoints`` (``host:port``), named RPC0, RPC1, … in the order given.

    ``name_length``: GGML_MAX_NAME of native servers, where it is none of the usual. ``keychain``: keys for servers that
    need one (default: those that were kept). ``apart``: each device of an sdrpc server has a connection of its own, as
    far as the server lets us. For threads that each have a device: on one connection, answers come one after the other,
    and each thread waits for the others'. But only devices on one connection copy to each other at the server. One
    server that can't be used is an error that names it; nothing stays open then. Raises :class:`UsageError`,
    :class:`ConnectionFailed`, :class:`ConnectionLost`, :class:`VersionMismatch`, :class:`RemoteProtocolError`.
    """
    parsed = [parse_endpoint(text) for text in endpoints]
    for position, endpoint in enumerate(parsed):
        if endpoint in parsed[:position]:
            raise UsageError(f"{endpoint} is given twice")
    if name_length is not None and not is_name_length(name_length):
        raise UsageError(f"a name length of {name_length}; it must be a multiple of 8 up to {MAX_NAME_LENGTH}")
    devices: list[RemoteDevice] = []
    connections: list[Connection] = []
    try:
        for endpoint in parsed:
            reconnect = partial(open_connection, endpoint, timeouts, name_length, keychain)
            connection, devices_there = reconnect()
            connections.append(connection)
            another = partial(greet, endpoint, timeouts, keychain or Keychain())
            server = Server(connection, reconnect, another=another)
            own = apart and server.ours
            for i in range(devices_there):
                if i and own:
                    try:
                        connection, _ = reconnect()
                    except OverQuota as error:
                        log.info("devices of %s share a connection, and wait for each other: %s", endpoint, error)
                        own = False
                    else:
                        connections.append(connection)
                        server = Server(connection, reconnect, another=another)
                devices.append(RemoteDevice(f"RPC{len(devices)}", server, i))
    except BaseException:
        for connection in connections:
            connection.close()
        raise
    return devices
