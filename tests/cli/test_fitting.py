"""--auto-fit: what the plan is told of, what it refuses, and in which words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

from sdrpc.cli.fitting import fitted, roughly
from sdrpc.diffusion.drawable import settings_of
from sdrpc.diffusion.request import Request
from sdrpc.errors import DoesNotFit
from sdrpc.families.model import Model, ModelFiles, open_model
from sdrpc.runtime import speed
from sdrpc.runtime.chain import Lanes, lanes
from tests.support.null import NullDevice

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    """clip_l takes 6 MiB, most of it one weight; diffusion as many, of which the largest takes 0.6 MiB; the VAE 2."""
    return open_model(ModelFiles(tiny))


def plan(
    model: Model, limits: Mapping[str, float], waits: Mapping[str, str], fixed: Collection[str] = ()
) -> dict[str, list[Lanes]]:
    devices = [NullDevice() for _ in "ab"]
    for number, device in enumerate(devices):
        device.name = f"RPC{number}"
    small = {name: int(limit * MIB) for name, limit in limits.items()}
    placed = {name: [lanes(devices[0])] for name in model.components}
    return fitted(model, settings_of(model, Request("")), placed, fixed, devices, small, waits)


@pytest.fixture(autouse=True)
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "speed_of", lambda _: (1e9, 1e9, 1e-3))


@pytest.mark.parametrize(
    ("limits", "nowhere"),
    [({"": 0.01}, ["clip_l", "diffusion", "vae"]), ({"RPC0": 1, "RPC1": 4}, ["clip_l", "diffusion"])],
)
def test_a_refusal_names_all_that_has_room_nowhere(model: Model, limits: dict[str, float], nowhere: list[str]) -> None:
    with pytest.raises(
        DoesNotFit, match=r"^RPC0 and RPC1: .* there is room for [01] MiB \(max_vram\) \+ [04] MiB"
    ) as no:
        plan(model, limits, {})
    assert list(no.value.sizes) == nowhere
    assert no.value.sizes["diffusion"] >= model["diffusion"].found.nbytes()


def test_what_a_refusal_advises_is_done(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    """A component whose weights wait in their file is where there is most room, a part at a time."""
    limits, here = {"RPC0": 0.01, "RPC1": 4}, ("clip_l", "vae")
    with pytest.raises(DoesNotFit, match=r"RPC1 can compute it a part at a time \(params_backend diffusion=disk\)"):
        plan(model, limits, {}, fixed=here)
    found = plan(model, limits, {"diffusion": "disk"}, fixed=here)
    assert [place.name for place in found["diffusion"]] == ["RPC1"]
    assert "RPC1, with room for 4.0 MiB: diffusion a part at a time (4.0 MiB)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0712, "0.07 s"), (0.96, "1 s"), (3.456, "3 s"), (99.4, "99 s"), (150.0, "2 min"), (20000.0, "6 h")],
)
def test_a_guess_has_few_digits(seconds: float, said: str) -> None:
    assert roughly(seconds) == said
