"""Which keys a client has for a server: those that were given, and those that are kept."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sdrpc.client import Endpoint, Keychain, given_keys
from sdrpc.client.keychain import Credential
from sdrpc.errors import UsageError
from sdrpc.key import Key

DESKTOP, MINI = Endpoint("desktop", 50052), Endpoint("mini", 50052)
ONE, TWO, THREE = Key.new(), Key.new(), Key.new()


def test_a_server_of_which_nothing_is_known_has_no_keys(tmp_path: Path) -> None:
    assert Keychain(path=tmp_path / "servers.json").credentials(DESKTOP) == []


def test_keys_for_one_server_and_for_all(tmp_path: Path) -> None:
    chain = Keychain([(None, ONE), (MINI, TWO)], tmp_path / "servers.json")
    assert chain.credentials(DESKTOP) == [Credential(ONE)]
    assert chain.credentials(MINI) == [Credential(TWO)]
    assert chain.plus(DESKTOP, THREE).credentials(DESKTOP) == [Credential(THREE)]


def test_what_let_us_in_is_kept_with_its_certificate(tmp_path: Path) -> None:
    path = tmp_path / "servers.json"
    Keychain(path=path).accepted(DESKTOP, ONE, b"\1" * 32)
    Keychain(path=path).accepted(MINI, TWO, b"\2" * 32)
    chain = Keychain(path=path)
    for name in ("desktop", "DESKTOP", "Desktop."):
        assert chain.credentials(Endpoint(name, 50052)) == [Credential(ONE, b"\1" * 32)]
    assert chain.credentials(Endpoint("desktop", 50053)) == []
    assert path.stat().st_mode & 0o077 == 0


def test_a_new_key_comes_beside_the_kept_one_or_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "servers.json"
    Keychain(path=path).accepted(DESKTOP, ONE, b"\1" * 32)
    kept = Credential(ONE, b"\1" * 32)
    assert Keychain([(None, TWO)], path).credentials(DESKTOP) == [kept, Credential(TWO)]
    assert Keychain([(DESKTOP, TWO)], path).credentials(DESKTOP) == [Credential(TWO)]
    assert Keychain([(DESKTOP, ONE)], path).credentials(DESKTOP) == [kept], "the certificate must still be the same"
    Keychain(path=path).accepted(DESKTOP, TWO, b"\3" * 32)
    assert Keychain(path=path).credentials(DESKTOP) == [Credential(TWO, b"\3" * 32)]


def test_a_disk_that_refuses_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    Keychain(path=tmp_path / "file" / "servers.json").accepted(DESKTOP, ONE, bytes(32))
    assert "the key of desktop:50052 is not kept" in caplog.text
    assert ONE.code not in caplog.text


def test_keys_from_options_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# mine\n\n{TWO.code}\nmini = {THREE.code}\n".replace(" = ", "="))
    monkeypatch.setenv("SDRPC_RPC_KEY", f"desktop:50052={ONE.code}, {TWO.code}")
    assert given_keys([], []) == [(DESKTOP, ONE), (None, TWO)]
    assert given_keys([ONE.code.upper()], [str(file)]) == [(None, ONE), (None, TWO), (MINI, THREE)]
    monkeypatch.setenv("SDRPC_RPC_KEY", "")
    assert given_keys([], []) == []


@pytest.mark.parametrize(
    "text",
    [
        ONE.code[:-1],
        f"desktop={ONE.code}x",
        f"a b={ONE.code}",
        f"http://x={ONE.code}",
        "=",
        "x",
    ],
    ids=range(6),
)
def test_a_key_that_is_none_is_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="--rpc-key: ") as error:
        given_keys([text])
    for part in (*ONE.code.split("-"), *TWO.code.split("-")):
        assert part not in str(error.value)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_of_keys_that_can_not_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--rpc-key-file"):
        given_keys([], [str(tmp_path / name)])


def test_nothing_of_a_key_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "sdrpc")
    chain = Keychain([(None, ONE)], tmp_path / "servers.json")
    chain.accepted(DESKTOP, ONE, bytes(32))
    assert ONE.code not in caplog.text + repr(chain.credentials(DESKTOP))
