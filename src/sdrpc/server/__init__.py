"""rpc-server: whoever connects gets memory and compute time on this machine's devices, within limits.

    listener        accepts clients, a thread each; ends those that do nothing when there is no place left
    announcing      says in the local network that the server is there
    stream          one client's socket: exact reads, whole writes, time limits
    door            who is let in: by key over TLS, or from where nobody needs one
    visitor         who a client is
    key_ring        the keys, each with a name, in a file
    identity        the server's certificate
    handler         a client's requests in order, and the line that says how it ended
    asked_again     questions that a client asks again with the same bytes
    negotiation     the protocol version that a client is offered: a fixed one, or what its address is known to want
    version_memory  what is learnt about clients' versions, and how
    session         what each command does; the buffers of one client
    addresses       the handles and addresses that a client sees
    places          which bytes a message means by them
    client_graphs   the graphs of one client: what they mean, which are ready to run
    packed_graphs   graphs as they were sent, which a client may ask for again
    incoming        where the data of a tensor goes while it comes
    loads           what carriers receive, while the next message is read
    carriers        further connections of a client that carry data
    cache           tensors on disk: a folder, its files and its budget
    client_cache    the cache at work for a client: bytes hashed, kept, and found again
    live            what clients have in memory, found by what it is
    finder          finds there, and in the cache, what one client asks for
    questions       threads that look for what clients ask for, in turn
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
