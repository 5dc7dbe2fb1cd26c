"""Devices of other machines: connections to rpc-servers."""

from .connection import DEFAULT_TIMEOUTS, Timeouts, open_connection
from .devices import connect
from .endpoint import DEFAULT_PORT, Endpoint, parse_endpoint
from .keychain import Keychain, given_keys
from .remote import RemoteDevice, RemoteProgram
from .server import RemoteBuffer

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
