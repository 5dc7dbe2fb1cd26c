"""`make parity`: sd-cli through an rpc-server draws what stable-diffusion.cpp drew of SDXL and FLUX.1, and of pictures.

The checkpoints take 13 GB of ``$SDRPC_DEV_CACHE``, the largest 7 GB of memory.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.parity.families import REFERENCES, Reference
from tests.support.process import ServerProcess
from tests.support.references.draw import psnr

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]

LEAST = 40.0
"""dB to the reference, which stable-diffusion.cpp drew with activations rounded to float16."""

OPTIONS = {"diffusion": "--diffusion-model"}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """An rpc-server that computes exactly."""
    with ServerProcess("--device", "CPU", "--precision", "exact", "--threads", str(os.cpu_count() or 1)) as process:
        yield process


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
def test_the_same_picture(reference: Reference, server: ServerProcess, tmp_path: Path) -> None:
    command: list[str | Path] = [
        Path(sysconfig.get_path("scripts")) / "sd-cli", "--rpc", f"127.0.0.1:{server.port}",
        *reference.arguments(), "-o", tmp_path / "picture.png",
    ]  # fmt: skip
    for name, path in reference.model.files().items():
        command += [OPTIONS.get(name, f"--{name}"), path]
    subprocess.run(command, check=True)
    with Image.open(tmp_path / "picture.png") as ours, Image.open(reference.picture) as theirs:
        found = psnr(np.asarray(ours), np.asarray(theirs.convert("RGB")))
    print(f"{reference.name}: {found:.1f} dB")
    assert found >= LEAST
