"""The RPC protocol without IO: bytes in, messages out. Imports neither sockets nor torch."""
