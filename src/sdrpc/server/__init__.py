"""rpc-server: whoever connects gets memory and compute time on this machine's devices, within limits.

    listener        accepts clients, a thread each; ends those that do nothing when there is no place left
    stream          one client's socket: exact reads, whole writes, time limits
    door            who is let in: by key over TLS, or from where nobody needs one
    visitor         who a client is
    key_ring        the keys, each with a name, in a file
    identity        the server's certificate
    attempts        how often an address may fail to get in
    handler         a client's requests in order, and the line that says how it ended
    negotiation     the protocol version that a client is offered: a fixed one, or what its address is known to want
    version_memory  what is learnt about clients' versions, and how
    session         what each command does; buffers and graphs of one client
    addresses       the handles and addresses that a client sees
    packed_graphs   graphs as they were sent, which a client may ask for again
    cache           tensors on disk: a folder, its files and its budget
    client_cache    the cache at work for a client: bytes hashed, kept, and found again
    threads         that work for all clients
    limits, quotas  what a client may take, and all of them together

Torch is not imported before a device is made.
"""

from .cache import Cache
from .client_cache import CacheService
from .door import Door, Keys, Policy
from .limits import Limits
from .listener import Server
from .negotiation import Learning

__all__ = ["Cache", "CacheService", "Door", "Keys", "Learning", "Limits", "Policy", "Server"]
