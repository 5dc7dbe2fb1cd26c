"""What a client may take, each limit with its reason.

Everything here is about clients that nobody vouches for: a limit is met before memory is touched or time is spent.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of one server; times in seconds. The defaults suit real clients with room to spare."""

    connections: int = 256
    """Clients at once, each with a thread: real ones open a handful of connections each, floods open thousands."""
    backlog: int = 1024
    """Connections that the kernel holds while we are busy accepting, so that a burst of clients is not refused."""
    hello_seconds: float = 10.0
    """From connecting to a whole HELLO: whoever says nothing must not hold a place."""
    refusal_seconds: float = 60.0
    """From HELLO's answer to hanging up, for a client that did not like it: a big process takes its time to abort. One
    that is silent for longer tells nothing about versions by leaving."""
    stall_seconds: float = 30.0
    """Silence in the middle of a message, and how long a reply may wait for the client to read on. Between messages
    a client may be silent for as long as it likes: its own model may be thinking."""
    buffers: int = 1024
    """Buffers of one client: real clients have a few dozen."""
    buffer_bytes: int = 1 << 44
    """Bytes of all buffers of one client: more than any machine has, so as good as none where one client may have all
    of a device; what there is not, no client gets."""
    tensors: int = 1 << 15
    """Tensors in a graph: today's largest models have below ten thousand, and each takes a millisecond to compile."""
    graphs: int = 32
    """Graphs of a client that are kept ready under the digest of their bytes, for clients that send them again."""
    compute_seconds: float = 600.0
    """One run of one graph: a graph can be small and its work without end."""
    linger_seconds: float = 2.0
    """How long we read on from a client that is told why it is thrown out, so that the reason reaches it."""
