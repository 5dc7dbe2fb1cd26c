"""Which device enlarges pictures, for sd-cli and sd-server alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from sdrpc.cli.sd_cli import all_enlarged
from sdrpc.cli.upscale import on_one_device
from sdrpc.diffusion import placement
from sdrpc.diffusion.pictures import Picture, Pixels
from sdrpc.diffusion.placement import UPSCALER
from sdrpc.errors import InvalidValue, OutOfMemory


def devices(backend: str, by_option: Mapping[str, str] | None = None) -> placement.Names:
    placed = placement.parse(backend)
    return on_one_device(placement.wanted([UPSCALER], placed, "", by_option)[UPSCALER], placed, by_option or {})


def test_it_is_on_one_device() -> None:
    assert devices("upscaler=RPC1,all=RPC0") == ("RPC1",)
    assert devices("upscaler=RPC1,CPU") == ("RPC1", "CPU")
    assert devices("RPC0&RPC1") == ("RPC0",)  # what computes everything together
    assert devices("RPC0|RPC1,CPU") == ("RPC0", "CPU")
    assert devices("") == ("auto",)


@pytest.mark.parametrize(
    ("backend", "option"), [("upscaler=RPC0&RPC1", ""), ("esrgan=CPU,RPC0|RPC1", ""), ("", "RPC0&RPC1")]
)
def test_several_that_are_named_for_it_are_refused(backend: str, option: str) -> None:
    with pytest.raises(InvalidValue, match=r"upscaler=RPC0.RPC1: the upscaler is on one device"):
        devices(backend, {UPSCALER: option})


def test_a_picture_that_can_not_be_enlarged_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    """All are kept as they were drawn, and then the first refusal is an error."""
    sizes = iter((1, 2))

    def enlarge(image: Pixels) -> Pixels:
        raise OutOfMemory("RPC0", next(sizes) << 20)

    pictures = [Picture(np.full((2, 2, 3), seed, np.uint8), seed) for seed in (5, 6)]
    came = all_enlarged(pictures, enlarge)
    assert [next(came), next(came)] == pictures
    assert "it is kept as it was drawn" in capfd.readouterr().err
    with pytest.raises(OutOfMemory, match=r"no room for 1\.0 MiB"):
        next(came)
