"""What clients may take, each limit with its reason.

Everything here is about clients that nobody vouches for: a limit is met before memory is touched or time is spent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of one server; times in seconds. The defaults suit real clients with room to spare."""

    connections: int = 256
    """Clients at once, each with a thread: real ones open a handful of connections each, floods open thousands."""
    connections_of_address: int = 64
    """Connections at once of one client, so that none can lock out all others. A client is who has a key, wherever it
    comes from, or who comes without one from another machine. (From this machine come those of all who use it, and of
    SSH tunnels: there, each connection is a client.)"""
    carriers: int = 4
    """Connections that may carry data for another one of the same client, each with a thread while an upload lasts:
    with four, both ends copy as fast as memory does. Each counts as a connection, too."""
    attempts: int = 20
    """Failures to get in, from one address within ``attempt_seconds``: no key can be found so, but each costs a TLS
    handshake and a line in the log."""
    attempt_seconds: float = 60.0
    attempt_lines: int = 200
    """Failures, from wherever, that are logged within ``attempt_seconds``: machines have as many addresses as they
    like."""
    backlog: int = 1024
    """Connections that the kernel holds while we are busy accepting, so that a burst of clients is not refused."""
    hello_seconds: float = 10.0
    """From connecting to a whole HELLO: whoever says nothing must not hold a place."""
    silent_seconds: float = 1.0
    """A client without buffers that asked for nothing for so long after it connected makes room when all places are
    taken: real clients ask for the devices at once."""
    idle_seconds: float = 60.0
    """The same for clients that did ask for something, but have no buffers. Those with buffers never have to go."""
    dead_seconds: int = 10
    """A client whose machine is gone without a word is noticed after so long, whether we wait for it (TCP keepalive) or
    it has to acknowledge what we sent (:mod:`sdrpc.sockets`). One of ours comes again when it is back."""
    refusal_seconds: float = 60.0
    """From HELLO's answer to hanging up, for a client that did not like it: a big process takes its time to abort. One
    that is silent for longer tells nothing about versions by leaving."""
    stall_seconds: float = 30.0
    """Silence in the middle of a message, and how long a reply may wait for the client to read on. Between messages
    a client may be silent for as long as it likes: its own model may be thinking."""
    slowest: int = 128 << 10
    """Bytes a second at which a message must come, beyond ``stall_seconds``: slower than any network that is of use."""
    payload_bytes: int = 256 << 20
    """Graphs on their way, of all clients together; real ones take 0.4 to 10 MB each, one by one."""
    buffers: int = 1024
    """Buffers of one client: real clients have a few dozen."""
    buffers_of_all: int = 1 << 14
    """Buffers of all clients together: a process may have 65,530 mappings (vm.max_map_count)."""
    buffer_bytes: int = 1 << 44
    """Bytes of all buffers of one client and of what its graphs take while they run: as good as no limit. What there is
    not, no client gets."""
    bytes_of_all: int = 1 << 44
    """Bytes of all buffers of all clients together."""
    share: float = 0.9
    """Of a device's memory, for one client: the rest is for those that come while it is there."""
    tensors: int = 1 << 16
    """Tensors in a graph: LTX-2.3 has 36,000, other models of today below ten thousand, and each takes a millisecond to
    compile."""
    graphs: int = 32
    """Graphs of a client that are kept ready under the digest of their bytes, for clients that send them again."""
    ready_tensors: int = 1 << 18
    """Tensors of all graphs that are kept ready for a client, each of which takes one to two kB: 32 graphs of 8,000, or
    seven of LTX-2.3. The last one is kept in any case."""
    graph_bytes: int = 64 << 20
    """Graphs of a client, packed, that it may ask for by number (protocol 8.0). Of a large model's, which take 0.1 MB
    each, it has a thousand at most."""
    compute_seconds: float = 600.0
    """One run of one graph: a graph can be small and its work without end."""
    computing: int = 256
    """Graphs of all clients that wait for their turn or run: each holds a thread and its client's patience."""
    computing_of_client: int = 16
    """The same of one client: real ones have one for each of their connections that draw."""
    compute_seconds_of_client: float = math.inf
    """Of computing for one client within ``compute_window``. Turns are fair, so nobody has to be stopped for others."""
    compute_seconds_of_all: float = math.inf
    """The same for all clients together: for who lends a machine for some of its time."""
    compute_window: float = 3600.0
    linger_seconds: float = 2.0
    """How long we read on from a client that is told why it is thrown out, so that the reason reaches it."""
    trimmed_bytes: int = 64 << 20
    """When a client leaves that held so much, the memory that the allocator kept for it goes back to the system."""
