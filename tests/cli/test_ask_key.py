"""The question for a key: asked of somebody at a terminal, once, and never shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sdrpc.cli import devices, interrupts, report
from sdrpc.client import Keychain
from sdrpc.errors import KeyNeeded
from sdrpc.key import Key
from sdrpc.server import Door, Keys, Policy, Server
from sdrpc.server.key_ring import KeyRing
from tests.support.null import NullDevice


class Person:
    """Somebody at a terminal who gives these ``answers``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str, there: bool = True) -> None:
        self.answers, self.asked = list(answers), 0
        monkeypatch.setattr(report, "_somebody_is_there", lambda: there)
        monkeypatch.setattr(click, "prompt", self.prompt)

    def prompt(self, _text: str, **how: object) -> str:
        assert how["hide_input"]
        assert how["err"]
        self.asked += 1
        return self.answers.pop(0)


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.json")


@pytest.fixture
def server(ring: KeyRing, tmp_path: Path) -> Iterator[Server]:
    with Server([NullDevice()], door=Door(Policy(local=False), Keys(ring, tmp_path / "server.pem"))) as made:
        yield made


def opened(server: Server, path: Path) -> None:
    for device in devices._connected(server.endpoint, devices.DEFAULT_TIMEOUTS, Keychain(path=path), apart=False):
        device.close()


def test_it_is_asked_once(
    server: Server,
    ring: KeyRing,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = ring.add("laptop").key.code
    person = Person(monkeypatch, code[:-1] + ("0" if code[-1] != "0" else "1"), code.upper())
    opened(server, tmp_path / "servers.json")
    opened(server, tmp_path / "servers.json")
    assert person.asked == 2, "the first was mistyped; the second run asks for nothing"
    said = capsys.readouterr().err
    assert "mistyped" in said
    assert server.endpoint in said
    assert code not in said


@pytest.mark.parametrize("answers", [[""], ["x", "y", "z"]], ids=["nothing", "three times nonsense"])
def test_who_gives_no_key_gets_the_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    Person(monkeypatch, *answers)
    with pytest.raises(KeyNeeded):
        opened(server, tmp_path / "servers.json")


def test_who_interrupts_the_question_sees_no_traceback(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With Ctrl-C or Ctrl-D, as click has it."""
    Person(monkeypatch)
    monkeypatch.setattr(interrupts, "_news", threading.Lock())

    def interrupted(*_text: object, **_how: object) -> str:
        raise click.Abort

    monkeypatch.setattr(click, "prompt", interrupted)
    assert report.guarded(lambda: opened(server, tmp_path / "servers.json")) == 130
    assert capfd.readouterr().err.splitlines()[1:] == ["interrupted"]


def test_scripts_are_not_asked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    person = Person(monkeypatch, Key.new().code, there=False)
    with pytest.raises(KeyNeeded, match="--rpc-key"):
        opened(server, tmp_path / "servers.json")
    assert person.asked == 0
