"""Servers that announce themselves: found over real multicast DNS on the loopback interface, and believed only so
far."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.cli import discovery as command
from sdrpc.client import Endpoint, Keychain, connect
from sdrpc.client.discovery import accepted, discover
from sdrpc.errors import ConnectionFailed
from sdrpc.key import Key
from sdrpc.server import Door, Keys, Policy, Server
from sdrpc.server.announcing import announced
from sdrpc.server.key_ring import KeyRing
from sdrpc.wire import service
from sdrpc.wire.service import Announcement
from tests.server.conftest import eventually
from tests.support.null import NullDevice


def told(**changes: str) -> dict[bytes, bytes | None]:
    facts = service.properties([("CPU", 1 << 30), ("CUDA0", 24 << 30)], True, bytes(range(32))) | changes
    return {key.encode(): value.encode() for key, value in facts.items()}


def test_what_is_announced_is_what_is_read() -> None:
    found = service.parse(f"desktop.{service.TYPE}", ["192.168.1.7", "fd00::1"], 50052, told())
    devices = (("CPU", 1 << 30), ("CUDA0", 24 << 30))
    assert found == Announcement("desktop", "192.168.1.7", 50052, devices, True, bytes(range(16)))


@pytest.mark.parametrize(
    ("name", "addresses", "port"),
    [
        ("x", [], 50052),
        ("x", ["here"], 50052),
        ("x", ["224.0.0.251"], 50052),
        ("x", ["0.0.0.0"], 50052),
        ("x", ["192.168.1.7"], 0),
        ("x", ["192.168.1.7"], 1 << 16),
    ],
)
def test_announcements_that_make_no_sense(name: str, addresses: list[str], port: int) -> None:
    assert service.parse(name, addresses, port, told()) is None


@given(
    st.text(max_size=300),
    st.dictionaries(
        st.sampled_from([b"devices", b"key", b"certificate", b"other"]), st.none() | st.binary(max_size=255)
    ),
)
def test_nothing_in_an_announcement_reaches_a_terminal(name: str, facts: dict[bytes, bytes | None]) -> None:
    found = service.parse(f"{name}.{service.TYPE}", ["10.0.0.7"], 1, facts)
    assert found is not None
    assert found.name.isprintable()
    assert len(found.name) <= 63
    assert len(found.devices) <= service.MAX_DEVICES
    assert all(device.isascii() and device.isprintable() for device, _ in found.devices)
    assert len(found.certificate) in (0, 16)
    assert found.needs_key or facts.get(b"key") == b"0"


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.json")


def behind(ring: KeyRing, folder: Path) -> Server:
    keys = Keys(ring, folder / "server.pem")
    return Server([NullDevice(1 << 30)], door=Door(Policy(local=False), keys))


def lacks_multicast() -> str:
    """Why nobody hears what is said to a group on the loopback interface, if so."""
    group = socket.inet_aton("224.0.0.251") + socket.inet_aton("127.0.0.1")
    try:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth,
        ):
            ear.bind(("", 0))
            ear.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            ear.settimeout(10)
            mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            mouth.sendto(b"x", ("224.0.0.251", ear.getsockname()[1]))
            ear.recv(1)
    except OSError as error:
        return str(error)
    return ""


def test_a_server_is_found_and_used_only_after_it_let_us_in_once(
    ring: KeyRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if lacking := lacks_multicast():
        pytest.skip(f"no multicast here: {lacking}")
    key = ring.add("laptop").key
    known = tmp_path / "servers.json"
    with behind(ring, tmp_path) as server:
        found: list[Announcement] = []

        def heard() -> list[Announcement]:
            found[:] = discover(2.5, ["127.0.0.1"])
            return [each for each in found if each.port == server.port]

        with announced(server):
            assert eventually(heard)
        (mine,) = [each for each in found if each.port == server.port]
        assert mine.devices == (("NULL", 1 << 30),)
        assert mine.needs_key
        monkeypatch.setattr(command, "discover", lambda: found)
        with pytest.raises(ConnectionFailed, match="no server in this network let us in before"):
            command.located(["auto"], Keychain(path=known))
        # under the name that the user typed
        with closing(connect([f"localhost:{server.port}"], keychain=Keychain([(None, key)], known))[0]):
            pass
        kept = known.read_bytes()
        rpc, keychain = command.located(["auto", "other:1"], Keychain(path=known))
        assert rpc == [f"127.0.0.1:{server.port}", "other:1"]
        with closing(connect(rpc[:1], keychain=keychain)[0]) as device:
            assert device.memory().total
        assert known.read_bytes() == kept, "another name for the same server is no other server"
        monkeypatch.setattr(command, "Keychain", lambda: Keychain(path=known))
        assert command.show() == 0
        assert "let us in before" in capsys.readouterr().out


def test_somebody_who_announces_our_server_s_certificate_is_not_used(
    ring: KeyRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ring.add("laptop").key
    (tmp_path / "evil").mkdir()
    with behind(ring, tmp_path) as server, behind(ring, tmp_path / "evil") as evil:
        fingerprint = server.door.keys.identity.fingerprint  # type: ignore[union-attr]
        keychain = Keychain(path=tmp_path / "servers.json")
        keychain.accepted(Endpoint("desktop", 50052), key, fingerprint)
        places = [Announcement("a", "127.0.0.1", each.port, (), True, fingerprint[:16]) for each in (evil, server)]
        monkeypatch.setattr(command, "discover", lambda: places)
        rpc, _ = command.located(["auto"], keychain)
        assert rpc == [f"127.0.0.1:{server.port}"]
    assert f"127.0.0.1:{evil.port}: it shows another certificate" in " ".join(capsys.readouterr().err.split())


def test_servers_without_a_certificate_are_never_used_by_themselves(tmp_path: Path) -> None:
    keychain = Keychain(path=tmp_path / "servers.json")
    keychain.accepted(Endpoint("desktop", 50052), Key.new(), bytes(32))
    plain = Announcement("plain", "127.0.0.1", 1, (), False, b"")
    assert accepted([plain], keychain)[0] == []
