"""The list of devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdrpc.engine import devices, system
from tests.support.process import ServerProcess

WITHOUT_TORCH = """
import sys
from sdrpc.engine import system
system.accelerator_possible = lambda: False
sys.modules["torch"] = None
from sdrpc.cli.entry import sd_cli
sd_cli()
"""


def test_a_machine_without_accelerators_lists_devices_without_torch() -> None:
    """Which takes seconds to import."""
    with ServerProcess("-d", "CPU") as server:
        command = [sys.executable, "-c", WITHOUT_TORCH, "--list-devices", "--rpc", f"127.0.0.1:{server.port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split()[0] for line in done.stdout.splitlines()[3:] if line.strip()]
    assert rows == ["CPU", "RPC0"]
    assert system.processor()[:20] in done.stdout


def test_what_is_said_without_torch_is_what_torch_finds() -> None:
    cpu = devices(threads=1)[-1]
    assert (cpu.name, cpu.description, cpu.memory().total) == ("CPU", system.processor(), system.host_memory().total)
    if not system.accelerator_possible():
        assert len(devices(threads=1)) == 1
    cpu.close()


@pytest.mark.parametrize(
    ("platform", "machine", "build", "drivers", "possible"),
    [
        ("linux", "x86_64", "2.13.0+cpu", ["/dev/nvidiactl"], False),
        ("linux", "x86_64", "2.13.0", ["/dev/nvidiactl"], True),
        ("linux", "x86_64", "2.13.0+cu130", ["/dev/dxg"], True),
        ("linux", "x86_64", "2.13.0+rocm7", ["/dev/kfd"], True),
        ("linux", "x86_64", "2.13.0+xpu", ["/dev/dri"], True),
        ("linux", "x86_64", "2.13.0", [], False),
        ("win32", "AMD64", "2.13.0+cu130", [], True),
        ("win32", "AMD64", "2.13.0+cpu", [], False),
        ("darwin", "arm64", "2.13.0", [], True),
        ("darwin", "x86_64", "2.2.2", [], False),
    ],
)
def test_where_torch_may_find_an_accelerator(
    platform: str, machine: str, build: str, drivers: list[str], possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system.sys, "platform", platform)
    monkeypatch.setattr(system.platform, "machine", lambda: machine)
    monkeypatch.setattr(system, "version", lambda _: build)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in drivers)
    assert system.accelerator_possible() is possible
