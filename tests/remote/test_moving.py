"""Parts move to another server when theirs is lost; batches, offloaded modules and sd-cli go on as well."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdrpc
from sdrpc.cli.devices import placed_devices
from sdrpc.client import Keychain, Timeouts, connect
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.errors import ConnectionFailed, ConnectionLost, DeviceGone, KeyNeeded
from sdrpc.runtime.cache import Cache
from tests.support.process import ServerProcess
from tests.support.trouble import Passage, Restartable, Trouble

REQUEST = Request("a cat", width=64, height=64, steps=2, sampling_method="euler_a", batch_count=2)
SD_CLI = (sys.executable, "-m", "sdrpc", "sd-cli")


@pytest.fixture(scope="module")
def server() -> Iterator[Restartable]:
    with Restartable("--precision", "exact") as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: Restartable, tiny: Path, graphs: Path) -> list[np.ndarray]:
    (device,) = connect([f"127.0.0.1:{server.port}"])
    with closing(device), Session.open(tiny, device, Cache(graphs)) as session:
        return [picture.image for picture in session.generate(REQUEST)]


def test_another_server_takes_over(
    server: Restartable, undisturbed: list[np.ndarray], tiny: Path, graphs: Path
) -> None:
    """In the second of two pictures: the first one is kept, and the second is the same."""
    events: list[Event] = []
    with ServerProcess("--precision", "exact") as other:
        devices = connect([f"127.0.0.1:{other.port}", f"127.0.0.1:{server.port}"])
        placement = {"te": devices[1], "all": [devices[0], devices[1]]}

        def tell(event: Event) -> None:
            events.append(event)
            if event.stage == "sample" and (event.picture, event.done) == (2, 1):
                other.process.kill()

        with Session.open(tiny, placement, Cache(graphs)) as session:
            pictures = [picture.image for picture in session.generate(REQUEST, tell)]
        for device in devices:
            device.close()
    np.testing.assert_array_equal(pictures, undisturbed)
    moved = [(event.component, event.device) for event in events if event.stage == "moved"]
    assert moved == [("diffusion", "RPC1"), ("vae", "RPC1")]
    steps = [(event.picture, event.done) for event in events if event.stage == "sample"]
    assert steps == [(picture, done) for picture in (1, 2) for done in range(REQUEST.steps + 1)]


def test_a_server_that_does_not_come_back(tiny: Path, graphs: Path) -> None:
    """Is an error that says so; what was drawn before is there."""
    events: list[Event] = []
    with ServerProcess("--precision", "exact") as server:
        (device,) = connect([f"127.0.0.1:{server.port}"])
        with closing(device), Session.open(tiny, device, Cache(graphs), retry=1.5) as session:
            pictures = session.generate(REQUEST, events.append)
            next(pictures)
            server.process.kill()
            with pytest.raises(DeviceGone, match=r"RPC0 was lost \(.*\) and did not come back within 1.5 s: .*nobody"):
                next(pictures)
    waiting = [event for event in events if event.stage == "waiting"]
    assert {(event.device, event.component) for event in waiting} == {("RPC0", "diffusion")}
    assert all(event.reason and event.seconds <= 1.5 for event in waiting)


class Doubling(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(64) * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_an_offloaded_module_finds_its_server_again(server: Restartable) -> None:
    """Between two calls, and in the middle of one. Weights go there again."""
    module, x = Doubling(), torch.arange(64.0)[None]

    def cut(passage: Passage) -> None:
        passage.cut()

    with Trouble(server.port) as trouble:
        (device,) = connect([trouble.endpoint], Timeouts())
        remote = sdrpc.offload(module, device)
        with closing(device):
            torch.testing.assert_close(remote(x), x * 2, rtol=0, atol=0)
            trouble._open[-1].cut()
            torch.testing.assert_close(remote(x + 1), (x + 1) * 2, rtol=0, atol=0)
            trouble.at, trouble.happens = len(trouble.requests) + 1, cut
            torch.testing.assert_close(remote(x + 2), (x + 2) * 2, rtol=0, atol=0)
            assert trouble.connections == 3
            impatient = sdrpc.offload(module, device, retry=0)
            impatient(x)
            trouble._open[-1].cut()
            with pytest.raises(ConnectionLost):
                impatient(x + 3)
            torch.testing.assert_close(remote(x), x * 2, rtol=0, atol=0)
            for each in (remote, impatient):
                each.close()  # type: ignore[operator]


def sd_cli(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*SD_CLI, *map(str, words), "-t", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_sd_cli_says_what_happens_and_goes_on(
    server: Restartable, undisturbed: list[np.ndarray], tiny: Path, tmp_path: Path
) -> None:
    drawing = ["-m", tiny, "-p", REQUEST.prompt, "-W", 64, "-H", 64, "--steps", REQUEST.steps, "-b", 2]
    drawing += ["--sampling-method", REQUEST.sampling_method, "-o", tmp_path / "%d.png"]
    started: list[threading.Thread] = []

    def kill(_: Passage) -> None:
        server.kill()
        started.append(threading.Thread(target=server.start))
        started[0].start()

    with Trouble(server.port, 420, kill) as trouble:
        done = sd_cli("--rpc", trouble.endpoint, *drawing)
    assert done.returncode == 0, done.stderr
    started[0].join()
    for number, picture in enumerate(undisturbed):
        np.testing.assert_array_equal(pixels(tmp_path / f"{number}.png"), picture)
    lines = [line for line in done.stderr.splitlines() if "waiting for" in line or "there again" in line]
    assert len(lines) == 2, done.stderr
    assert re.fullmatch(rf"\w+: waiting for RPC0: {trouble.endpoint}: .*", lines[0])
    assert re.fullmatch(r"\w+: RPC0 is there again after [\d.]+ s, going on", lines[1])


@pytest.fixture
def nobody() -> Iterator[str]:
    """An endpoint at which nobody listens, nor will."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def test_a_server_that_is_not_there_at_the_start(
    server: Restartable, nobody: str, undisturbed: list[np.ndarray], tiny: Path, tmp_path: Path
) -> None:
    """Keeps its number; who has another device goes on with that."""
    drawing = ["-m", tiny, "-p", REQUEST.prompt, "-W", 64, "-H", 64, "--steps", REQUEST.steps]
    drawing += ["--sampling-method", REQUEST.sampling_method, "-o", tmp_path / "x.png"]
    servers = ["--rpc", f"{nobody},127.0.0.1:{server.port}", "--backend", "diffusion=RPC0,RPC1"]
    done = sd_cli(*servers, *drawing)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), undisturbed[0])
    refused = re.escape(
        f"warning: RPC0 is not there, others do the work: {nobody}: nobody answers (Connection refused)"
    )
    assert re.search(rf"^{refused}", done.stderr, re.MULTILINE), done.stderr
    assert re.search(r"diffusion on RPC1, ", done.stderr)


