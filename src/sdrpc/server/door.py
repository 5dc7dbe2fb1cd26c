"""Who may come in, and as whom: everybody from this machine, from elsewhere who has a key.

The first byte tells whether a client speaks TLS, and then it must show a key, or ggml's protocol, which has no room for
one. That is let in from where nobody has to show anything (:class:`Policy`); our own clients are told that they need a
key, for they can have one.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from ..attempts import Attempts
from ..errors import ConnectionLost, RemoteProtocolError, SdrpcError, UsageError
from ..ggml.dialect import newest
from ..key import Key, nonce, same, transcript
from ..wire.framing import drive, encode_error
from ..wire.hello import NATIVE, Capability, encode_hello_reply, read_hello
from ..wire.key_exchange import (
    TLS_HANDSHAKE,
    Challenge,
    Offer,
    Verdict,
    encode_challenge,
    encode_verdict,
    read_offer,
    read_proof,
)
from .identity import Identity, load_identity
from .key_ring import KeyRing, NamedKey
from .limits import Limits
from .stream import Stream
from .visitor import Visitor

log = logging.getLogger(__name__)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_EVERYBODY = "everybody"
_UNKNOWN = "its key is none of this server's (rpc-server keys list shows those), or was revoked"
ALLOW = "rpc-server --allow-from {address} lets clients from there in without one, --plain lets in everybody"


@dataclass(frozen=True)
class Policy:
    """Who need not show a key: ``everybody``, this machine's own users (``local``; SSH tunnels end there, too), and who
    comes from one of ``networks``."""

    everybody: bool = False
    local: bool = True
    networks: Sequence[Network] = ()

    @property
    def open_to(self) -> str:
        """From which other machines clients are let in without a key, in words; nothing if from none."""
        return "anywhere" if self.everybody else ", ".join(str(net) for net in self.networks if not net.is_loopback)

    def lets_in(self, address: str) -> bool:
        """Whether a client at ``address`` (IPv4 as such) is let in without a key."""
        parsed = ipaddress.ip_address(address)
        return (
            self.everybody or (self.local and parsed.is_loopback) or any(parsed in network for network in self.networks)
        )


class Keys:
    """What a server needs to let clients in by key: those keys, and its identity in the file ``identity``, which is
    made when it is needed."""

    def __init__(self, ring: KeyRing, identity: Path) -> None:
        self.ring, self._path = ring, identity
        self._identity: Identity | None = None
        self._lock = Lock()

    @property
    def identity(self) -> Identity:
        """Raises :class:`UsageError` where there can't be one."""
        with self._lock:
            if self._identity is None:
                self._identity = load_identity(self._path)
            return self._identity


