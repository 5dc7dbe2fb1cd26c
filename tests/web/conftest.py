"""sd-server as a process, with the model that ships and a tiny one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.upscaler import esrgan, save
from tests.web.process import WebServer


@pytest.fixture(scope="session")
def models(maker: ModuleType, tiny_weights: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SD 1.x model, a file that is none, and one of a component."""
    folder = tmp_path_factory.mktemp("models")
    maker.write_safetensors(folder / "tiny.safetensors", tiny_weights)
    (folder / "broken.safetensors").write_bytes(b"<!doctype html>")
    return folder


@pytest.fixture(scope="session")
def upscalers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that doubles pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp("upscalers")
    save(esrgan(), folder / "tiny-esrgan.safetensors")
    (folder / "broken.pth").write_bytes(b"<!doctype html>")
    return folder


@pytest.fixture(scope="session")
def server(models: Path, upscalers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """A server that lets everybody in."""
    folders = ("--models-dir", str(models), "--hires-upscalers-dir", str(upscalers))
    with WebServer(tmp_path_factory.mktemp("data"), *folders) as process:
        yield process
