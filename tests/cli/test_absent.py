"""Devices keep their names while a server is away."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdrpc.cli.devices import every_device
from sdrpc.client import Endpoint, device_counts
from tests.support.scripted import Scripted


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path))
    return tmp_path


def remote_names(*servers: str) -> tuple[list[str], dict[str, str]]:
    """Those that are there, and what is said of those that are not."""
    with every_device(servers, "exact", 1) as found:
        return [device.name for device in found.devices if device.name.startswith("RPC")], found.told()


def test_a_server_that_was_there_has_as_many_devices_as_then() -> None:
    away = Scripted(devices=2)
    with Scripted(devices=1).listening() as other:
        with away.listening():
            assert remote_names(away.endpoint, other.endpoint) == (["RPC0", "RPC1", "RPC2"], {})
        there, told = remote_names(away.endpoint, other.endpoint)
    assert there == ["RPC2"]
    [(what, why)] = told.items()
    assert what == "RPC0, RPC1 are not there"
    assert "it counts as" not in why


def test_one_that_nobody_knows_counts_as_one() -> None:
    with Scripted(devices=1).listening() as other:
        there, told = remote_names("127.0.0.1:1", other.endpoint)
        assert there == ["RPC1"]
        [(what, why)] = told.items()
        assert what == "RPC0 is not there"
        assert why.endswith("it counts as one device: if it has more, those behind it had other numbers")


@pytest.mark.parametrize("written", ["", "[]", '{"127.0.0.1:1": true}', '{"127.0.0.1:1": 257}', "[" * 100_000, "\0"])
def test_a_file_that_makes_no_sense_says_nothing(cache: Path, written: str) -> None:
    path = cache / "servers" / "devices.json"
    path.parent.mkdir()
    path.write_text(written)
    endpoint = Endpoint("127.0.0.1", 1)
    assert device_counts.remembered(endpoint) is None
    device_counts.remember(endpoint, 3)
    assert device_counts.remembered(endpoint) == 3


def test_where_nothing_can_be_kept_nothing_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("SDRPC_CACHE", str(cache / "file"))
    device_counts.remember(Endpoint("desktop", 1), 3)
    assert device_counts.remembered(Endpoint("desktop", 1)) is None


def test_those_that_were_met_last_are_kept() -> None:
    for port in range(1, device_counts.MOST_SERVERS + 2):
        device_counts.remember(Endpoint("desktop", port), 1)
    assert device_counts.remembered(Endpoint("desktop", 1)) is None
    assert device_counts.remembered(Endpoint("desktop", 2)) == 1
