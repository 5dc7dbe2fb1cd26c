"""The grammar of --backend and its companions."""

from __future__ import annotations

import pytest

from sdrpc.cli.placement import ALIASES, NOT_HERE_YET, parse, resolve, wanted
from sdrpc.errors import UsageError


def place(backend: str, main: str, by_part: dict[str, str], devices: tuple[str, ...], default: str) -> dict[str, str]:
    return {part: resolve(name, devices, default) for part, name in wanted(backend, main, by_part).items()}


DEVICES = ("CPU", "CUDA0", "RPC0", "RPC1", "RPC10")


@pytest.mark.parametrize(
    ("backend", "main", "by_part", "expected"),
    [
        ("", "", {}, ("RPC0", "RPC0", "RPC0")),
        ("cuda0", "", {}, ("CUDA0", "CUDA0", "CUDA0")),
        ("te=RPC1,diffusion=RPC0,vae=CPU", "", {}, ("RPC1", "RPC0", "CPU")),
        ("clip=cpu, UNET=rpc-1 ,first_stage=rpc_0", "", {}, ("CPU", "RPC1", "RPC0")),
        ("vae=cpu", "rpc1", {}, ("RPC1", "RPC1", "CPU")),
        ("*=cuda", "rpc1", {}, ("CUDA0", "CUDA0", "CUDA0")),
        ("default=gpu,te=auto", "", {"vae": "cpu"}, ("RPC0", "CUDA0", "CPU")),
        ("vae=cpu", "", {"vae": "rpc10"}, ("RPC0", "RPC0", "RPC10")),
    ],
)
def test_every_part_gets_a_device(
    backend: str, main: str, by_part: dict[str, str], expected: tuple[str, str, str]
) -> None:
    assert tuple(place(backend, main, by_part, DEVICES, "RPC0").values()) == expected


@pytest.mark.parametrize("part", ["te", "diffusion", "vae"])
def test_all_aliases_name_their_part(part: str) -> None:
    for alias in ALIASES[part]:
        assert parse(f"{alias}=x") == {part: "x"}


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("te=RPC7", "'RPC7' does not exist; there are CPU, CUDA0"),
        ("te=RP", "could be RPC0 or RPC1 or RPC10"),
        ("wheels=RPC0", "no such module"),
        ("te=", "no device is named"),
        ("te=RPC0,clip=RPC1", "placed twice"),
        ("diffusion=rpc0&rpc1", "over several devices"),
        *((f"{module}=cpu", "yet") for module in NOT_HERE_YET),
    ],
)
def test_what_does_not_exist_is_refused(backend: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        place(backend, "", {}, DEVICES, "RPC0")


def test_gpu_needs_one() -> None:
    with pytest.raises(UsageError, match="--rpc"):
        place("gpu", "", {}, ("CPU",), "CPU")
