"""docs/security.md says which test defends what: those tests exist, and no case of the list is left out."""

from __future__ import annotations

import re

import pytest

from tests.support.named import ROOT, exists, named

TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
CASES = 65


@pytest.mark.parametrize("name", named(TEXT))
def test_a_test_that_is_named_exists(name: str) -> None:
    assert exists(name)


def test_every_case_is_spoken_of() -> None:
    spoken = set()
    for first, last in re.findall(r"\bT(\d+)(?: … T(\d+))?", TEXT):
        spoken |= set(range(int(first), int(last or first) + 1))
    assert set(range(1, CASES + 1)) <= spoken
    assert len(named(TEXT)) > 40
