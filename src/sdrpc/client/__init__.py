"""Devices of other machines: connections to rpc-servers."""

from .connection import Timeouts
from .endpoint import DEFAULT_PORT, Endpoint, parse_endpoint
from .remote import RemoteBuffer, RemoteDevice, RemoteProgram, connect

__all__ = [
    "DEFAULT_PORT",
    "Endpoint",
    "RemoteBuffer",
    "RemoteDevice",
    "RemoteProgram",
    "Timeouts",
    "connect",
    "parse_endpoint",
]
