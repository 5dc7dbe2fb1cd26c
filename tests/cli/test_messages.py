"""What the library says of fields, in the words of the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from sdrpc.cli import report
from sdrpc.cli.sd_cli import COMMAND
from sdrpc.diffusion.request import Request
from sdrpc.errors import DoesNotFit, InvalidValue, Room, SdrpcError, UsageError
from sdrpc.families.model import ModelFiles

SOURCE = Path(__file__).parent.parent.parent / "src" / "sdrpc"
LIBRARY = [
    path
    for folder in ("diffusion", "families", "checkpoints", "prompts", "runtime", "lowering")
    for path in sorted((SOURCE / folder).rglob("*.py"))
]

SESSION = {"lora_dir", "embd_dir", "max_vram", "params_backend", "lora_apply_mode"}
NAMED = {name for name in (*SESSION, *(f.name for f in fields(Request)), *ModelFiles.names()) if "_" in name}
"""Fields that no sentence has by chance."""

HINTS = SOURCE / "diffusion" / "fitting.py"
"""What is said there goes into a DoesNotFit, which knows the fields in it."""


def functions(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Functions of a file by their names, with the texts in them (of formatted ones, the pieces) but the docstrings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            inside = [each for statement in node.body for each in ast.walk(statement)]
            doc = ast.get_docstring(node, clean=False)
            texts = [each.value for each in inside if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            yield node.name, [text for text in texts if text != doc]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_names_a_field_says_so(path: Path) -> None:
    """So that a command line finds it: a field in a sentence stands among the error's names too, and no sentence of the
    library has an option in it."""
    for function, texts in functions(path):
        sentences = [text for text in texts if " " in text.strip()]
        assert not [text for text in sentences if re.search(r"(^|[ (])--[a-z]", text)], function
        said = {name for name in NAMED for text in sentences if re.search(rf"\b{name}\b", text)}
        assert path == HINTS or said <= set(texts), function


def test_every_field_that_is_named_has_an_option() -> None:
    assert not NAMED - COMMAND.fields.keys()
    assert COMMAND.fields["llm"] == "--llm"


SMALL = {"RPC0": [Room(5 << 20, limited=True)], "RPC1&RPC2": [Room(1 << 20), Room(2 << 20, limited=True)]}

SAID: list[tuple[SdrpcError, str]] = [
    (InvalidValue("mask", "8×8", "there is no init_image to mask", "init_image"),
     "--mask 8×8: there is no --init-img to mask"),
    (InvalidValue("loras", "x", "no such LoRA in my/lora_dir (lora_dir)", "lora_dir"),
     "--prompt x: no such LoRA in my/lora_dir (--lora-model-dir)"),
    (InvalidValue("output", "output/mask.png", "a mask"), "--output output/mask.png: a mask"),
    (UsageError("nothing tells: name it (prediction)", "prediction"), "nothing tells: name it (--prediction)"),
    (DoesNotFit({"vae": 9 << 20, "te": 7 << 20}, SMALL, "try params_backend vae=disk, or backend vae=CPU"),
     "RPC0 or RPC1&RPC2: vae takes 9 MiB, te takes 7 MiB, and there is room for 5 MiB (--max-vram) or 1 MiB + "
     "2 MiB (--max-vram); try --params-backend vae=disk, or --backend vae=CPU"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "said"), SAID, ids=[type(error).__name__ for error, _ in SAID])
def test_fields_are_said_as_options(error: SdrpcError, said: str) -> None:
    assert report.said(error, COMMAND.fields) == said
    assert error.told(lambda field: field) == str(error)
