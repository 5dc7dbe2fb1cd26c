"""Who gets in, over real connections: by key and without, and what the server says of those whom it sends away."""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from struct import pack

import pytest

from sdrpc.attempts import ADDRESSES, Attempts
from sdrpc.client import Endpoint, Keychain, RemoteDevice, connect
from sdrpc.client.secure import secured
from sdrpc.errors import (
    ConnectionFailed,
    ConnectionLost,
    InvalidValue,
    KeyNeeded,
    KeyRefused,
    OverQuota,
    UsageError,
    WrongServer,
)
from sdrpc.key import Key, nonce
from sdrpc.server import Door, Keys, Limits, Policy, Server
from sdrpc.server.identity import load_identity
from sdrpc.server.key_ring import KeyRing, read
from sdrpc.wire.hello import NATIVE, Capability, encode_hello
from sdrpc.wire.key_exchange import encode_offer
from tests.server.conftest import eventually
from tests.support.client import RawClient
from tests.support.null import NullDevice

CLOSED = Policy(local=False)
"""Nobody without a key: from the same machine, clients are as from any other then."""


class House:
    """A server behind a door, keys for it, and clients with files of their own."""

    def __init__(self, folder: Path, policy: Policy = CLOSED, limits: Limits | None = None) -> None:
        self.folder = folder
        self.ring = KeyRing(folder / "keys.json")
        limits = limits or Limits(linger_seconds=0.2)
        self.door = Door(policy, Keys(self.ring, folder / "server.pem"), limits)
        self.server = Server([NullDevice()], limits=limits, door=self.door)

    def keychain(self, *keys: Key, client: str = "client") -> Keychain:
        return Keychain([(None, key) for key in keys], self.folder / f"{client}.json")

    def enter(self, *keys: Key, client: str = "client") -> RemoteDevice:
        (device,) = connect([self.server.endpoint], keychain=self.keychain(*keys, client=client))
        return device

    @property
    def port(self) -> int:
        return self.server.port


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    with house.server:
        yield house


def test_a_key_is_given_once(house: House) -> None:
    key = house.ring.add("laptop").key
    with pytest.raises(KeyNeeded, match="--rpc-key"):
        house.enter()
    for keys in ((key,), ()):
        with closing(house.enter(*keys)) as device:
            assert device.memory().total > 0
    kept = (house.folder / "client.json").stat()
    assert kept.st_mode & 0o077 == 0


def test_another_key_is_refused_and_not_kept(house: House) -> None:
    house.ring.add("laptop")
    with pytest.raises(KeyRefused, match="knows no such key"):
        house.enter(Key.new())
    with pytest.raises(KeyNeeded):
        house.enter()


def test_one_of_several_keys_will_do(house: House) -> None:
    key = house.ring.add("laptop").key
    with closing(house.enter(Key.new(), key, Key.new())):
        pass
    with closing(house.enter()):
        pass


def test_a_key_that_is_revoked_ends_its_connections_and_no_others(house: House) -> None:
    laptop, guest = house.ring.add("laptop").key, house.ring.add("guest").key
    with closing(house.enter(laptop, client="a")) as stays, closing(house.enter(guest, client="b")) as goes:
        house.ring.revoke("guest")
        assert eventually(lambda: house.server.clients == 1)
        with pytest.raises(ConnectionLost):
            goes.memory()
        assert stays.memory().total > 0
    with pytest.raises(KeyRefused, match="revoked"):
        house.enter(client="b")


