"""The wire does no IO, and needs numpy at most."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdrpc.wire

FILES = sorted(Path(sdrpc.wire.__file__).parent.glob("*.py"))
MAY_IMPORT = {
    "__future__", "collections", "dataclasses", "enum", "functools", "ipaddress", "json", "numpy", "re", "struct",
    "typing",
}  # fmt: skip
"""Nothing that reads or writes anything."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_no_io(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module or "")
    assert {module.split(".")[0] for module in imported} <= MAY_IMPORT


def test_loads_no_torch_and_no_event_loop() -> None:
    modules = ", ".join(f"sdrpc.wire.{path.stem}" for path in FILES if path.stem != "__init__")
    script = f"import sys, {modules}; print(*sorted({{'torch', 'asyncio', 'ssl', 'diffusers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