class Door:
    """Lets clients in by ``policy``, or by one of ``keys`` if there are any. For any thread."""

    def __init__(self, policy: Policy | None = None, keys: Keys | None = None, limits: Limits | None = None) -> None:
        self.policy, self.keys = policy or Policy(), keys
        self._limits = limits or Limits()
        self._attempts = Attempts(self._limits.attempts, self._limits.attempt_seconds)
        self._lines = Attempts(self._limits.attempt_lines, self._limits.attempt_seconds)

    def admit(self, stream: Stream) -> Visitor | None:
        """Who a client that has just connected is; None if it is sent away, which is told and logged by then.

        Raises :class:`ConnectionLost` for one that leaves, :class:`RemoteProtocolError` for one that says nothing.
        """
        if self.policy.lets_in(stream.address):
            return self._by_key(stream) if stream.peek() == TLS_HANDSHAKE else Visitor(stream.address, stream.peer)
        if self._exhausted(stream):
            return None
        with self._bounded(stream):
            if stream.peek() == TLS_HANDSHAKE:
                return self._by_key(stream)
            self._refuse_plain(stream)
        return None

    def revoked(self, key: NamedKey) -> bool:
        """Whether a key with which somebody was let in is not to be found any more."""
        try:
            return self.keys is None or self.keys.ring.find(key.key.id) != key
        except UsageError as error:
            log.error("nobody gets in by key: %s", error)
            return True

    def _by_key(self, stream: Stream) -> Visitor | None:
        if self._exhausted(stream):
            return None
        with self._bounded(stream):
            if self.keys is None:
                self._refused(stream, "it has a key, this server has none")
            elif found := self._shown(stream, self.keys):
                return Visitor(stream.address, stream.peer, found)
        return None

    def _exhausted(self, stream: Stream) -> bool:
        """Whether there were so many failures at that address that this one is not worth a line in the log."""
        if not self._attempts.exhausted(stream.address):
            return False
        log.debug("%s: refused, like those before it", stream.peer)
        return True

    @contextmanager
    def _bounded(self, stream: Stream) -> Iterator[None]:
        """While somebody may prove to be nobody: whatever goes wrong counts as an attempt, and is a line in the log as
        long as there are any left."""
        try:
            yield
        except UsageError as error:
            log.error("%s: nobody gets in by key: %s", stream.peer, error)
        except RemoteProtocolError as error:
            self._refused(stream, str(error))
        except ConnectionLost as error:
            self._refused(stream, f"{error.reason} while {error.doing}")

    def _shown(self, stream: Stream, keys: Keys) -> NamedKey | None:
        """The key that the client proves to have; None when it has none of ours, which is told and logged."""
        stream.doing = "starting encryption"
        stream.secure(keys.identity.context)
        stream.doing = "showing its key"
        offer = drive(read_offer(), stream.read)
        found = [(index, key) for index, name in enumerate(offer.ids) if (key := keys.ring.find(name))]
        if not found:
            self._refused(stream, _UNKNOWN)
            with suppress(SdrpcError):  # it is gone already
                stream.write([encode_challenge(Challenge(Verdict.UNKNOWN_KEY))])
                stream.linger(self._limits.linger_seconds)
            return None
        index, named = found[0]
        proven = self._prove(stream, offer, index, named.key, keys.identity.fingerprint)
        if not proven:
            self._refused(stream, _UNKNOWN)
        stream.write([encode_verdict(Verdict.WELCOME if proven else Verdict.UNKNOWN_KEY)])
        return named if proven else None

    def _prove(self, stream: Stream, offer: Offer, index: int, key: Key, fingerprint: bytes) -> bool:
        ours = nonce()
        said = transcript(fingerprint, offer.nonce, ours)
        stream.write([encode_challenge(Challenge(Verdict.WELCOME, index, ours, key.server_proof(said)))])
        return same(drive(read_proof(), stream.read), key.client_proof(said))

    def _refuse_plain(self, stream: Stream) -> None:
        """A client of ours is told that it needs a key; one of ggml's protocol can't be told anything."""
        hello = drive(read_hello(), stream.read)
        ours = hello.capabilities != NATIVE
        how = "give it one (rpc-server keys add NAME), or let it in without: " if ours else ""
        self._refused(stream, f"it has no key; {how}{ALLOW.format(address=stream.address)}")
        if ours:
            with suppress(SdrpcError):  # it is gone already
                stream.write([encode_hello_reply(newest(), hello.capabilities & Capability.ERRORS | Capability.LOCKED)])
                if Capability.ERRORS in hello.capabilities:
                    stream.write([encode_error("a client from another machine needs a key (sd-cli --rpc-key)")])
                stream.linger(self._limits.linger_seconds)

    def _refused(self, stream: Stream, reason: str) -> None:
        if self._exhausted(stream) or self._lines.exhausted(_EVERYBODY):
            self._attempts.failed(stream.address)
            return
        self._lines.failed(_EVERYBODY)
        left = self._attempts.failed(stream.address)
        more = "" if left > 0 else "; for the next minute, no more is said about clients from there"
        log.warning("%s: refused: %s%s", stream.peer, reason, more)
