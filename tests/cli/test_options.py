"""Spellings of options, and native options that sdrpc does not have."""

from __future__ import annotations

import pytest

from sdrpc.cli.options import NOT_HERE_YET, canonical
from sdrpc.errors import UsageError

KNOWN = ("--vae-backend-device", "--clip_l", "--rpc", "--vae")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--vae_backend_device", "RPC0"], ["--vae-backend-device", "RPC0"]),
        (["--clip-l=a_b.safetensors"], ["--clip_l=a_b.safetensors"]),
        (["-p", "a_b --c"], ["-p", "a_b --c"]),
        (["--unknown_one"], ["--unknown_one"]),
    ],
)
def test_dashes_and_underscores_mean_the_same(typed: list[str], meant: list[str]) -> None:
    assert canonical(typed, KNOWN) == meant


@pytest.mark.parametrize("option", [option for options in NOT_HERE_YET.values() for option in options])
def test_native_options_that_are_not_here_are_refused_by_name(option: str) -> None:
    with pytest.raises(UsageError, match=option):
        canonical(["-p", "x", option], KNOWN)


def test_a_prompt_may_look_like_a_short_option() -> None:
    assert canonical(["-p", "-in the dark-"], KNOWN) == ["-p", "-in the dark-"]
