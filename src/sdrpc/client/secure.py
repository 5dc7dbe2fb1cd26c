"""A connection in TLS to a server that proves to have our key, before we say anything else (:mod:`sdrpc.key`)."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence
from functools import cache

from ..device import Bytes
from ..errors import ConnectionFailed, KeyRefused, WrongServer
from ..key import fingerprint, nonce, same, transcript
from ..wire.framing import drive
from ..wire.key_exchange import Verdict, encode_offer, read_challenge, read_verdict
from .endpoint import Endpoint
from .keychain import Credential

_UNKNOWN = "the server knows no such key, or it was revoked; rpc-server keys add NAME, there, makes one for --rpc-key"


def secured(endpoint: Endpoint, sock: socket.socket) -> ssl.SSLSocket:
    """``sock`` in TLS, whoever is at its other end. Raises :class:`ConnectionFailed` where nobody speaks TLS."""
    try:
        return _context().wrap_socket(sock)
    except TimeoutError as error:
        raise ConnectionFailed(str(endpoint), "no answer in time; is it an rpc-server of sdrpc?") from error
    except OSError as error:
        raise ConnectionFailed(
            str(endpoint),
            "there is a key for this server, but it speaks no TLS: it is no rpc-server of sdrpc (then give keys as "
            "HOST:PORT=KEY, for those that need one), or it turns us away for a minute, after too many wrong keys",
        ) from error


def show_key(
    endpoint: Endpoint, sock: ssl.SSLSocket, credentials: Sequence[Credential], receive: Callable[[int], Bytes]
) -> Credential:
    """Let the server prove that it has one of our keys, then prove it too; that key and the server's certificate.

    Raises :class:`WrongServer`, :class:`KeyRefused`, :class:`RemoteProtocolError`, :class:`OSError`.
    """
    shown = fingerprint(sock.getpeercert(binary_form=True) or b"")
    if all(credential.fingerprint not in (None, shown) for credential in credentials):
        raise WrongServer(
            str(endpoint),
            "it shows another certificate than before: it is another machine, or was set up anew; if that is right, "
            "make a new key there (rpc-server keys add NAME) and give it with --rpc-key",
        )
    ours = nonce()
    sock.sendall(encode_offer(ours, [credential.key.id for credential in credentials]))
    challenge = drive(read_challenge(len(credentials)), receive)
    if challenge.verdict != Verdict.WELCOME:
        raise KeyRefused(str(endpoint), _UNKNOWN)
    key, pinned = credentials[challenge.chosen]
    said = transcript(shown, ours, challenge.nonce)
    if pinned not in (None, shown) or not same(challenge.proof, key.server_proof(said)):
        raise WrongServer(
            str(endpoint), "it can't prove that it is the server that the key is for; nothing was sent to it"
        )
    sock.sendall(key.client_proof(said))
    if drive(read_verdict(), receive) != Verdict.WELCOME:
        raise KeyRefused(str(endpoint), _UNKNOWN)
    return Credential(key, shown)


@cache
def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a certificate is known by its fingerprint, which a key vouches for
    context.verify_mode = ssl.CERT_NONE
    return context
