"""Container files and systemd units: what they start are commands of ours, what they name is there."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdrpc.cli import keys, rpc_server, sd_server

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).parent.parent
DOCKER, SYSTEMD = ROOT / "deploy" / "docker", ROOT / "deploy" / "systemd"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = [DOCKER / "compose.yaml", DOCKER / "compose.cuda.yaml"]
UNITS = sorted(SYSTEMD.glob("*.service"))
COMMANDS = {command.name: command for command in (rpc_server.COMMAND, sd_server.COMMAND)}
EXPOSURE = 20
"""Of systemd's own score, in tenths of 0 … 10: what a service may do that it needs not."""


def check(words: list[str]) -> dict[str, Any]:
    """The options that a command line of ours means; a usage error where it means none."""
    program, *arguments = words
    command = COMMANDS[Path(program).name]
    if arguments[:1] == ["keys"]:
        keys.keys.commands[arguments[1]].make_context(arguments[1], arguments[2:])
        return {}
    return command.make_context(command.name, command.canonical(arguments)).params


def instructions(path: Path) -> list[tuple[str, str]]:
    """Of a Dockerfile: its name in capitals, and the rest."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [
        (line.partition(" ")[0], line.partition(" ")[2]) for line in "\n".join(lines).replace("\\\n", "").splitlines()
    ]


def entry(path: Path) -> list[str]:
    found: list[str] = json.loads(dict(instructions(path))["ENTRYPOINT"])
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_starts_a_command_that_others_can_reach(path: Path) -> None:
    said = dict(instructions(path))
    chosen = check([*entry(path), *json.loads(said["CMD"])])
    assert chosen.get("host", chosen.get("listen_ip")) == "0.0.0.0"
    assert said["EXPOSE"] == str(chosen.get("port", chosen.get("listen_port")))
    assert said["USER"].isdecimal()
    health = json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
    assert health[:2] == ["python", "-c"]
    ast.parse(health[2])
    assert f"127.0.0.1{':' if 'http' in health[2] else chr(39) + ', '}{said['EXPOSE']}" in health[2]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_has_what_its_build_needs(path: Path) -> None:
    """Files that it copies are there and not kept from it; extras are extras; a package's files are all copied."""
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    copied = [word for name, rest in instructions(path) if name == "COPY" for word in rest.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch(source, line[1:]) for line in ignored if line.startswith("!")), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"README.md", *project["project"]["license-files"], "src", "pyproject.toml"}
    assert needed <= {*copied}
    extras = {extra for group in re.findall(r"'\.\[([\w,]+)\]'", path.read_text()) for extra in group.split(",")}
    assert extras
    assert extras <= project["project"]["optional-dependencies"].keys()


def test_services_of_compose_are_commands_and_name_what_is_declared() -> None:
    whole, cuda = (yaml.safe_load(path.read_text()) for path in COMPOSE)
    for name, service in whole["services"].items():
        build = service["build"]
        dockerfile = DOCKER / build["context"] / build["dockerfile"]
        assert dockerfile.exists(), name
        assert build["args"].keys() == {"TORCH"}
        chosen = check([*entry(dockerfile), *map(str, service["command"])])
        assert chosen.get("host", chosen.get("listen_ip")) == "0.0.0.0"
        mounted = {volume.split(":")[0] for volume in service["volumes"] if not volume.startswith("$")}
        assert mounted <= whole["volumes"].keys()
        assert {*service.get("secrets", [])} <= whole["secrets"].keys()
        assert service["depends_on"].keys() <= whole["services"].keys() if "depends_on" in service else True
        for endpoint in chosen.get("rpc", ()):
            assert endpoint.partition(":")[0] in whole["services"]
        for path in chosen.get("rpc_key_file", ()):
            assert Path(path).name in whole["secrets"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))  # nothing is open by itself
    assert cuda["services"].keys() <= whole["services"].keys()


def test_comments_of_compose_are_commands() -> None:
    said = [words for line in COMPOSE[0].read_text().splitlines() if "worker keys" in line for words in [line.split()]]
    for words in said:
        check([*entry(DOCKER / "worker.Dockerfile"), *words[words.index("keys") : words.index(">")]])
    assert said


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command(path: Path) -> None:
    text = path.read_text()
    words = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1])  # type: ignore[index]
    variable = f"${path.stem.upper().replace('-', '_')}_OPTIONS"
    assert words[-1] == variable
    check(words[:-1])
    assert f"EnvironmentFile=-/etc/default/{path.stem}" in text
    assert f"SDRPC_STATE=/var/lib/{path.stem} " in text
    assert f"\nStateDirectory={path.stem}\n" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_takes_a_unit_and_finds_it_closed(path: Path, tmp_path: Path) -> None:
    program = tmp_path / path.stem
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / path.name
    unit.write_text(path.read_text().replace("/opt/sdrpc/bin", str(tmp_path)))
    for command in (["verify"], ["security", "--offline=true", f"--threshold={EXPOSURE}"]):
        done = subprocess.run(["systemd-analyze", *command, str(unit)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-300:] + done.stderr
        assert path.name not in done.stderr
