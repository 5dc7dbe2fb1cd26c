"""The grammar of --backend and its companions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sdrpc.device_names import resolve
from sdrpc.diffusion.placement import (
    ALIASES,
    NOT_HERE_YET,
    REST,
    assigned,
    limits,
    parse,
    side_by_side,
    waiting,
    wanted,
)
from sdrpc.diffusion.rooms import NO_LIMIT, limited
from sdrpc.errors import InvalidValue

SD1 = ("clip_l", "diffusion", "vae")
FLUX = ("clip_l", "t5xxl", "diffusion", "vae")


def place(*asked: Any) -> dict[str, str]:
    """The first of :func:`places`."""
    return {part: names[0] for part, names in places(*asked).items()}


def places(
    backend: str,
    main: str,
    options: dict[str, str],
    devices: tuple[str, ...],
    default: str,
    model: tuple[str, ...] = SD1,
) -> dict[str, tuple[str, ...]]:
    wishes = wanted(model, parse(backend), main, options)
    return {part: tuple(resolve(name, devices, default) for name in names) for part, names in wishes.items()}


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


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("t5xxl=RPC1,te=CPU,all=RPC0", ("CPU", "RPC1", "RPC0", "RPC0")),
        ("t5=rpc1", ("RPC0", "RPC1", "RPC0", "RPC0")),
        ("te=CUDA0,clip_l=CPU", ("CPU", "CUDA0", "RPC0", "RPC0")),
    ],
)
def test_text_encoders_have_devices_of_their_own(backend: str, expected: tuple[str, ...]) -> None:
    assert tuple(place(backend, "", {}, DEVICES, "RPC0", FLUX).values()) == expected


@pytest.mark.parametrize("component", ALIASES)
def test_all_aliases_name_their_component(component: str) -> None:
    for alias in ALIASES[component]:
        assert parse(f"{alias}=x") == {component: ("x",)}


@pytest.mark.parametrize("text", ["auto,RPC0", "RPC0,auto", "te=CPU,diffusion=auto,RPC0"])
def test_auto_stands_alone(text: str) -> None:
    """It is a plan for all devices that are there: nothing is left for another one to do."""
    with pytest.raises(InvalidValue, match=f"backend {text}: auto stands alone"):
        parse(text)
    assert parse("te=CPU,all=auto") == {"te": ("CPU",), REST: ("auto",)}
    with pytest.raises(InvalidValue, match="auto stands alone"):
        wanted(SD1, {}, "auto,RPC0")


def test_devices_by_name() -> None:
    assert assigned(FLUX, {"te": 1, "t5xxl": 2, "all": 3}) == {"clip_l": 1, "t5xxl": 2, "diffusion": 3, "vae": 3}
    with pytest.raises(InvalidValue, match=r"vae: no device"):
        assigned(SD1, {"te": 1, "diffusion": 2})
    with pytest.raises(InvalidValue, match=r"t5xxl: this model has clip_l"):
        assigned(SD1, {"t5xxl": 1, "all": 2})
    assert parse("all=x") == {REST: ("x",)}


@pytest.mark.parametrize(
    ("backend", "main", "by_part", "expected"),
    [
        ("rpc0,rpc1", "", {}, (("RPC0", "RPC1"), ("RPC0", "RPC1"), ("RPC0", "RPC1"))),
        ("te=cpu,vae=rpc1", "", {}, (("CPU",), ("RPC0",), ("RPC1",))),
        ("te=cpu,diffusion=rpc0, rpc1 ,cpu,vae=rpc1", "", {}, (("CPU",), ("RPC0", "RPC1", "CPU"), ("RPC1",))),
        ("cuda,diffusion=rpc0,rpc1", "cpu", {}, (("CUDA0",), ("RPC0", "RPC1"), ("CUDA0",))),
        ("", "rpc1,rpc0", {"vae": "cpu,rpc10"}, (("RPC1", "RPC0"), ("RPC1", "RPC0"), ("CPU", "RPC10"))),
    ],
)
def test_several_devices_in_order_of_preference(
    backend: str, main: str, by_part: dict[str, str], expected: tuple[tuple[str, ...], ...]
) -> None:
    assert tuple(places(backend, main, by_part, DEVICES, "RPC0").values()) == expected


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("te=RPC7", "RPC7: there is no such device; there are CPU, CUDA0"),
        ("te=RP", "could be RPC0 or RPC1 or RPC10"),
        ("wheels=RPC0", "no such component"),
        ("te=", "no device is named"),
        ("te=RPC0,clip=RPC1", "placed twice"),
        ("diffusion=rpc0&", "before and after each"),
        ("diffusion=rpc0||rpc1", "before and after each"),
        ("diffusion=rpc0&auto", "auto stands alone"),
        ("Auto|rpc0", "auto stands alone"),
        ("t5xxl=cpu", "this model has no t5xxl; it has clip_l, diffusion, vae"),
        *((f"{module}=cpu", "yet") for module in NOT_HERE_YET),
    ],
)
def test_what_does_not_exist_is_refused(backend: str, says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        place(backend, "", {}, DEVICES, "RPC0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rpc0", (("rpc0",),)),
        ("rpc0 & rpc1", (("rpc0", "rpc1"),)),
        ("rpc0|rpc1", (("rpc0",), ("rpc1",))),
        ("rpc0&rpc1|rpc2&cpu", (("rpc0", "rpc1"), ("rpc2", "cpu"))),
    ],
)
def test_several_devices_together(text: str, expected: tuple[tuple[str, ...], ...]) -> None:
    assert side_by_side(text) == expected
    assert parse(f"te=cpu,diffusion={text},rpc9") == {"te": ("cpu",), "diffusion": (text, "rpc9")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", {"": 8 << 30}),
        ("512M", {"": 512 << 20}),
        ("RPC0=6, RPC1=1.5G,2GiB", {"RPC0": 6 << 30, "RPC1": 3 << 29, "": 2 << 30}),
        ("0", {"": NO_LIMIT}),
        ("RPC0=0,-0.5", {"RPC0": NO_LIMIT, "": -(1 << 29)}),
    ],
)
def test_limits(text: str, expected: dict[str, int]) -> None:
    assert limits(text) == expected


@pytest.mark.parametrize("text", ["RPC0=", "much", "--1", "nan", "1,2", "RPC0=1,RPC0=2", "1e99", "9" * 40])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(InvalidValue, match="max_vram"):
        limits(text)


def test_what_a_limit_leaves_of_a_device() -> None:
    device: Any = SimpleNamespace(name="RPC-0")
    for given, size in (({}, 10), ({"": NO_LIMIT}, 10), ({"": 4}, 4), ({"": 4, "rpc0": -3}, 7), ({"": -99}, 0)):
        assert limited(device, 10, given) == (size, size < 10)


def test_a_copy_for_the_negative_prompt_has_another_name() -> None:
    with pytest.raises(InvalidValue, match=r"cfg: the negative prompt .* with diffusion=A\|B"):
        parse("diffusion=RPC0,cfg=RPC1")


def test_where_weights_wait() -> None:
    assert waiting("disk") == {REST: "disk"}
    assert waiting("te=CPU,unet=disk,all=auto") == {"te": "cpu", "diffusion": "disk", REST: "auto"}
    for wrong in ("RPC0", "te=", "wheels=cpu", "te=cpu,clip=disk"):
        with pytest.raises(InvalidValue, match="params_backend"):
            waiting(wrong)
    assert assigned(FLUX, {"te": "cpu", "vae": "disk"}, "params_backend", "auto") == {
        "clip_l": "cpu", "t5xxl": "cpu", "diffusion": "auto", "vae": "disk"
    }  # fmt: skip
    with pytest.raises(InvalidValue, match=r"params_backend t5xxl: this model has clip_l"):
        assigned(SD1, {"t5xxl": "cpu"}, "params_backend", "auto")


def test_gpu_needs_one() -> None:
    with pytest.raises(InvalidValue, match="no device but the CPU"):
        place("gpu", "", {}, ("CPU",), "CPU")
