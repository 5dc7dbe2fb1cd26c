"""`make comfyui`: the node pack within ComfyUI itself, with ComfyUI's own networks, loaders and samplers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process import ServerProcess
from tools.comfyui import FOLDER

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="ComfyUI is not there (make comfyui)"),
    pytest.mark.timeout(900),
]

TOLERANCE = 1e-4
"""Relative to the largest number: both sides compute in float32, in other orders, through several steps."""


def test_its_own_networks_compute_on_a_server(tmp_path: Path) -> None:
    with ServerProcess("--precision", "exact", "--device", "CPU") as server:
        program = [sys.executable, "-m", "tests.parity.comfyui", f"127.0.0.1:{server.port}", str(tmp_path)]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert min(found.pop(f"megabytes of {part}") for part in ("diffusion", "clip", "vae")) > 0.1
    assert found.pop("what the lora changes") > 100 * TOLERANCE
    assert {name: difference for name, difference in found.items() if not difference < TOLERANCE} == {}
    assert found.keys() == {"diffusion", "lora", "without the lora", "clip", "vae"}
