"""docs/security.md says which test defends what: those tests exist, and no case of the list is left out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", TEXT)))
CASES = 65


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_is_named_exists(name: str) -> None:
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert not function or any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def test_every_case_is_spoken_of() -> None:
    spoken = set()
    for first, last in re.findall(r"\bT(\d+)(?: … T(\d+))?", TEXT):
        spoken |= set(range(int(first), int(last or first) + 1))
    assert set(range(1, CASES + 1)) <= spoken
    assert len(NAMED) > 40
