"""What the README and the page of options name exists: options, make targets, files. `make newcomer` runs commands."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path

import click
import pytest

from sdrpc.cli import keys, rpc_server, sd_cli, sd_server
from tools.newcomer import HOSTS, LORAS, STAND_INS, Command, commands, reason_to_pass_over

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = {command.name: command for command in (rpc_server.COMMAND, sd_cli.COMMAND, sd_server.COMMAND)}
OURS = {name for command in COMMANDS.values() for option in command.options for name in option.opts} | {"-h", "--help"}

OF_OTHERS = {"-L", "--address", "--resources"}
"""Options of ssh and ray."""


def test_its_options_are_options() -> None:
    text = README + (ROOT / "docs" / "options.md").read_text()
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    named = {
        word.split("=")[0] for span in spans for word in span.split() if re.fullmatch(r"--?[A-Za-z][\w-]*(=.*)?", word)
    }
    assert len(named) > 40
    assert named - OURS <= OF_OTHERS


@pytest.mark.parametrize("command", [c for c in commands(README) if c.kind == "sh"], ids=lambda command: command.text)
def test_its_commands_can_be_typed(command: Command) -> None:
    program, *arguments = shlex.split(command.text)
    if arguments[:1] == ["keys"]:
        assert arguments[1] in keys.keys.commands
    elif program in COMMANDS:
        parsed = COMMANDS[program]
        with suppress(click.exceptions.Exit):  # --help prints and ends
            parsed.make_context(program, parsed.canonical(arguments))
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert program == "pip" or reason_to_pass_over(command)


def test_its_files_and_hosts_are_there_for_who_tries_it() -> None:
    texts = " ".join(command.text for command in commands(README) if not reason_to_pass_over(command))
    assert set(re.findall(r"[\w.-]+\.(?:safetensors|gguf)\b", texts)) <= set(STAND_INS)
    assert set(re.findall(r"\b[a-z]+:\d{5}\b", texts)) <= {*HOSTS}
    loras = {(name, folder) for folder, name in re.findall(r"--lora-model-dir (\S+) .*?<lora:([^:>]+)", texts)}
    assert loras == set(LORAS.items())


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
