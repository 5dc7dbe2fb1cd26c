"""What holds for every test (few threads, the same examples each time), and small checkpoints."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent

torch.set_num_threads(1)  # the suite runs in parallel processes on a small machine
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it, and so would servers

settings.register_profile(
    "sdrpc",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sdrpc")


@pytest.fixture(autouse=True)
def the_same_numbers(request: pytest.FixtureRequest) -> None:
    """Torch's random numbers are those of the test's name: one that fails does so again, alone as well."""
    torch.manual_seed(crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of lowered graphs that all processes of this run share, because a capture takes seconds."""
    here = tmp_path_factory.getbasetemp()
    folder = (here.parent if hasattr(request.config, "workerinput") else here) / "graphs"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_cache_from_outside(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands and offloaded modules find graphs of this run only, and nothing else that was kept."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "graphs").symlink_to(graphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDRPC_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    """tools/make_checkpoint.py as a module."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", TESTS.parent / "tools" / "make_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_weights(maker: ModuleType) -> dict[str, Any]:
    """A tiny SD 1.x checkpoint: original names → torch tensors, F16."""
    return maker.tensors("tiny")


@pytest.fixture(scope="session")
def tiny(maker: ModuleType, tiny_weights: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a .safetensors file."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    maker.write_safetensors(path, tiny_weights)
    return path


@pytest.fixture(scope="session")
def sdcpp() -> dict[str, Any]:
    """What stable-diffusion.cpp computes, from its own sources."""
    return json.loads((TESTS / "data" / "sdcpp.json").read_text(encoding="utf-8"))
