"""What the pages of documentation say is so: links lead somewhere, commands can be typed, messages are in the code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import click
import pytest

from sdrpc.cli import keys, rpc_server, sd_cli, sd_server
from tools.docs_site import PAGES, in_site
from tools.newcomer import commands

ROOT = Path(__file__).parent.parent
TEXTS = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / source for source in PAGES)]
COMMANDS = {command.name: command for command in (rpc_server.COMMAND, sd_cli.COMMAND, sd_server.COMMAND)}
GAP = "\0"
"""Stands for what differs in a message."""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """Of a page's headings, as git hosts and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    """As files of the repository, which is how a git host shows them; the site's are checked when it is built."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other.read_text()), target


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_the_code_that_they_name_is_there(path: Path) -> None:
    """Files, written as the repository or the package has them."""
    for name in re.findall(r"`([\w-]+(?:/[\w-]+)+\.py)\b", path.read_text()):
        assert any((ROOT / base / name).exists() for base in ("", "src/sdrpc")), name


@pytest.mark.parametrize("package", ["server", "wire"])
def test_a_package_that_lists_its_modules_lists_all(package: str) -> None:
    folder = ROOT / "src" / "sdrpc" / package
    listed = re.findall(
        r"^ *((?:\w+, )*\w+)  +\S", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "", re.M
    )
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    assert {name for names in listed for name in names.split(", ")} == modules


def typed(text: str) -> Iterator[tuple[str, list[str]]]:
    """Our programs with their arguments, in blocks of sh and in sentences, whatever goes before them."""
    for command in commands(re.sub(r"^> .*$", "", text, flags=re.MULTILINE)):
        words = shlex.split(command.text) if command.kind == "sh" else []
        for position, word in enumerate(words):
            if "=" not in word and Path(word).name in COMMANDS:
                yield Path(word).name, words[position + 1 :]
                break


@pytest.mark.parametrize("path", [path for path in TEXTS if path.name != "README.md"], ids=named)
def test_commands_can_be_typed(path: Path) -> None:
    for program, arguments in typed(path.read_text()):
        if arguments[:1] == ["keys"]:
            keys.keys.commands[arguments[1]].make_context(arguments[1], arguments[2:])
            continue
        command = COMMANDS[program]
        with suppress(click.exceptions.Exit, click.BadOptionUsage):  # --help ends; sentences name options alone
            command.make_context(program, command.canonical(arguments))


@cache
def said() -> str:
    """Every text in the code, with gaps in place of what is put into it."""
    texts = []
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(_literal(part) for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def _literal(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else GAP


OF_THE_SYSTEM = ("Connection refused", "Name or service not known")
MESSAGES = re.findall(r"^> `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 25


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_of_ours(message: str) -> None:
    """Each part between gaps and parentheses stands in the code, or is put together of two that do."""
    parts = [part.strip(" :;") for part in re.split("[…()]", message)]
    words = [part for part in parts if len(part.split()) > 1 and part not in OF_THE_SYSTEM]
    assert words, message
    assert [part for part in words if not _is_said(part)] == []


def _is_said(part: str) -> bool:
    cuts = [0, *(match.start() for match in re.finditer(r"(?<=;) | (?=while$)", part))]
    return any(part[:cut] in said() and part[cut:] in said() for cut in cuts)


def test_the_site_links_to_its_own_pages_and_names_other_files() -> None:
    text = "[a](two-machines.md#1) [b](../README.md#films) [c](../tests/soak) [d](https://x.org/y) ![e](a.png) [f](#g)"
    assert in_site(text, "docs/index.md") == (
        "[a](two-machines.md#1) [b](readme.md#films) c (`tests/soak`) [d](https://x.org/y) ![e](a.png) [f](#g)"
    )
    assert in_site("![x](docs/overview.svg)", "README.md") == "![x](overview.svg)"
