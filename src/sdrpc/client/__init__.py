"""Devices of other machines: connections to rpc-servers."""
