"""`make parity`: sd-cli through an rpc-server draws the pictures that stable-diffusion.cpp's sd-cli drew.

The pictures in tests/data/reference were drawn by the real sd-cli (commit 97d2990, on a CPU, F16 weights) from the
checkpoint with random weights that tools/make_checkpoint.py writes. It is 2.1 GB and kept in ``$SDRPC_DEV_CACHE``.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.parity.families import SD15
from tests.support.process import ServerProcess
from tests.support.references.draw import psnr

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / "tests" / "data" / "reference"
SHA256 = "07c0ce3d4522014f76ab1cd82709d616d858b434dd98de4265d4b1ba5c6309e3"


class Reference(NamedTuple):
    """A picture of the real sd-cli: its file, the options that it was drawn with, and the least PSNR in dB that ours
    has to it in exact and in fast precision."""

    name: str
    options: str
    exact: float = 45.0
    fast: float = 28.0


CAT = "-p 'a lovely cat' -W 128 -H 128 -s 42"

REFERENCES = (
    Reference("euler-discrete-cuda", f"{CAT} --steps 6 --cfg-scale 7 --sampling-method euler --scheduler discrete"),
    Reference(
        "euler-discrete-cpu", f"{CAT} --steps 6 --cfg-scale 7 --sampling-method euler --scheduler discrete --rng cpu"
    ),
    # Weights on words end with scaling the text back to its mean. Behind a layer norm whose weights are all 1, as in
    # this checkpoint, the mean is 0 but for rounding (6e-9), so the native factor is the quotient of two rounding
    # errors: 1.03 where the reference was drawn, something else on every machine. Ours is 1 there: 41.9 dB. With 1.03
    # put in, the picture is at 57 dB as well.
    Reference(
        "euler-karras-cuda",
        "-p 'a (lovely:1.3) cat' -n blurry -W 128 -H 192 -s 7 --steps 6 --cfg-scale 5 --sampling-method euler "
        "--scheduler karras",
        exact=40.0,
    ),
    Reference("euler_a-discrete-cuda", f"{CAT} --steps 6 --cfg-scale 7 --sampling-method euler_a --scheduler discrete"),
    Reference("dpmpp2m-karras-cuda", f"{CAT} --steps 6 --cfg-scale 7 --sampling-method dpm++2m --scheduler karras"),
    Reference("heun-discrete-cuda", f"{CAT} --steps 4 --cfg-scale 7 --sampling-method heun --scheduler discrete"),
    Reference("lcm-discrete-cuda", f"{CAT} --steps 4 --cfg-scale 1 --sampling-method lcm --scheduler discrete"),
    Reference(
        "euler-discrete-cuda-clipskip2",
        f"{CAT} --steps 6 --cfg-scale 7 --sampling-method euler --scheduler discrete --clip-skip 2",
    ),
)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    """The checkpoint that the pictures were drawn from, made once."""
    path = SD15.files()["model"]
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    assert digest.hexdigest() == SHA256, f"{path} has other weights: torch's random numbers changed; delete it"
    return path


@pytest.fixture(scope="module", params=["exact", "fast"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, ServerProcess]]:
    """A precision, and an rpc-server that computes in it."""
    threads = str(os.cpu_count() or 1)
    with ServerProcess("--device", "CPU", "--precision", request.param, "--threads", threads) as process:
        yield request.param, process


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
def test_the_same_picture(
    reference: Reference, server: tuple[str, ServerProcess], checkpoint: Path, tmp_path: Path
) -> None:
    precision, process = server
    command = [
        Path(sysconfig.get_path("scripts")) / "sd-cli", "--rpc", f"127.0.0.1:{process.port}", "-m", checkpoint,
        *shlex.split(reference.options), "-o", tmp_path / "picture.png",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    with Image.open(tmp_path / "picture.png") as ours, Image.open(PICTURES / f"{reference.name}.png") as theirs:
        found = psnr(np.asarray(ours), np.asarray(theirs))
    print(f"{reference.name}, {precision}: {found:.1f} dB")
    assert found >= getattr(reference, precision)
