"""A small checkpoint and two real servers for the commands' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sdrpc.cli import report, sd_cli
from tests.support.process import ServerProcess


@pytest.fixture(scope="session")
def checkpoint(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x checkpoint with random weights, F32."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    maker.write_safetensors(path, maker.tensors("tiny", torch.float32))
    return path


@pytest.fixture(scope="session")
def servers() -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two rpc-server processes that compute exactly."""
    with ServerProcess("--precision", "exact") as one, ServerProcess("--precision", "exact") as other:
        yield one, other


class Outcome:
    """What a run of sd-cli gave: exit status, standard output and standard error."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def sd(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """sd-cli in this process."""

    def run(*arguments: object) -> Outcome:
        status = report.guarded(lambda: sd_cli.run([str(word) for word in arguments]), sd_cli.COMMAND.fields)
        return Outcome(status, *capfd.readouterr())

    return run
