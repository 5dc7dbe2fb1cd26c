"""One model over several devices of real servers: its layers one after the other, or all of it side by side."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sdrpc
from sdrpc.client import connect
from sdrpc.client.remote import RemoteDevice
from sdrpc.device import Device
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.session import Session
from sdrpc.engine.discovery import devices as local_devices
from sdrpc.errors import Cancelled, DoesNotFit
from sdrpc.families.model import open_model
from sdrpc.runtime.cache import Cache
from sdrpc.runtime.chain import Chain, Lanes, Placed, _cross, _Crossing
from sdrpc.server import Server
from tests.support.pictures import Case, Checkpoints, request
from tests.support.trouble import Restartable

SD_CLI = (sys.executable, "-m", "sdrpc", "sd-cli")
REQUEST = sdrpc.Request("a cat", "a dog", width=64, height=64, steps=2, sampling_method="euler_a", batch_count=2)
FAMILIES = ("sd1", "sdxl", "flux1-dev", "z-image")


@pytest.fixture(scope="module")
def devices(ports: list[int]) -> Iterator[list[Device]]:
    found = connect([f"127.0.0.1:{port}" for port in ports])
    yield list(found)
    for device in found:
        device.close()


@pytest.fixture(scope="module")
def here() -> Iterator[Device]:
    """A device of this process, for what shall be in nobody's way."""
    (device,) = local_devices("exact", 1)
    yield device
    device.close()


