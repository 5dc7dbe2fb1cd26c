"""Which device enlarges pictures, for sd-cli and sd-server alike."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from sdrpc.cli.upscale import on_one_device
from sdrpc.diffusion import placement
from sdrpc.diffusion.placement import UPSCALER
from sdrpc.errors import InvalidValue


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