def test_nothing_secret_crosses_the_wire_or_is_logged(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """Not even inside TLS: what a server that is none sees of a client's keys is their ids."""
    caplog.set_level(logging.DEBUG, "sdrpc")
    key = house.ring.add("laptop").key
    with closing(house.enter(key)):
        pass
    with pytest.raises(KeyRefused) as refused:
        house.enter(other := Key.new(), client="other")
    for secret in (key, other):
        for text in (caplog.text, str(refused.value), repr(refused.value)):
            assert secret.code not in text
            assert secret.code.replace("-", "") not in text
        assert secret.secret not in encode_offer(nonce(), [secret.id])
    assert "a client of sdrpc with the key laptop" in caplog.text


def between(house: House, folder: Path) -> tuple[socket.socket, threading.Thread]:
    """Somebody between a client and the server, with a certificate of his own: passes on all that is said in TLS."""
    identity = load_identity(folder / "between.pem")
    listening = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: ssl.SSLSocket, target: ssl.SSLSocket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()

    def work() -> None:
        sock, _ = listening.accept()
        client = identity.context.wrap_socket(sock, server_side=True)
        server = secured(Endpoint("127.0.0.1", house.port), socket.create_connection(("127.0.0.1", house.port)))
        back = threading.Thread(target=pass_on, args=(server, client))
        back.start()
        pass_on(client, server)
        back.join()

    thread = threading.Thread(target=work)
    thread.start()
    return listening, thread


@pytest.mark.parametrize("known", [False, True], ids=["first time", "known server"])
def test_whoever_is_in_between_proves_nothing(house: House, tmp_path: Path, known: bool) -> None:
    """T63. He passes on what both sides say, but the server's proof is of another certificate."""
    key = house.ring.add("laptop").key
    listening, thread = between(house, tmp_path)
    port = listening.getsockname()[1]
    keychain = house.keychain(key)
    if known:
        keychain.accepted(Endpoint("127.0.0.1", port), key, house.door.keys.identity.fingerprint)  # type: ignore[union-attr]
    with listening, pytest.raises(WrongServer, match="another certificate" if known else "can't prove"):
        connect([f"127.0.0.1:{port}"], keychain=keychain)
    thread.join()
    assert eventually(lambda: house.server.clients == 0)


@pytest.mark.parametrize("certificate", [True, False], ids=["its certificate", "another certificate"])
def test_a_server_without_our_key_learns_nothing_of_us(house: House, tmp_path: Path, certificate: bool) -> None:
    """It says that it knows the key, and makes up a proof."""
    key = house.ring.add("laptop").key
    identity = load_identity(tmp_path / ("server.pem" if certificate else "other.pem"))
    said = bytearray()

    def serve(listening: socket.socket) -> None:
        sock, _ = listening.accept()
        with identity.context.wrap_socket(sock, server_side=True) as client:
            said.extend(client.recv(1 << 10))
            client.sendall(bytes(2) + nonce() + nonce())
            while data := client.recv(1 << 10):
                said.extend(data)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        with pytest.raises(WrongServer, match="can't prove"):
            connect([f"127.0.0.1:{listening.getsockname()[1]}"], keychain=house.keychain(key))
        thread.join()
    assert len(said) == 8 + 32 + 1 + 8
    assert key.secret not in said


def test_a_known_server_is_never_talked_to_without_encryption(house: House) -> None:
    """T63: somebody in its place who speaks only ggml's protocol, as a downgrade would have it."""
    key = house.ring.add("laptop").key
    with Server([NullDevice()]) as plain:
        keychain = house.keychain()
        keychain.accepted(Endpoint("127.0.0.1", plain.port), key, bytes(32))
        with pytest.raises((ConnectionFailed, WrongServer)):
            connect([plain.endpoint], keychain=keychain)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        first: list[bytes] = []

        def listen() -> None:
            sock, _ = silent.accept()
            with sock:
                first.append(sock.recv(1 << 12))

        thread = threading.Thread(target=listen)
        thread.start()
        keychain.accepted(Endpoint("127.0.0.1", port), key, bytes(32))
        with pytest.raises(ConnectionFailed, match="speaks no TLS"):
            connect([f"127.0.0.1:{port}"], keychain=keychain)
        thread.join()
    assert first[0][:1] == b"\x16", "the first word is a TLS hello"


@pytest.mark.parametrize(
    "behaviour",
    {
        "no TLS after all": b"\x16\x03\x01\x00\x05hello" + bytes(100),
        "a hello of 16 KiB": b"\x16\x03\x01\x40\x00" + bytes(1 << 14),
        "only its first byte": b"\x16",
    }.items(),
    ids=lambda item: item[0],
)
def test_broken_tls_ends_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, behaviour: tuple[str, bytes]
) -> None:
    house = House(tmp_path, limits=Limits(hello_seconds=0.5))
    with house.server, socket.create_connection(("127.0.0.1", house.port), 120) as sock:
        name = "{}:{}".format(*sock.getsockname())
        sock.sendall(behaviour[1])
        with suppress(ConnectionResetError):
            while sock.recv(1 << 10):
                pass
        assert eventually(lambda: house.server.clients == 0)
    (line,) = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert "refused" in line
    assert "fault" not in line


def test_anything_in_the_place_of_a_key(house: House, caplog: pytest.LogCaptureFixture) -> None:
    endpoint = Endpoint("127.0.0.1", house.port)
    key = house.ring.add("laptop").key
    offer = encode_offer(nonce(), [key.id])
    for said, answer in ((b"GET / HTTP/1.1\r\n" + bytes(41), 0), (offer[:-8], 0), (offer + bytes(32), 67)):
        with secured(endpoint, socket.create_connection(endpoint, 120)) as sock:
            sock.sendall(said)
            if len(said) < len(offer):
                socket.socket.shutdown(sock, socket.SHUT_WR)
            heard = bytearray()
            try:
                while data := sock.recv(1 << 10):
                    heard += data
            except OSError:
                pass
            assert len(heard) == answer, said
            assert heard[-1:] in (b"", b"\1"), "a proof that is none is no welcome"
    assert eventually(lambda: house.server.clients == 0)
    assert len([record for record in caplog.records if "refused" in record.getMessage()]) == 3


