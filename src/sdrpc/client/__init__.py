"""Devices of other machines: connections to rpc-servers."""

from .connection import DEFAULT_TIMEOUTS, Timeouts, open_connection
from .endpoint import DEFAULT_PORT, Endpoint, parse_endpoint
from .keychain import Keychain, given_keys
from .remote import RemoteBuffer, RemoteDevice, RemoteProgram, connect

__all__ = [
    "DEFAULT_PORT",
    "DEFAULT_TIMEOUTS",
    "Endpoint",
    "Keychain",
    "RemoteBuffer",
    "RemoteDevice",
    "RemoteProgram",
    "Timeouts",
    "connect",
    "given_keys",
    "open_connection",
    "parse_endpoint",
]
