"""What both ends of a connection ask of the system: to send at once, and to know whether the other machine is there.

TCP's keepalive asks after an end that has nothing to say, but not while bytes of ours wait to be acknowledged: then the
system sends them again and again, for a quarter of an hour as a rule. TCP_USER_TIMEOUT would bound that, but it also
ends connections to a program that is alive and does not read for a while. So what is looked at is whether the machine
acknowledges anything: Linux tells.

An end that was closed shows at once to who reads. Who sends learns it from the answer to the next bytes, and there is
no next as long as what was sent before fills all buffers: a proxy that lost its server ends the connection, too, but
leaves what it had not read where it is.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys
from contextlib import suppress

from .errors import UsageError

_INFO = struct.Struct("<2x2B52xI")
"""Of Linux's struct tcp_info: tcpi_retransmits and tcpi_probes, which count what was sent in vain one after the other,
and tcpi_last_ack_recv, milliseconds since the machine said anything."""
_IN_VAIN = 2
GONE = "its machine does not answer any more"
_NEAR_BYTES = 256 << 10
"""What may lie between two processes of one machine: so much stays in the processor's cache until it is read. With what
the system gives by itself, megabytes, both spend a fifth more."""


_ADVICE = {
    errno.EADDRINUSE: "{option} 0 picks a free port",
    errno.EADDRNOTAVAIL: "this machine has no such address; 0.0.0.0 means all that it has",
    errno.EACCES: "small ports are the administrator's; choose another one with {option}",
}
"""What to do where nobody may listen."""


def listen(host: str, port: int, backlog: int, option: str) -> socket.socket:
    """A socket that listens there; ``option`` chooses the port. Raises :class:`UsageError` where that can't be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"can't listen on {host}:{port}: {_said(error)}") from error
    try:
        if sys.platform != "win32":  # where it would let two servers have the same port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(backlog)
    except (OSError, OverflowError) as error:
        listening.close()
        advice = _ADVICE.get(getattr(error, "errno", None) or 0, "").format(option=option)
        reason = _said(error) + (f" ({advice})" if advice else "")
        raise UsageError(f"can't listen on {host}:{port}: {reason}") from error
    return listening


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def prepare(connection: socket.socket, seconds: int) -> None:
    """Let the system send at once what it is given, and find out within ``seconds`` that the other machine is gone
    while it has nothing to say. How much may be on its way is the system's to find out, where that takes time."""
    with suppress(OSError):  # a connection that has ended takes no options (macOS): who reads from it learns that
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if _is_near(connection):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _NEAR_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        keepalive = {"TCP_KEEPIDLE": seconds // 2, "TCP_KEEPINTVL": seconds // 6, "TCP_KEEPCNT": 3}
        for option, value in keepalive.items():
            if hasattr(socket, option):  # macOS and Windows name them otherwise; their defaults hold there
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), max(1, value))


def _is_near(connection: socket.socket) -> bool:
    """Whether it goes to this machine."""
    host = str(connection.getpeername()[0])
    return host == "::1" or host.removeprefix("::ffff:").startswith("127.")


def is_gone(connection: socket.socket, seconds: float) -> bool:
    """Whether the other machine has acknowledged nothing for ``seconds`` of what was sent to it again and again. Where
    the system does not tell: no."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        again, probes, quiet = _INFO.unpack(info)
    except (OSError, struct.error):
        return False
    return bool(max(again, probes) >= _IN_VAIN and quiet >= seconds * 1000)


def hung_up(connection: socket.socket) -> bool:
    """Whether the other end has said that nothing more comes from it, behind whatever was not read yet (Linux), or
    that it takes nothing more either. Where the system does not tell, or the connection was closed here: no."""
    if sys.platform == "win32" or connection.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(connection, select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))
