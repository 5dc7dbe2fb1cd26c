"""Servers in the local network: what ``--discover`` prints, and what ``--rpc auto`` means."""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
from rich.table import Table
from rich.text import Text

from ..client import Endpoint, Keychain, open_connection
from ..client.discovery import AUTO, accepted, discover
from ..errors import ConnectionFailed, SdrpcError
from ..text import printable
from ..wire.service import Announcement
from . import report
from .progress import mebibytes


def show() -> int:
    """Print the servers that announce themselves; the exit status."""
    found = discover()
    if not found:
        report.say("no server announces itself in this network (rpc-server -H 0.0.0.0 --announce)")
        return 0
    report.table(_table(found, Keychain()))
    return 0


def located(rpc: Sequence[str], keychain: Keychain) -> tuple[list[str], Keychain]:
    """``rpc`` with the servers in the place of ``auto`` that let us in before and prove to be those, and the keys for
    them. Raises :class:`ConnectionFailed` when there is none."""
    if AUTO not in rpc:
        return list(rpc), keychain
    endpoints, keychain = accepted(discover(), keychain)
    there = [str(endpoint) for endpoint in endpoints if _proves_itself(endpoint, keychain)]
    if not there:
        raise ConnectionFailed(
            AUTO,
            "no server in this network let us in before; sd-cli --discover shows which there are, and --rpc HOST:PORT "
            "--rpc-key KEY is how to be let in",
        )
    report.say(f"found {', '.join(there)}")
    result = [name for each in rpc for name in (there if each == AUTO else [each])]
    return list(dict.fromkeys(result)), keychain


def _proves_itself(endpoint: Endpoint, keychain: Keychain) -> bool:
    try:
        connection, _ = open_connection(endpoint, keychain=keychain)
    except SdrpcError as error:
        report.warn(f"{error}: not used")
        return False
    connection.close()
    return True


def _table(found: Sequence[Announcement], keychain: Keychain) -> Table:
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    for column in ("server", "for --rpc", "devices", "key"):
        table.add_column(column, overflow="fold")
    for each in found:
        devices = ", ".join(f"{name} ({mebibytes(size)})" for name, size in each.devices)
        known = keychain.by_certificate(each.certificate) is not None
        key = "let us in before" if known else "needed" if each.needs_key else "not needed"
        endpoint = Endpoint(each.host, each.port)
        table.add_row(Text(printable(each.name)), Text(str(endpoint)), Text(printable(devices)), key)
    return table
