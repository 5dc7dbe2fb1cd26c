"""The suite several times in a row: what is told of rounds that pass and of those that fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import steady

TESTS = """
from pathlib import Path
def test_that_fails_once():
    first = Path(__file__).with_name("first")
    assert first.exists() or first.touch()
def test_that_passes():
    pass
"""


def test_a_test_that_fails_in_one_round_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_two.py").write_text(TESTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steady, "SUITE", (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."))
    assert steady.main(["2", "--tb=line"]) == 1
    first, *said = capsys.readouterr().out.splitlines()
    assert first.startswith("round 1 of 2, ")
    assert "1 failed, 1 passed" in first
    failed = "test_two.py::test_that_fails_once"
    assert said[:2] == [f"    {failed}", f"    in {steady.PRINTED / 'round-1.txt'}"]
    assert said[3:] == [f"1 of 2: {failed}", "1 of 2 rounds passed"]
    assert failed in (tmp_path / steady.PRINTED / "round-1.txt").read_text()
