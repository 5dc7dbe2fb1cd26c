"""Container files and systemd units: what they start are commands of ours, what they name is there."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdrpc.cli import keys, rpc_server, sd_server
from tests.support.process import Listening
from tests.web.process import DRAW_SECONDS, WebServer

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


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What the images have of ours: the wheel of the files that they copy, and nothing else, in a folder."""
    context = tmp_path / "context"
    context.mkdir()
    for path in DOCKERFILES:
        for source in (word for name, rest in instructions(path) if name == "COPY" for word in rest.split()[:-1]):
            whole, to = ROOT / source, context / source
            if whole.is_dir():
                shutil.copytree(whole, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(whole, to)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=context, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(tmp_path / "image"), str(wheel)], check=True, capture_output=True)
    return tmp_path / "image"


def code(image: Path) -> set[Path]:
    """Its files, but for what Python and numba make of them where they may."""
    return {path for path in image.rglob("*") if "__pycache__" not in path.parts}


class Container(WebServer):
    """A process of an image, without a container around it: it has the image's code and variables, no home, and of
    this machine's environment nothing. ``paths``: where what the image calls so is."""

    def __init__(self, image: Path, dockerfile: Path, words: list[str], says: str, paths: Mapping[str, str]) -> None:
        self._dockerfile, self._image, self._paths = dockerfile, image, paths
        Listening.__init__(self, self.words([*entry(dockerfile), *words]), says)

    def words(self, command: list[str]) -> list[str]:
        said = dict(instructions(self._dockerfile))
        variables = [self._here(word) for word in said["ENV"].split()]
        path = os.pathsep.join([str(self._image / "bin"), str(Path(sys.executable).parent), "/usr/bin", "/bin"])
        ours = [f"PATH={path}", f"PYTHONPATH={self._image}", "CUDA_VISIBLE_DEVICES="]  # no GPU was given to it
        return ["env", "-i", *ours, *variables, *map(self._here, command)]

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.words(command), capture_output=True, text=True, timeout=DRAW_SECONDS, check=False)

    def is_healthy(self) -> bool:
        """What the image's health check says, of the port that it has here."""
        said = dict(instructions(self._dockerfile))
        check = json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
        return self.run([word.replace(said["EXPOSE"], str(self.port)) for word in check]).returncode == 0

    def _here(self, word: str) -> str:
        for name, path in self._paths.items():
            word = word.replace(name, path)
        return word


def test_services_of_compose_draw_a_picture(image: Path, tmp_path: Path) -> None:
    """The commands of compose.yaml, in turn, as processes of the images: a key for the page, the worker, the server."""
    services = yaml.safe_load(COMPOSE[0].read_text())["services"]
    files = code(image)
    worker_data, server_data, models = tmp_path / "worker", tmp_path / "server", tmp_path / "models"
    for folder in (worker_data, server_data, models):
        folder.mkdir(mode=0o700)
    says = r"endpoint\s*:\s*\S+:(\d+)\s*$"
    command = [*map(str, services["worker"]["command"]), "--port", "0"]
    with Container(image, DOCKER / "worker.Dockerfile", command, says, {"/data": str(worker_data)}) as worker:
        assert worker.port
        assert worker.is_healthy()
        made = worker.run(["rpc-server", "keys", "add", "page"])
        assert made.returncode == 0, made.stderr
        (tmp_path / "rpc.key").write_text(made.stdout)
        paths = {
            "/data": str(server_data), "/models": str(models), "/run/secrets/rpc_key": str(tmp_path / "rpc.key"),
            "worker:50052": f"127.0.0.1:{worker.port}",
        }  # fmt: skip
        command = [*map(str, services["server"]["command"]), "--listen-port", "0"]
        with Container(image, DOCKER / "server.Dockerfile", command, r"^http://\S+:(\d+)\b", paths) as server:
            assert server.port, server.lines
            assert server.is_healthy()
            [key] = [line.partition(":")[2].strip() for line in (server_data / "keys.txt").read_text().splitlines()]
            body = {"prompt": "a red circle", "size": "64x64", "steps": 1}
            assert server.ask("/v1/images/generations", body).status == 401
            answer = server.ask("/v1/images/generations", body, headers={"Authorization": f"Bearer {key}"})
            assert answer.status == 200, answer.body
            assert answer.json()["data"][0]["b64_json"]
            assert server.stop() == 0
            assert not server.is_healthy()
        assert worker.stop() == 0
    assert code(image) == files, "it is only read"


def test_torch_comes_with_versions_that_its_own_index_lacks() -> None:
    """Constraints name one version of each package; torch's index has few."""
    for path in DOCKERFILES:
        [torch] = [rest for name, rest in instructions(path) if name == "RUN" and "/whl/${TORCH}" in rest]
        assert " --extra-index-url https://pypi.org/simple" in torch


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
