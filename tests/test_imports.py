"""Imports point one way, and what must start fast loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "sdrpc"

MAY_IMPORT = {
    "errors": set(),
    "text": set(),
    "attempts": set(),
    "storage": {"errors"},
    "models": set(),
    "ggml": {"errors"},
    "device": {"errors", "ggml"},
    "content": {"device"},
    "sockets": {"errors"},
    "fair_queue": set(),
    "grouping": set(),
    "targets": {"device", "errors", "ggml"},
    "key": {"errors"},
    "wire": {"errors", "text", "key", "ggml", "device", "grouping"},
    "engine": {"errors", "storage", "ggml", "device", "targets", "fair_queue"},
    "client": {
        "errors",
        "key",
        "text",
        "storage",
        "ggml",
        "device",
        "content",
        "sockets",
        "targets",
        "grouping",
        "wire",
    },
    "server": {
        "attempts",
        "errors",
        "key",
        "text",
        "storage",
        "ggml",
        "device",
        "content",
        "sockets",
        "targets",
        "fair_queue",
        "grouping",
        "wire",
    },
    "checkpoints": {"errors", "ggml"},
    "prompts": {"errors"},
    "families": {"errors", "ggml", "device", "checkpoints", "lowering", "prompts", "runtime"},
    "diffusion": {
        "errors",
        "models",
        "ggml",
        "device",
        "device_names",
        "checkpoints",
        "families",
        "lowering",
        "prompts",
        "runtime",
    },
    "web": {"attempts", "errors", "storage", "device", "device_names", "diffusion", "families", "runtime"},
    "cluster": {"errors", "models", "device", "client", "diffusion", "families", "runtime", "web"},
    "device_names": {"errors"},
    "runtime": {"errors", "storage", "ggml", "device", "checkpoints"},
    "lowering": {"errors", "ggml", "device", "targets", "runtime"},
}
"""Layer → what it may import besides itself; ``cli`` and the package's own front may import everything."""

HEAVY = ("torch", "diffusers", "transformers")


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_layers(path: Path) -> set[str]:
    """The layers of sdrpc that the file imports, at the top or inside functions."""
    package = ["sdrpc", *path.relative_to(SOURCE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            modules = [".".join([*base, *([node.module] if node.module else [])])]
            if modules[0] == "sdrpc":
                modules = [f"sdrpc.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        else:
            continue
        found |= {layer_of(module) for module in modules if module.split(".")[0] == "sdrpc"}
    return found - {"", "__version__"}


MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__main__.py"]
"""All files but programs' entries, which stand above every layer."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    layer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if layer in MAY_IMPORT:
        assert imported_layers(path) <= MAY_IMPORT[layer] | {layer}


def loaded_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after ``code``."""
    show = "import sys; print(*{name.split('.')[0] for name in sys.modules}, sep='\\n')"
    output = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], check=True, capture_output=True, text=True)
    return set(output.stdout.split())


@pytest.mark.parametrize("module", ["sdrpc", "sdrpc.errors", "sdrpc.device", "sdrpc.models", "sdrpc.targets"])
def test_the_front_loads_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import {module}") & {*HEAVY, "rich", "typer"}


@pytest.mark.parametrize("package", ["ggml", "wire"])
def test_graphs_and_messages_are_plain_values(package: str) -> None:
    modules = [
        ".".join(("sdrpc", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in (SOURCE / package).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert not loaded_by(f"import {', '.join(modules)}") & {*HEAVY, "asyncio", "_socket", "socket", "gguf"}
