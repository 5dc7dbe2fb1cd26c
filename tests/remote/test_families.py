"""Every family from every form of file, through real rpc-servers with its components on two of them, is the picture of
diffusers' own pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import sdrpc
from sdrpc.device import Device
from tests.support.pictures import (
    BOUNDS,
    CASES,
    FAMILIES,
    FORMAT_CASES,
    FORMS,
    NUMBERS,
    Case,
    Checkpoints,
    distance,
)  # fmt: skip
from tests.support.process import ServerProcess

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' scheduler with numpy 2


@pytest.fixture(scope="module")
def devices() -> Iterator[dict[str, list[Device]]]:
    """By precision, the devices of two servers."""
    with ExitStack() as stack:
        found: dict[str, list[Device]] = {}
        for precision in ("exact", "fast"):
            servers = [stack.enter_context(ServerProcess("--precision", precision, "--device", "CPU")) for _ in "ab"]
            opened = sdrpc.devices(rpc=[f"127.0.0.1:{server.port}" for server in servers])
            for device in opened.values():
                stack.callback(device.close)
            found[precision] = [opened["RPC0"], opened["RPC1"]]
        yield found


def test_the_page_has_every_case() -> None:
    """docs/families.md is what was measured of these cases."""
    lines = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[:3] for line in lines if line.startswith("| ") and line.count(" | ") > 3]
    wanted = [[f"| {FAMILIES[case.family]}", FORMS[case.form], case.type] for case in CASES]
    numbers = [[f"| {NUMBERS[case.type][0]}", FAMILIES[case.family], FORMS[case.form]] for case in FORMAT_CASES]
    assert [row for row in rows if row[1] not in ("form", "family")] == wanted + numbers


@pytest.mark.parametrize("case", [*CASES, *FORMAT_CASES], ids=str)
def test_a_picture_is_that_of_diffusers(
    case: Case, checkpoints: Checkpoints, devices: dict[str, list[Device]], graphs: Path
) -> None:
    """Narrow arithmetic does not depend on the form of the file that numbers come from."""
    for precision in ("exact", "fast") if checkpoints.first(case) == case else ("exact",):
        assert distance(checkpoints, case, devices[precision], graphs) >= BOUNDS[precision], precision
