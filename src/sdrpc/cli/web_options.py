"""sd-server's options as a table. Those of models and devices are sd-cli's; names are stable-diffusion.cpp's where its
sd-server has the option."""

from __future__ import annotations

import click

from .command import SHELLS, Option
from .options import DEVICES, FILE, MODEL
from .options import OPTIONS as SD_CLI
from .options import REFUSED as REFUSED_BY_SD_CLI
from .values import OneOf, Seconds, Size

LISTENING, QUEUE, ABOUT = "Listening", "Queue", "About"
DAY = 24 * 3600

OPTIONS = (
    *(option for option in SD_CLI if option.group == MODEL),
    Option(MODEL, "--models-dir", type=FILE, metavar="PATH",
           help="Folder of whole models, each of which can be asked for by its name."),

    Option(LISTENING, "-l", "--listen-ip", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on."),
    Option(LISTENING, "--listen-port", type=click.IntRange(0, 65535), default=1234, metavar="NUMBER",
           help="Port; 0 picks a free one."),
    Option(LISTENING, "--api-key-file", type=FILE, metavar="PATH",
           help="Keys, one in a line, with a name before it if you like (anna: ...). It is made, with a key, where "
           "there is none."),
    Option(LISTENING, "--no-auth", is_flag=True, help="Let everybody in who reaches the address, without a key."),
    Option(LISTENING, "--allow-host", multiple=True, metavar="NAME",
           help="A name that browsers know this machine by, beside its own."),

    *(option for option in SD_CLI if option.group == DEVICES and option.name != "list_devices"),
    Option(DEVICES, "--ray", default="", metavar="auto|HOST:PORT",
           help="Draw in a Ray cluster, on the servers that its nodes offer as resources: ray start --resources "
           "'{\"rpc:desktop:50052\": 1}'. auto: this machine's cluster. --rpc names those to use, else all."),

    Option(QUEUE, "--data", type=FILE, metavar="PATH", shown="sd-server in the user's state folder",
           help="Folder of the queue and of the pictures."),
    Option(QUEUE, "--max-pending", type=click.IntRange(1, 100_000), default=64, metavar="NUMBER",
           help="Jobs that may wait; further ones are told to come later."),
    Option(QUEUE, "--keep", type=Seconds(unit="days"), default=7.0, metavar="DAYS",
           help="How long finished jobs and their pictures stay."),
    Option(QUEUE, "--keep-size", type=Size(), default="2G", metavar="SIZE",
           help="How much of them stays; the oldest go first."),
    Option(QUEUE, "--idle-unload", type=click.IntRange(min=0), default=600, metavar="SECONDS",
           help="After so long without a job the devices' memory is freed; 0: never."),

    Option(ABOUT, "-v", "--verbose", is_flag=True, help="Say more: requests, jobs, the log."),
    Option(ABOUT, "--log-format", type=OneOf("text", "json"), default="text", metavar="text|json",
           help="json: requests, jobs and the log on standard error, one object a line."),
    Option(ABOUT, "--completion", type=OneOf(*SHELLS), metavar="|".join(SHELLS),
           help='Print a script that completes options in a shell: eval "$(sd-server --completion bash)".'),
    Option(ABOUT, "--version", is_flag=True, help="Print the version and exit."),
)  # fmt: skip

_HERE = frozenset(name for option in OPTIONS for name in option.opts)
_ASKED_FOR = "sd-server draws what each request says; say it there, or in the form of the page"

REFUSED = {
    **dict.fromkeys((name for option in SD_CLI for name in option.opts if name not in _HERE), _ASKED_FOR),
    "--list-devices": "sd-cli lists them; the page shows those of sd-server",
    "--serve-html-path": "an option of stable-diffusion.cpp's sd-server that sdrpc lacks (it has a page of its own)",
    **REFUSED_BY_SD_CLI,
}
"""Options of either sd-cli, and of stable-diffusion.cpp's sd-server, that this one refuses by name."""
