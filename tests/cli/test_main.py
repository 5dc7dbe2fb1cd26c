"""The command that holds the others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sdrpc import __version__
from sdrpc.cli import report


def test_a_full_disk_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise OSError(28, "No space left on device", "cat.png")

    assert report.guarded(command) == report.FAILURE
    assert capfd.readouterr().err == "error: cat.png: No space left on device\n"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ((), 0, "sd-cli"),
        (("--version",), 0, __version__),
        (("sd-cli", "--version"), 0, f"sd-cli {__version__}"),
        (("rpc-server", "--version"), 0, f"rpc-server {__version__}"),
        (("paint",), 2, "paint: there is no such command"),
    ],
)
def test_commands_by_name(arguments: tuple[str, ...], status: int, says: str) -> None:
    done = subprocess.run([sys.executable, "-m", "sdrpc", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert says in done.stdout + done.stderr
