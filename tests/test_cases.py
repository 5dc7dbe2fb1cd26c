"""docs/cases.md says which tests hold what users tripped over: those tests exist, and no case is left out."""

from __future__ import annotations

import re

import pytest

from tests.support.cases import CASES as OPERATIONS
from tests.support.named import ROOT, exists, named

TEXT = (ROOT / "docs" / "cases.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| case |")
]

REPORTED = {
    "cache-folder-deleted", "ctrl-c-at-start", "devices-str", "endpoint-advice", "f64-weights", "fp8-message",
    "full-disk-and-memory-words", "list-devices-dead-server", "markup-in-paths", "misnamed-safetensors", "no-home",
    "not-utf8-prompt", "numba-cache-read-only", "offload-attention-slicing", "offload-instance-forward",
    "offload-memory-kept", "offload-threads", "offload-to-dtype", "offload-torch-compile", "picture-lost-at-the-end",
    "pointer-files", "prediction-option", "prompt-lora-tag", "server-stops-late", "size-changed-silently",
    "stdout-closed", "stdout-encoding", "wrong-place-in-messages",
}  # fmt: skip
NUMBERED = {f"C{number}" for number in range(1, 19) if number not in (3, 5)} | {f"P{number}" for number in range(1, 10)}
"""C3 and C5 were never given."""


@pytest.mark.parametrize("name", named(TEXT))
def test_a_test_that_is_named_exists(name: str) -> None:
    test, _, case = name.partition("[")
    assert exists(test)
    assert not case or case.removesuffix("]") in OPERATIONS


def test_every_case_has_tests() -> None:
    assert {row[0] for row in ROWS} >= REPORTED | NUMBERED
    for row in ROWS:
        assert len(row) == 4, row[0]
        assert set(re.findall("`(tests/[^`]+)`", row[3])) & set(named(TEXT)), row[0]