# --- without a key


@pytest.mark.parametrize(
    ("policy", "address", "let_in"),
    [
        (Policy(), "127.0.0.1", True),
        (Policy(), "127.8.8.8", True),
        (Policy(), "::1", True),
        (Policy(), "192.168.1.7", False),
        (Policy(), "fe80::1", False),
        (Policy(local=False), "127.0.0.1", False),
        (Policy(everybody=True), "8.8.8.8", True),
        (Policy(networks=(ipaddress.ip_network("192.168.1.0/24"),)), "192.168.1.7", True),
        (Policy(networks=(ipaddress.ip_network("192.168.1.0/24"),)), "192.168.2.7", False),
        (Policy(networks=(ipaddress.ip_network("192.168.1.0/24"),)), "::1", True),
        (Policy(networks=(ipaddress.ip_network("fd00::/8"),)), "fd12::1", True),
        (Policy(networks=(ipaddress.ip_network("fd00::/8"),)), "192.168.1.7", False),
    ],
)
def test_who_needs_no_key(policy: Policy, address: str, let_in: bool) -> None:
    assert policy.lets_in(address) == let_in


def test_ipv4_clients_of_a_server_on_ipv6_are_what_they_are(tmp_path: Path) -> None:
    """Their addresses come as ::ffff:127.0.0.1, which is this machine."""
    try:
        server = Server([NullDevice()], host="::")
    except UsageError:
        pytest.skip("no IPv6 here")
    with server, RawClient(server.port):
        pass


@pytest.mark.parametrize("capabilities", [NATIVE, Capability.ERRORS | Capability.MANAGED], ids=["native", "sdrpc"])
def test_a_client_without_a_key_is_told_what_can_be_told(
    house: House, caplog: pytest.LogCaptureFixture, capabilities: Capability
) -> None:
    ours = capabilities != NATIVE
    with RawClient(house.port, capabilities=None) as client:
        client.send(encode_hello(capabilities))
        said = client.ended()
        assert ("needs a key" in said) == ours
        assert eventually(lambda: house.server.clients == 0)
    (line,) = [record.getMessage() for record in caplog.records if client.name in record.getMessage()]
    assert "refused: it has no key" in line
    assert "--allow-from 127.0.0.1" in line
    assert ("rpc-server keys add" in line) == ours


