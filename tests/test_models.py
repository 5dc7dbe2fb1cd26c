"""Models that ship with sdrpc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdrpc import models
from sdrpc.diffusion.loras import find
from sdrpc.errors import InvalidValue
from sdrpc.families.lora import open_lora
from sdrpc.families.model import ModelFiles, open_model

LARGEST = 32 * 10**6


def test_names_stand_for_files() -> None:
    assert models.named("demo") == models.SHIPPED["demo"]
    assert models.named("./demo") == Path("demo")
    assert models.named("other/demo") == Path("other/demo")
    assert models.DEFAULT in models.SHIPPED


@pytest.mark.parametrize("name", models.SHIPPED)
def test_they_are_here_and_small(name: str) -> None:
    path = models.SHIPPED[name]
    assert path.stat().st_size <= LARGEST
    model = open_model(ModelFiles(path))
    assert model.size == (128, 128)
    assert model.unused(weight for part in model.components.values() for weight in part.found.tensors.values()) == {}


@pytest.mark.parametrize("name", models.LORAS)
def test_loras_fit_the_model_that_ships(name: str) -> None:
    path = models.LORAS[name]
    assert path.stat().st_size <= LARGEST // 10
    assert path.stat().st_mode & 0o044 == 0o044, "all users may read it"
    lora = open_lora(path, open_model(ModelFiles(models.SHIPPED[models.DEFAULT])))
    assert not lora.unknown


def test_a_lora_of_the_users_stands_before_one_that_ships(tmp_path: Path) -> None:
    assert find(tmp_path, "outline") == models.LORAS["outline"]
    with pytest.raises(InvalidValue, match=r"no such LoRA.*: there is none; with sdrpc, .* comes outline"):
        find(tmp_path, "outlines")
    mine = tmp_path / "outline.safetensors"
    mine.touch()
    assert find(tmp_path, "outline") == mine
    with pytest.raises(InvalidValue, match=r"no such LoRA.*: there are outline; with sdrpc"):
        find(tmp_path, "outlines")


def test_no_option_at_all_is_help() -> None:
    command = [sys.executable, "-m", "sdrpc", "sd-cli"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "--prompt" in done.stdout + done.stderr