def test_a_server_that_copies_nothing_is_listened_to_before_it_is_written_to(
    here: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A native one with two devices: while it answers, it takes nothing."""
    monkeypatch.setattr(RemoteDevice, "copy_to", lambda *_: False)
    data = np.random.default_rng(0).bytes(48 << 20)
    with Server([here, here]) as server:  # type: ignore[list-item]
        source, target = connect([server.endpoint])
        buffer, other = source.allocate(len(data)), target.allocate(len(data))
        source.write(buffer, 0, data)
        _cross([(_Crossing(source, (buffer, 0), len(data)), [(other, 0)])], target)
        assert bytes(target.read(other, 0, len(data))) == data
        for device in (source, target):
            device.close()


def drawn(files: sdrpc.ModelFiles, placement: dict[str, Placed], graphs: Path, case: Case) -> list[np.ndarray]:
    asked = replace(request(case), steps=1, video_frames=None)
    with Session.open(files, placement, Cache(graphs)) as session:
        return [picture.image for picture in session.generate(asked)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_cut_in_two_draws_the_same(
    family: str, checkpoints: Checkpoints, devices: list[Device], graphs: Path
) -> None:
    """To the bit: each number is computed as on one device, only elsewhere."""
    case = Case(family, "safetensors")
    files = checkpoints.files(case)
    first, second = devices
    whole = drawn(files, {"all": first}, graphs, case)
    cut = drawn(files, {"all": first, "diffusion": Chain((second, first)), "te": Chain((first, second))}, graphs, case)
    np.testing.assert_array_equal(cut, whole)


@pytest.fixture(scope="module")
def alone(tiny: Path, devices: list[Device], graphs: Path) -> list[np.ndarray]:
    """Two pictures, drawn on one device."""
    with Session.open(tiny, devices[0], Cache(graphs)) as session:
        return [picture.image for picture in session.generate(REQUEST)]


def test_the_rest_of_a_chain_waits_for_a_server_that_is_lost(
    alone: list[np.ndarray], tiny: Path, devices: list[Device], graphs: Path
) -> None:
    """In the second of two pictures, at its first step: the same pictures, and only what was lost is sent again."""
    events: list[Event] = []
    with Restartable("--precision", "exact", "--device", "CPU") as server:
        (other,) = connect([f"127.0.0.1:{server.port}"])

        def tell(event: Event) -> None:
            events.append(event)
            if event.stage == "sample" and (event.picture, event.done) == (2, 1):
                server.kill()
                server.start()

        chain = Chain((devices[0], other))
        with Session.open(tiny, {"diffusion": chain, "all": devices[0]}, Cache(graphs)) as session:
            pictures = [picture.image for picture in session.generate(REQUEST, tell)]
        other.close()
    np.testing.assert_array_equal(pictures, alone)
    back = next(at for at, event in enumerate(events) if event.stage == "reconnected")
    assert (events[back].component, events[back].device) == ("diffusion", chain.name)
    sent = [(event.component, event.device) for event in events[back:] if event.stage == "upload" and event.over]
    assert sent == [("diffusion", other.name)]


def test_pictures_side_by_side(alone: list[np.ndarray], tiny: Path, devices: list[Device], graphs: Path) -> None:
    """Each of two devices draws one of two pictures, to the bit as one device draws both; both are told of."""
    events: list[Event] = []
    everywhere = Lanes(tuple(Chain((device,)) for device in devices))
    with Session.open(tiny, everywhere, Cache(graphs)) as session:
        pictures = list(session.generate(REQUEST, events.append))
    np.testing.assert_array_equal([picture.image for picture in pictures], alone)
    assert [picture.seed for picture in pictures] == [42, 43]
    uploads = sorted(event.component for event in events if event.stage == "upload" and event.over)
    assert uploads == ["clip_l", "diffusion", "diffusion", "vae", "vae"]
    steps = {(event.picture, event.done) for event in events if event.stage == "sample"}
    assert steps == {(picture, done) for picture in (1, 2) for done in (0, 1, 2)}


@pytest.mark.parametrize("room", ["for all", "for one component at a time"])
def test_more_pictures_than_devices(
    room: str, alone: list[np.ndarray], tiny: Path, devices: list[Device], here: Device, graphs: Path
) -> None:
    """A device begins the next picture while the last one is decoded, unless one of the two would send away the weights
    of the other."""
    lanes = Lanes(tuple(Chain((device,)) for device in devices))
    limit = None if room == "for all" else {"": size_of("diffusion", tiny), here.name: 1 << 40}
    with Session.open(tiny, {"te": here, "all": lanes}, Cache(graphs), max_vram=limit) as session:
        pictures = list(session.generate(replace(REQUEST, batch_count=6)))
    np.testing.assert_array_equal([picture.image for picture in pictures[:2]], alone)
    assert [picture.seed for picture in pictures] == list(range(42, 48))
    assert len({picture.image.tobytes() for picture in pictures}) == len(pictures)


def test_prompts_side_by_side(alone: list[np.ndarray], tiny: Path, devices: list[Device], graphs: Path) -> None:
    """The negative prompt on one device and the prompt on the other: as a batch of two, but for the order of sums."""
    before = devices[1].sent or 0
    lanes = Lanes(tuple(Chain((device,)) for device in devices))
    with Session.open(tiny, {"diffusion": lanes, "all": devices[0]}, Cache(graphs)) as session:
        (picture,) = session.generate(replace(REQUEST, batch_count=1))
    assert (devices[1].sent or 0) > before
    assert np.abs(picture.image.astype(int) - alone[0]).max() <= 1


def test_cancelling_ends_all_that_is_side_by_side(tiny: Path, devices: list[Device], graphs: Path) -> None:
    steps: list[Event] = []

    def tell(event: Event) -> None:
        if event.stage == "sample" and event.done:
            steps.append(event)

    everywhere = Lanes(tuple(Chain((device,)) for device in devices))
    with Session.open(tiny, everywhere, Cache(graphs)) as session:
        with pytest.raises(Cancelled):
            list(session.generate(replace(REQUEST, steps=50), tell, lambda: bool(steps)))
        assert len(steps) <= 2
        assert len(list(session.generate(replace(REQUEST, steps=1)))) == 2, "the session goes on"


def sd_cli(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*SD_CLI, *map(str, words), "-t", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_sd_cli_says_where_it_was_cut(alone: list[np.ndarray], ports: list[int], tiny: Path, tmp_path: Path) -> None:
    drawing = ["-m", tiny, "-p", REQUEST.prompt, "-n", REQUEST.negative_prompt, "-W", 64, "-H", 64, "--steps", 2]
    servers = ",".join(f"127.0.0.1:{port}" for port in ports)
    place = ("--rpc", servers, "--backend", "all=RPC0,diffusion=RPC1&RPC0")
    done = sd_cli(*drawing, "-v", *place, "-o", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert "clip_l on RPC0, diffusion on RPC1&RPC0, vae on RPC0" in done.stderr
    size = r"[\d.]+ MiB"
    part = rf"\d+ nodes with {size} of weights"
    cut = rf"diffusion is cut: RPC1: {part}, RPC0: {part}; {size} cross in each evaluation"
    assert re.search(cut, done.stderr), done.stderr
    with Image.open(tmp_path / "x.png") as image:
        np.testing.assert_array_equal(np.asarray(image), alone[0])


def size_of(component: str, tiny: Path) -> int:
    return open_model(sdrpc.ModelFiles(tiny))[component].found.nbytes()


def test_two_small_devices_draw_what_is_too_large_for_one(
    alone: list[np.ndarray], tiny: Path, devices: list[Device], here: Device, graphs: Path
) -> None:
    """And no device ever has more weights than it may."""
    limit, parts = size_of("diffusion", tiny) - 1, list[int]()

    def tell(event: Event) -> None:
        if event.stage == "upload" and event.over and event.component == "diffusion":
            parts.append(event.total)

    chain, small = Chain(tuple(devices)), {"RPC0": limit, "RPC1": limit}
    with Session.open(tiny, {"diffusion": chain, "all": here}, Cache(graphs), max_vram=small) as session:
        pictures = [picture.image for picture in session.generate(REQUEST, tell)]
    np.testing.assert_array_equal(pictures, alone)
    assert len(parts) == 2
    assert max(parts) <= limit < sum(parts)


def test_what_is_too_large_is_refused_with_what_would_do(
    tiny: Path, devices: list[Device], here: Device, graphs: Path
) -> None:
    first, second = devices
    placements: list[dict[str, Placed]] = [{"diffusion": first, "vae": second, "te": here}]
    placements.append({"diffusion": Chain((first, second)), "all": here})
    placements.append({"diffusion": [first, second], "te": Chain((first, second)), "vae": first})
    for placement, limits, room, hint in (
        (placements[0], (5, 99, 7), "RPC0: 5 MiB (max_vram)", "RPC1 has room for 99 MiB (backend diffusion=RPC1)"),
        (placements[1], (1, 2, 7), "RPC0&RPC1: 1 MiB (max_vram) + 2 MiB (max_vram)", "CPU has room for 7 MiB (backend"),
        (placements[2], (5, 4, 7), "RPC0 or RPC1: 5 MiB (max_vram) or 4 MiB (max_vram)", "RPC0&RPC1 have room for 5"),
        (placements[0], (2, 1, 0), "CPU: 0 MiB (max_vram)", "use a quantized file"),
    ):
        small = {name: size << 20 for name, size in zip(("RPC0", "RPC1", "CPU"), limits, strict=True)}
        with (
            Session.open(tiny, placement, Cache(graphs), max_vram=small) as session,
            pytest.raises(DoesNotFit, match=re.escape(hint)) as refused,
        ):
            list(session.generate(REQUEST))
        where, sizes = room.split(": ")
        pattern = rf"{re.escape(where)}: \w+ takes [56] MiB, and there is room for {re.escape(sizes)}; "
        assert re.match(pattern, str(refused.value)), refused.value


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_take_turns_where_there_is_little_room(
    place: str, alone: list[np.ndarray], tiny: Path, devices: list[Device], graphs: Path
) -> None:
    """Each evaluation sends the parts of the model one after the other; afterwards nothing is left there."""
    limit, uploads = size_of("diffusion", tiny) * 6 // 10, list[int]()
    released: list[str] = []

    def tell(event: Event) -> None:
        if event.stage == "upload" and event.over and event.component == "diffusion":
            uploads.append(event.total)
        if event.stage == "release":
            released.append(event.component)

    memory = {"max_vram": {"rpc-0": limit}, "params_backend": {"all": place}}
    with Session.open(tiny, {"te": devices[1], "all": devices[0]}, Cache(graphs), **memory) as session:
        pictures = [picture.image for picture in session.generate(REQUEST, tell)]
        assert not any(component.has(devices[0]) for component in session._devices._components)
    np.testing.assert_array_equal(pictures, alone)
    assert max(uploads) <= limit
    assert len(uploads) >= 2 * REQUEST.batch_count * 2, "two parts, for each of two steps of each picture"
    assert set(released) == {"clip_l", "diffusion", "vae"}


def test_sd_cli_finds_a_place_for_everything(
    alone: list[np.ndarray], ports: list[int], tiny: Path, tmp_path: Path
) -> None:
    """Whatever is fastest at the moment: what has room nowhere is cut, and it is drawn as planned."""
    drawing = ["-m", tiny, "-p", REQUEST.prompt, "-n", REQUEST.negative_prompt, "-W", 64, "-H", 64, "--steps", 2]
    servers = ("--rpc", ",".join(f"127.0.0.1:{port}" for port in ports), "--precision", "exact")
    most, rest = size_of("diffusion", tiny) * 7 // 10240, (size_of("clip_l", tiny) + size_of("vae", tiny)) // 1024 + 64
    small = ("--max-vram", f"{most}K,CPU={rest}K", "--backend", "te=CPU,vae=CPU,all=auto")
    done = sd_cli(*drawing, *servers, *small, "-o", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    planned = {
        device: (float(room), parts)
        for device, room, parts in re.findall(r"auto-fit: (\w+), with room for ([\d.]+) MiB: (.*)", done.stderr)
    }
    assert {"RPC0", "RPC1"} <= planned.keys()
    assert all("a part of diffusion" in planned[device][1] for device in ("RPC0", "RPC1"))
    for room, parts in planned.values():
        assert sum(float(size) for size in re.findall(r"\(([\d.]+) MiB\)", parts)) <= room + 0.2, "but for rounding"
    assert re.search(r"clip_l on CPU, diffusion on RPC\d&RPC\d, vae on CPU", done.stderr)
    with Image.open(tmp_path / "x.png") as image:
        np.testing.assert_array_equal(np.asarray(image), alone[0])