@pytest.mark.parametrize("names", [("RPC0",), ("auto",)])
def test_a_component_for_which_no_device_is_there(names: tuple[str, ...], nobody: str) -> None:
    with (
        pytest.raises(ConnectionFailed, match=f"{nobody}: nobody answers"),
        placed_devices({"diffusion": names}, [nobody], "exact", 1),
    ):
        pass


def test_a_server_that_wants_a_key_is_not_passed_over(server: Restartable, tmp_path: Path) -> None:
    """Somebody has to give one, or take the server off the list."""
    with ServerProcess("--require-key", "-d", "CPU") as locked:
        rpc = [f"127.0.0.1:{port}" for port in (locked.port, server.port)]
        choice = {"diffusion": ("RPC0", "RPC1")}
        with (
            pytest.raises(KeyNeeded),
            placed_devices(choice, rpc, "exact", 1, keychain=Keychain([], tmp_path / "none")),
        ):
            pass


def test_sd_cli_need_not_wait(server: Restartable, tiny: Path, tmp_path: Path) -> None:
    drawing = ["-m", tiny, "-p", "x", "-W", 64, "-H", 64, "--steps", 2, "-o", tmp_path / "x.png", "--rpc-retry", 0]
    with Trouble(server.port, 420, Passage.cut) as trouble:
        done = sd_cli("--rpc", trouble.endpoint, *drawing)
    assert done.returncode == 1
    assert re.search(rf"^error: {trouble.endpoint}: the server hung up while .*$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
