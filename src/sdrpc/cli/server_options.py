"""rpc-server's options as a table. Names are those of llama.cpp's rpc-server where it has the option."""

from __future__ import annotations

import click

from ..device import PRECISIONS
from ..server import Limits
from .command import SHELLS, Option
from .values import Networks, OneOf, Seconds, Size

AUTO = "auto"
MIB = 1 << 20
"""With less than this of memory or disk nothing can be done: a letter was forgotten."""

LISTENING, DEVICES, TRUST, CLIENTS = "Listening", "Devices", "Who may come", "Clients"
CACHE, ABOUT = "Cache", "About"

GRACE_SECONDS = 5.0
"""Less than what service managers allow before they kill (docker: 10 seconds)."""

OPTIONS = (
    Option(LISTENING, "-H", "--host", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on."),
    Option(LISTENING, "-p", "--port", type=click.IntRange(0, 65535), default=50052, metavar="NUMBER",
           help="Port; 0 picks a free one."),
    Option(LISTENING, "--announce", is_flag=True,
           help="Let others in the local network find this server with sd-cli --discover."),
    Option(LISTENING, "--protocol", default=AUTO, metavar="auto|VERSION",
           help="Protocol of the clients, such as 5.0; auto: what each of them speaks, learnt where it can't be seen."),

    Option(DEVICES, "-d", "--device", default="", metavar="NAME,...", shown="all accelerators, else CPU",
           help="Devices to offer."),
    Option(DEVICES, "-t", "--threads", type=click.IntRange(min=0), default=0, metavar="NUMBER",
           help="Threads of the CPU; 0: one per core."),
    Option(DEVICES, "--precision", type=OneOf(*PRECISIONS), default="auto", metavar="|".join(PRECISIONS),
           help="How to compute; exact: float32; ggml: rounding as ggml's CPU does; auto: fast where the hardware is "
           "made for it."),
    Option(DEVICES, "--dequant-cache", type=Size(), metavar="SIZE", shown="448M; a quarter of an accelerator",
           help="Memory of each device for weights in the form that they are computed in."),
    Option(DEVICES, "--compile", type=OneOf("auto", "off"), default="auto", metavar="auto|off",
           help="auto: programs that repeat are compiled in the background, on GPUs in fast precision; code is kept "
           "for the next start."),
    Option(DEVICES, "--warm", is_flag=True,
           help="Have ready what the first pictures need when the server starts: torch's libraries, the loader of "
           "compiled programs, and in the background those that were used last."),
    Option(DEVICES, "--list-devices", is_flag=True, help="Print this machine's devices and exit."),

    Option(TRUST, "--allow-from", type=Networks(), metavar="NETWORK,...", default=(),
           shown="this machine; from others only with a key",
           help="Let clients in from there without a key, such as 192.168.1.0/24."),
    Option(TRUST, "--plain", is_flag=True, help="Let everybody in, without a key or encryption."),
    Option(TRUST, "--require-key", is_flag=True,
           help="Let nobody in without a key, not even from this machine, where SSH tunnels end."),

    Option(CLIENTS, "--max-clients", type=click.IntRange(min=1), default=Limits.connections, metavar="NUMBER",
           help="Connections at one time; further ones are refused."),
    Option(CLIENTS, "--max-connections-per-client", type=click.IntRange(min=1), default=Limits.connections_of_address,
           metavar="NUMBER", help="The same with one key, or from one other machine."),
    Option(CLIENTS, "--max-memory", type=Size(MIB), metavar="SIZE", shown="all that is free",
           help="Memory for the buffers of all clients."),
    Option(CLIENTS, "--max-memory-per-client", type=Size(MIB), metavar="SIZE",
           shown=f"{Limits.share:.0%} of a device", help="Memory for one client's buffers and running graph."),
    Option(CLIENTS, "--max-requests", type=click.IntRange(min=1), default=Limits.computing, metavar="NUMBER",
           help="Graphs of all clients that run or wait for their turn; further ones are refused."),
    Option(CLIENTS, "--max-requests-per-client", type=click.IntRange(min=1), default=Limits.computing_of_client,
           metavar="NUMBER", help="The same of one client."),
    Option(CLIENTS, "--max-compute", type=Seconds(0, True), metavar="SECONDS", shown="no limit",
           help="Computing for all clients within an hour."),
    Option(CLIENTS, "--max-compute-per-client", type=Seconds(0, True), metavar="SECONDS",
           shown="no limit; clients take fair turns", help="The same for one client."),

    Option(CLIENTS, "--compute-limit", type=Seconds(1), metavar="SECONDS", default=Limits.compute_seconds,
           help="How long one run of a graph may take."),
    Option(CLIENTS, "--grace", type=Seconds(), metavar="SECONDS", default=GRACE_SECONDS,
           help="After SIGTERM: time for clients to finish what they are at. New ones are refused, idle ones leave."),

    Option(CACHE, "-c", "--cache", is_flag=True,
           help="Keep weights on disk: clients that come again need not send them."),
    Option(CACHE, "--cache-size", type=Size(MIB), default="32G", metavar="SIZE",
           help="Disk space for --cache; what was used longest ago goes first."),

    Option(ABOUT, "-v", "--verbose", is_flag=True,
           help="Log every client: who comes, and what it took when it leaves."),
    Option(ABOUT, "--completion", type=OneOf(*SHELLS), metavar="|".join(SHELLS),
           help='Print a script that completes options in a shell: eval "$(rpc-server --completion bash)".'),
    Option(ABOUT, "--version", is_flag=True, help="Print versions and exit."),
)  # fmt: skip

REFUSED = dict.fromkeys(
    ("-m", "--mem"),
    "how much memory clients are told of, in older servers of ggml's: --max-memory 8G bounds what they get",
)
"""Options of ggml's rpc-server that this one refuses."""
