"""How fast a device is: measured once, kept, and measured again when what was kept is old or makes no sense."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdrpc.device import Device
from sdrpc.engine.discovery import devices
from sdrpc.runtime import speed
from sdrpc.runtime.speed import KEPT_SECONDS, Speed, speed_of


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    (found,) = devices("exact", 1)
    yield found
    found.close()


def test_a_measurement_is_kept(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "speeds.json"
    free = device.memory().total
    found = speed_of(device, path)
    assert found.products > 1e7
    assert found.bandwidth > 1e6
    assert 0 <= found.latency < 60
    assert free == device.memory().total
    monkeypatch.setattr(speed, "measured", lambda _: pytest.fail("measured again"))
    assert speed_of(device, path) == found


GOOD = [1e12, 1e9, 1e-3]


@pytest.mark.parametrize(
    ("kept", "is_taken"),
    [
        ([time.time() - 60, *GOOD], True),
        ([time.time() - KEPT_SECONDS - 60, *GOOD], False),
        ([time.time() + KEPT_SECONDS, *GOOD], False),  # far enough for a suite that takes an hour
        ([time.time() - 60, 0.0, 1e9, 1e-3], False),
        ([time.time() - 60, 1e12, -1.0, 1e-3], False),
        ([time.time() - 60, float("nan"), 1e9, 1e-3], False),
        ([time.time() - 60, *GOOD, 1.0], False),
        (["x", *GOOD], False),
        ({"x": 1}, False),
        (None, False),
    ],
)
def test_what_was_kept(
    kept: object, is_taken: bool, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "speeds.json", Speed(1.0, 2.0, 3.0)
    path.write_text(json.dumps({device.description: kept, "another": [time.time(), *GOOD]}))
    monkeypatch.setattr(speed, "measured", lambda _: now)
    assert speed_of(device, path) == (Speed(*GOOD) if is_taken else now)
    assert "another" in json.loads(path.read_text())


@pytest.mark.parametrize("text", ["", "[]", "[" * 9999, "{", "\xff"])
def test_a_file_that_is_none(text: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "speeds.json"
    path.write_text(text)
    monkeypatch.setattr(speed, "measured", lambda _: Speed(1.0, 2.0, 3.0))
    assert speed_of(device, path) == Speed(1.0, 2.0, 3.0)
    assert device.description in json.loads(path.read_text())