def test_a_browser_is_sent_away(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """T65: a form that is posted to the port, from a page that somebody on this machine looks at."""
    for policy in (CLOSED, Policy()):
        with Server([NullDevice()], door=Door(policy)) as server, RawClient(server.port, capabilities=None) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n" + pack("<BQ", 14, 0))
            assert client.ended() == ""


def test_a_server_without_keys_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with Server([NullDevice()]) as server:
        with pytest.raises(ConnectionFailed, match="speaks no TLS"):
            connect([server.endpoint], keychain=Keychain([(None, Key.new())], Path("/nowhere/at/all")))
        assert eventually(lambda: "it has a key, this server has none" in caplog.text)


def test_attempts_are_limited_and_so_is_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """T62. Others, who have a key, are not to blame: their address is another one."""
    house = House(tmp_path, limits=Limits(attempts=3, linger_seconds=0.0))
    house.ring.add("laptop")
    with house.server:
        for attempt in range(6):
            with pytest.raises(ConnectionFailed) as failure:
                house.enter(Key.new(), client=str(attempt))
            assert isinstance(failure.value, KeyRefused) == (attempt < 3)
        assert eventually(lambda: house.server.clients == 0)
    refused = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(refused) == 3
    assert "no more is said" in refused[-1]


@pytest.mark.parametrize("says", [b"", b"\x0e", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"])
def test_coming_and_going_does_not_fill_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture, says: bytes) -> None:
    """From where a key is needed; whoever needs none is at home there."""
    caplog.set_level(logging.DEBUG, "sdrpc.server.door")
    house = House(tmp_path, limits=Limits(attempts=3, linger_seconds=0.0))
    with house.server:
        for coming in range(1, 9):
            with socket.create_connection(("127.0.0.1", house.port), 120) as sock:
                sock.sendall(says)
            assert eventually(lambda coming=coming: len(caplog.records) == coming)  # type: ignore[misc]
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 3


def test_attempts_are_counted_by_address_and_forgotten() -> None:
    now = [0.0]
    attempts = Attempts(2, 60.0, lambda: now[0])
    assert [attempts.failed("192.168.1.7") for _ in range(3)] == [1, 0, 0]
    assert attempts.exhausted("192.168.1.7")
    assert not attempts.exhausted("192.168.1.8")
    for _ in range(2):
        attempts.failed("2001:db8::1")
    assert attempts.exhausted("2001:db8::1")
    assert not attempts.exhausted("2001:db8::2"), "a neighbour"
    now[0] = 61.0
    assert not attempts.exhausted("192.168.1.7")
    for number in range(ADDRESSES + 10):
        attempts.failed(str(ipaddress.ip_address(number)))
    assert len(attempts._failed) == ADDRESSES


def test_a_proof_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, house: House) -> None:
    """T62: by :func:`hmac.compare_digest`, on both sides."""
    import hmac

    compared: list[int] = []
    real = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    key = house.ring.add("laptop").key
    with closing(house.enter(key)):
        assert compared == [32, 32]


def test_clients_with_one_key_have_a_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    house = House(tmp_path, limits=Limits(connections_of_address=2, linger_seconds=0.0))
    one, other = house.ring.add("laptop").key, house.ring.add("other").key
    with house.server:
        held = [house.enter(one, client="one") for _ in range(2)]
        with pytest.raises(OverQuota, match=r"2 clients like this one .laptop. are connected already"):
            house.enter(one, client="one")
        assert eventually(lambda: "2 clients like this one (laptop) are connected already" in caplog.text)
        held.append(house.enter(other, client="other"))
        for device in held:
            device.close()
        assert eventually(lambda: house.server.clients == 0)
        house.enter(one, client="one").close()


# --- files


def test_names_of_keys(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    ring.add("laptop")
    for name in ("", "a b", "../x", "x" * 33, "\x1b[31m", "-x", "laptop"):
        with pytest.raises(InvalidValue):
            ring.add(name)
    with pytest.raises(InvalidValue, match="there are laptop"):
        ring.revoke("desktop")
    assert [key.name for key in ring.all()] == ["laptop"]


@pytest.mark.parametrize("name", ["keys.json", "server.pem"])
def test_secrets_that_others_can_read_are_not_used(house: House, name: str, caplog: pytest.LogCaptureFixture) -> None:
    key = house.ring.add("laptop").key
    with closing(house.enter(key)):
        pass
    house.door.keys._identity = None  # type: ignore[union-attr]
    (house.folder / name).chmod(0o640)
    with pytest.raises((ConnectionFailed, ConnectionLost)):
        house.enter()
    assert eventually(lambda: "others can read" in caplog.text)
    (house.folder / name).chmod(0o600)
    with closing(house.enter()):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": 2, "keys": []}',
        b'{"format": 1}',
        b'{"format": 1, "keys": 7}',
        b'{"format": 1, "keys": [7]}',
        b'{"format": 1, "keys": [{"name": "x", "key": "y", "added": "2026-01-01"}]}',
        b'{"format": 1, "keys": [{"name": 1, "key": "y", "added": "2026-01-01"}]}',
        b"[" * 100_000,
        bytes(1 << 19),
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_damaged_file_lets_nobody_in(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=r"keys\.json"):
        KeyRing(path).find(bytes(8))
    with pytest.raises(UsageError, match=r"keys\.json"):
        read(path)
    with pytest.raises(UsageError, match=r"keys\.json"):
        Keychain(path=path).credentials(Endpoint("desktop", 50052))


def test_a_file_of_keys_is_read_again_when_it_changes(tmp_path: Path) -> None:
    ring, writer = KeyRing(tmp_path / "keys.json"), KeyRing(tmp_path / "keys.json")
    assert ring.all() == []
    for name in "abc":
        made = writer.add(name)
        assert ring.find(made.key.id) == made
    writer.revoke("b")
    assert [key.name for key in ring.all()] == ["a", "c"]
    (tmp_path / "keys.json").unlink()
    assert ring.all() == []


def test_a_damaged_certificate_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "server.pem"
    first = load_identity(path).fingerprint
    assert load_identity(path).fingerprint == first
    assert path.stat().st_mode & 0o077 == 0
    for content in (b"", b"nonsense", path.read_bytes()[:200], path.read_bytes()[-200:]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"server\.pem: not a certificate"):
            load_identity(path)


def test_a_slow_handshake_ends_in_time(tmp_path: Path) -> None:
    """A byte now and then does not hold a place for longer than a client may take to greet."""
    house = House(tmp_path, limits=Limits(hello_seconds=1.0))

    def drip(sock: socket.socket) -> None:
        for byte in b"\x16\x03\x01\x02\x00\x01" + bytes(500):
            sock.sendall(bytes([byte]))
            time.sleep(0.05)

    with house.server, socket.create_connection(("127.0.0.1", house.port), 120) as sock:
        with pytest.raises(OSError, match=r"reset|pipe"):  # long before the last byte, after 25 seconds
            drip(sock)
        assert eventually(lambda: house.server.clients == 0)
