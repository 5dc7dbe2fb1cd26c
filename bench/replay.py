"""What an unmodified sd-cli of stable-diffusion.cpp gets from our server: the commands of an evaluation of the UNet, as
they were recorded, over a real socket at full rate. It sends the whole graph each time. Their bytes are made before:
sd-cli takes no time to make them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from sdrpc.client import connect
from sdrpc.ggml.dialect import Dialect, dialects
from sdrpc.ggml.tensor import MAX_SRC, Tensor
from sdrpc.wire import messages
from sdrpc.wire.framing import REPLY_HEADER, encode_request
from sdrpc.wire.graphs import encode_graph
from sdrpc.wire.records import Record
from tests.engine.recorded import Recorded, contents, load
from tests.support.client import RawClient

from .operations import recorded_on
from .rows import Mark, Row
from .setup import Setup
from .step import NotCompiled, said, until_compiled

PART = "unet"
PROTOCOL = "5.0.1"
"""stable-diffusion.cpp's."""
NAME_LENGTH = 160
"""Bytes of a tensor's name there."""
ASKED = "FLASH_ATTN_EXT", 3
"""What its allocator asks the size of, three times for each, before every graph."""
WARM, ROUNDS = 5, 100
WARM_ON_CPU, ROUNDS_ON_CPU = 1, 3
"""Where an evaluation takes a second or two."""
COMPILE_SECONDS = 420.0
"""How long compiling is waited for."""
A_STEP = 2
"""Evaluations: of the prompt, and of the negative one."""
STEPS_PER_SECOND = Mark(50, of="ours", at_least=True)


class Sent(NamedTuple):
    """A command's bytes, and how many its answer has."""

    request: bytes
    answer: int


def run(setup: Setup) -> Iterator[Row]:
    dialect, recorded = dialects()[PROTOCOL], load(PART)
    rounds = (WARM_ON_CPU, ROUNDS_ON_CPU) if setup.on_cpu else (WARM, ROUNDS)
    what = f"recorded sd-cli, 128×128, {setup.variant}"
    with ExitStack() as stack:
        server = stack.enter_context(setup.server(setup.variant, "--protocol", PROTOCOL))
        client = RawClient(server.port, dialect, NAME_LENGTH)
        stack.callback(client.socket.close)
        client.socket.settimeout(None)  # as sd-cli's: with a limit, Python asks the system before it sends or receives
        buffers = {number: client.buffer(size) for number, size in recorded.sizes.items()}
        commands = _commands(client, recorded, buffers, dialect)
        evaluate = partial(_evaluate, client, commands)
        theirs, spent = _rate(evaluate, *rounds), _spent(client, commands, rounds[1])
        yield _steps(what, theirs, None, spent)
        if setup.compiles(setup.variant):
            try:
                until_compiled(server, evaluate, COMPILE_SECONDS)
            except NotCompiled as reason:
                yield Row(f"{what}, compiled, steps", 0.0, "steps/s", mark=STEPS_PER_SECOND, note=str(reason))
            else:
                compiled, spent = _rate(evaluate, *rounds), _spent(client, commands, rounds[1])
                yield _steps(f"{what}, compiled", compiled, STEPS_PER_SECOND, spent, said(server, "runs compiled"))
        (device,) = connect([f"127.0.0.1:{server.port}"])  # last: its program is compiled, too, beside what is measured
        stack.callback(device.close)
        ours = _rate(recorded_on(device, PART).run, *rounds)
        size = sum(len(command.request) for command in commands)
        note = f"{len(commands)} commands of {size / 1e6:.1f} MB"
        yield Row(
            f"{what}, an evaluation", theirs * 1e3, "ms", ours * 1e3, "our own client's, of the same graph", None, note
        )


def _steps(what: str, seconds: float, mark: Mark | None, spent: Mapping[str, float], more: str = "") -> Row:
    parts = ", ".join(f"{name} {part * 1e3:.2f}" for name, part in spent.items())
    note = f"two evaluations of {seconds * 1e3:.2f} ms; ms of one, sent and answered: {parts}"
    note = f"{note}; {more}" if more else note
    return Row(f"{what}, steps", 1 / (A_STEP * seconds), "steps/s", mark=mark, note=note)


def _commands(
    client: RawClient, recorded: Recorded, buffers: Mapping[int, tuple[int, int]], dialect: Dialect
) -> list[Sent]:
    """Sends the weights on the way: what an evaluation does not change."""
    graph, rng = recorded.graph, np.random.default_rng(0)
    last = graph.nodes[-1]

    def record(tensor: Tensor) -> Record:
        return client.record(buffers[tensor.buffer], tensor.ne, type=tensor.type.name, at=tensor.offset)

    def locate(buffer: int, offset: int) -> tuple[int, int]:
        handle, address = buffers[buffer]
        return handle, address + offset

    def sent(message: Any, answer: int = 0) -> Sent:
        return Sent(b"".join(encode_request(message, dialect, client.name_length)), answer)

    inputs = []
    for leaf in graph.leaves:
        values = contents(leaf, rng).tobytes()
        client.set(record(leaf), values)
        if leaf.buffer == last.buffer:  # inputs lie beside the results
            inputs.append(sent(messages.SetTensor(record(leaf), 0, 0, values)))
    op, times = ASKED
    size_of_answer = REPLY_HEADER.size + messages.message_layout(messages.GetAllocSizeReply, dialect).size(0)
    sizes = [
        sent(
            messages.GetAllocSize(0, client.record(ne=node.ne, op=op, params=node.params), _sources(client, node)),
            size_of_answer,
        )
        for node in graph.nodes
        if node.op == op
        for _ in range(times)
    ]
    whole = sent(messages.GraphCompute(encode_graph(graph, 0, dialect, client.name_length, locate)))
    result = sent(messages.GetTensor(record(last), 0, last.nbytes), REPLY_HEADER.size + last.nbytes)
    return [*sizes, *inputs, whole, result]


def _sources(client: RawClient, node: Tensor) -> tuple[Record, ...]:
    given = [client.record(ne=source.ne, type=source.type.name) for source in node.src if source is not None]
    return (*given, *[Record()] * (MAX_SRC - len(given)))


def _evaluate(client: RawClient, commands: list[Sent]) -> None:
    send, receive = client.socket.sendall, client.socket.recv
    for request, answer in commands:
        send(request)
        while answer:
            if not (piece := receive(answer)):
                raise EOFError("the server has closed the connection")
            answer -= len(piece)


def _spent(client: RawClient, commands: list[Sent], rounds: int) -> dict[str, float]:
    """Seconds of an evaluation that each kind of command takes, sent and answered: the median of each."""
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for number, same in groupby(commands, lambda command: command.request[0]):
            start = time.perf_counter()
            _evaluate(client, list(same))
            taken.setdefault(messages.Command(number).name, []).append(time.perf_counter() - start)
    return {name: median(each) for name, each in taken.items()}


def _rate(evaluate: Callable[[], object], warm: int, rounds: int) -> float:
    """Seconds of an evaluation, one after the other."""
    for _ in range(warm):
        evaluate()
    start = time.perf_counter()
    for _ in range(rounds):
        evaluate()
    return (time.perf_counter() - start) / rounds
