"""Tests that pages of the documentation name: ``tests/file.py``, ``tests/file.py::test``, or one case of that."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def named(text: str) -> list[str]:
    """The tests that a page names, each once."""
    return sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+(?:\[[^\]`]+\])?)?)`", text)))


def exists(name: str) -> bool:
    """Whether there is a test, or a file of tests, of this name (without a case)."""
    file, _, function = name.partition("::")
    return (ROOT / file).is_file() and (not function or function in _functions(file))


@cache
def _functions(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
