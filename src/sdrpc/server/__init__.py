"""rpc-server: whoever connects gets memory and compute time on this machine's devices, within limits.

    listener      accepts clients, a thread each
    stream        one client's socket: exact reads, whole writes, time limits
    conversation  greeting, requests in order, and the one line that says how it ended
    protocol      the version that a client is offered: a fixed one, or a learnt one that is kept in a file
    versions      what is learnt about clients' versions, and how
    session       what each command does; buffers and graphs of one client
    cache         tensors on disk: a folder, its files and its budget
    shelf         the cache at work for a client: bytes hashed, kept, and found again
    addresses     the handles and addresses that a client sees
    limits        what a client may take

Torch is not imported before a device is made.
"""

from .cache import Cache
from .client_cache import Library
from .limits import Limits
from .listener import Server
from .negotiation import Learning

__all__ = ["Cache", "Learning", "Library", "Limits", "Server"]
