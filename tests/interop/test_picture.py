"""sd-cli draws through ggml's own RPC server what it draws here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.interop.conftest import NativeServer
from tests.support.process import ServerProcess
from tests.support.trouble import Passage, Trouble

pytestmark = pytest.mark.interop

ROOT = Path(__file__).parents[2]
SD_CLI = (sys.executable, "-c", "from sdrpc.cli.sd_cli import main; main()")
PICTURE = ("-p", "a lovely cat", "-W", "64", "-H", "64", "--steps", "3", "-s", "5", "--precision", "exact")
PSNR = 40.0
"""dB between pictures of the same seed: what users are promised of exact arithmetic."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoint, the pictures and the captured graphs of this module are."""
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    path = folder / "tiny.safetensors"
    command = [sys.executable, "tools/make_checkpoint.py", "--size", "tiny", "--type", "f32", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    return path


def sd_cli(checkpoint: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SDRPC_CACHE": str(checkpoint.parent / "graphs")}
    command = [*SD_CLI, "-m", str(checkpoint), *PICTURE, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def draw(checkpoint: Path, name: str, *options: str) -> np.ndarray:
    path = checkpoint.parent / f"{name}.png"
    ended = sd_cli(checkpoint, "-o", str(path), *options)
    assert ended.returncode == 0, ended.stderr
    with Image.open(path) as image:
        return np.asarray(image, np.float64)


@pytest.fixture(scope="module")
def drawn_here(checkpoint: Path) -> np.ndarray:
    return draw(checkpoint, "here", "--backend", "CPU")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a - b) ** 2), 1e-9)))


def test_all_parts_on_a_native_server(
    checkpoint: Path, drawn_here: np.ndarray, shared_native_server: NativeServer
) -> None:
    where = ("--rpc", shared_native_server.endpoint, "--backend")
    drawn = draw(checkpoint, "native", *where, "te=RPC0,diffusion=RPC1,vae=RPC0")
    assert psnr(drawn, drawn_here) >= PSNR
    cut = draw(checkpoint, "cut", *where, "te=RPC0,diffusion=RPC1&RPC0,vae=RPC0")
    np.testing.assert_array_equal(cut, drawn, "its layers on two devices are the same numbers")


def test_parts_on_a_native_server_and_on_ours(
    checkpoint: Path, drawn_here: np.ndarray, shared_native_server: NativeServer
) -> None:
    with ServerProcess("--device", "CPU", "--precision", "exact") as ours:
        both = f"{shared_native_server.endpoint},127.0.0.1:{ours.port}"
        drawn = draw(checkpoint, "both", "--rpc", both, "--backend", "te=RPC1,diffusion=RPC2,vae=RPC0")
    assert psnr(drawn, drawn_here) >= PSNR


def test_a_native_server_that_dies_and_is_started_again(checkpoint: Path, native_server: NativeServer) -> None:
    """In the middle of a run: the picture is the same, to the bit."""
    port = int(native_server.endpoint.rpartition(":")[2])

    def die(_: Passage) -> None:
        native_server.kill()
        native_server.start()

    with Trouble(port) as trouble:
        undisturbed = draw(checkpoint, "undisturbed", "--rpc", trouble.endpoint)
        runs = [i for i, name in enumerate(trouble.requests) if name.startswith("GRAPH")]
    with Trouble(port, runs[-3], die) as trouble:
        np.testing.assert_array_equal(draw(checkpoint, "disturbed", "--rpc", trouble.endpoint), undisturbed)
        assert trouble.connections > 1


def test_native_devices_are_listed(checkpoint: Path, shared_native_server: NativeServer) -> None:
    ended = sd_cli(checkpoint, "--rpc", shared_native_server.endpoint, "--list-devices")
    assert ended.returncode == 0, ended.stderr
    rows = [line for line in ended.stdout.splitlines() if "RPC" in line]
    assert [row.split()[0] for row in rows if row.split()[0] in ("RPC0", "RPC1")] == ["RPC0", "RPC1"]
    assert shared_native_server.endpoint in ended.stdout


def test_a_native_server_that_is_gone(checkpoint: Path, native_server: NativeServer) -> None:
    native_server.kill()
    ended = sd_cli(checkpoint, "--rpc", native_server.endpoint, "--backend", "RPC0", "-o", "none.png")
    assert ended.returncode == 1
    assert native_server.endpoint in ended.stderr
    assert "Traceback" not in ended.stderr
