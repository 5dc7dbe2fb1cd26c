"""rpc-server keys: who may use this machine's devices from other ones."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

import click
import rich.box
from rich.table import Table

from ..client.endpoint import DEFAULT_PORT, Endpoint
from ..errors import UsageError
from ..server.key_ring import KeyRing, NamedKey, default_path
from . import report


def run(arguments: Sequence[str]) -> int:
    """``rpc-server keys`` with ``arguments``; its exit status. Raises :class:`UsageError`."""
    try:
        keys.main(list(arguments) or ["--help"], prog_name="rpc-server keys", standalone_mode=False)
    except click.ClickException as error:
        raise UsageError(error.format_message()) from error
    return 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def keys() -> None:
    """Keys that let clients on other machines in. Changes hold at once, also for a server that is running."""


@keys.command()
@click.argument("name")
def add(name: str) -> None:
    """Make a key called NAME, such as the machine or the person that it is for."""
    _show(_ring().add(name))


@keys.command("list")
def list_keys() -> None:
    """Print the names of all keys."""
    known = _ring().all()
    if not known:
        report.say("there are no keys (rpc-server keys add NAME makes one)")
        return
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("key")
    table.add_column("since")
    for each in known:
        table.add_row(each.name, each.added)
    report.table(table)


@keys.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the key called NAME again, as another machine needs it."""
    _show(_ring().named(name))


@keys.command()
@click.argument("name")
def revoke(name: str) -> None:
    """Take the key called NAME back. Who uses it is thrown out within a second."""
    _ring().revoke(name)
    report.say(f"{name} is revoked")


def line(host: str, port: int, key: NamedKey) -> str:
    """What to type on the other machine, for a server that listens at ``host``."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host  # noqa: S104 # it is compared, not used
    return f"sd-cli --rpc {Endpoint(name, port)} --rpc-key {key.key.code}"


def _show(key: NamedKey) -> None:
    print(key.key.code)
    if sys.stdout.isatty():
        report.say(f"on the other machine: {line('', DEFAULT_PORT, key)}")


def _ring() -> KeyRing:
    return KeyRing(default_path())
