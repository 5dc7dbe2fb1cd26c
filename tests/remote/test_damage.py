"""What happens on the way where a key protects the connection, to a single bit, too: the picture is the same. (All
faults at all phases, also without a key: ``make faults``.)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdrpc.client import Timeouts
from tests.faults.matrix import Row, Setting

IMPATIENT = Timeouts(silent=4.0)
"""A server that says nothing is given up soon, so that a test need not wait for it: after two of its beats."""

ROWS = [
    Row(fault, phase, key=True)
    for fault, phases in {
        "cut": ("uploading a text encoder", "encoding", "a later step", "reading a picture"),
        "flip": (
            "uploading the diffusion model", "encoding", "reading a text", "a later step", "reading a later prediction",
            "reading a picture",
        ),
        "stall": ("uploading the VAE", "reading a prediction", "decoding"),
        "kill": ("a later step",),
        "sleep": ("encoding",),
    }.items()
    for phase in phases
]  # fmt: skip


@pytest.fixture(scope="module")
def setting(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with Setting(tiny, tmp_path_factory.mktemp("keys"), key=True, sleep=3.0, timeouts=IMPATIENT) as setting:
        yield setting


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_picture_is_the_same(row: Row, setting: Setting) -> None:
    assert setting.goes_wrong(row) == ""
