"""Graphs of offloaded modules that are found on disk, by another process too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sdrpc
from tests.lowering import models
from tests.lowering.devices import ReferenceDevice
from tests.lowering.offloading import Writing

SECOND = """
import sys, torch, sdrpc
from pathlib import Path
from sdrpc.lowering import capture, remote_module
from tests.lowering import models
from tests.lowering.devices import ReferenceDevice
from tests.lowering.offloading import Writing
def refused(*_): raise AssertionError("captured again")
remote_module.capture = refused
unet = models.unet((8, 16))
inputs = torch.load(sys.argv[1])
def told():
    try:
        with torch.no_grad():
            result = sdrpc.offload(unet, ReferenceDevice())(*inputs)
            print(type(result).__name__, float((result.sample - unet(*inputs).sample).abs().max()) < 1e-4)
    except AssertionError as error:
        print(error)
told()
notes = list(Path(sys.argv[2]).rglob("*.json"))
assert notes
kept = [note.read_bytes() for note in notes]
for note in notes:
    note.write_text('{"known": [], "result": ["object", {"module": "os", "name": "system"}, false, [], []]}')
told()
for note, was in zip(notes, kept):
    note.write_bytes(was)
told()
unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
told()
"""


@torch.no_grad()
def test_another_process_finds_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where what is kept beside the graph names something else, nor where the module computes something else."""
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path / "cache"))
    inputs = (torch.randn(1, 4, 4, 4), torch.tensor(3), torch.randn(1, 2, 24))
    sdrpc.offload(models.unet((8, 16)), ReferenceDevice())(*inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", SECOND, str(tmp_path / "inputs.pt"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    found = "UNet2DConditionOutput True"
    assert done.stdout.splitlines() == [found, "captured again", found, "captured again"], done.stderr


@torch.no_grad()
def test_code_without_a_version_is_not_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRPC_CACHE", str(tmp_path))
    unet = models.unet((8, 16))
    unet.mid_block.register_forward_hook(lambda _, __, y: y * 2)
    inputs = (torch.randn(1, 4, 4, 4), torch.tensor(3), torch.randn(1, 2, 24))
    sdrpc.offload(unet, ReferenceDevice())(*inputs)
    sdrpc.offload(Writing(), ReferenceDevice())(torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []
