"""rpc-server: whoever connects gets memory and compute time on this machine's devices, within limits.

    listener      accepts clients, a thread each
    stream        one client's socket: exact reads, whole writes, time limits
    conversation  greeting, requests in order, and the one line that says how it ended
    session       what each command does; buffers and graphs of one client
    addresses     the handles and addresses that a client sees
    limits        what a client may take

Torch is not imported before a device is made.
"""

from .limits import Limits
from .listener import Server

__all__ = ["Limits", "Server"]
