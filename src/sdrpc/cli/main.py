"""sdrpc: one command that holds the others, for where only one name is wanted (``python -m sdrpc``, ``pipx run``)."""

from __future__ import annotations

import sys
from importlib import import_module

from .. import __version__
from . import interrupts
from .report import USAGE

COMMANDS = {
    "rpc-server": ("rpc_server", "offer this machine's devices"),
    "sd-cli": ("sd_cli", "draw a picture on the devices of this machine and of servers"),
    "sd-server": ("sd_server", "draw for everybody on the network: a page, a queue, APIs"),
}


def main() -> None:
    """``sdrpc COMMAND …`` is ``COMMAND …``."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[0:2] = [name]
        interrupts.at_once()
        command = import_module(f".{COMMANDS[name][0]}", __package__).main
        interrupts.soon()
        command()
    elif name in ("-h", "--help"):
        print("usage: sdrpc COMMAND [OPTIONS]\n")
        print(*(f"  {command:12}{what}" for command, (_, what) in COMMANDS.items()), sep="\n")
    elif name == "--version":
        print(f"sdrpc {__version__}")
    else:
        print(f"error: {name}: there is no such command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(USAGE)
