"""A sampling step through a server, over the same step of diffusers in process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

from sdrpc.diffusion.guidance import Told
from sdrpc.diffusion.request import Request

from .rows import Mark, Row
from .sampling import DTYPES, InProcess, Sampled, difference, sample, step_seconds
from .setup import Setup, Variant

ROUNDS = 2
"""Each side draws as often, in turn: what else the machine does then hits both."""

COMPILED = 1 / 0.95
COMPILE_SECONDS = 900.0


class NotCompiled(SystemExit):
    """A server's program runs on as it is; the reason is that of the server, or that it took too long."""


MILESTONES = {
    "endpoint": "the server listens",
    "a client of sdrpc": "a client is there",
    "torch's libraries": "the device's thread",
    "the loader of": "the compiler",
    "is loaded after": "the compiler's thread",
    "programs are ready": "the compiler's thread",
    "is a program after": "the client's thread",
    "has its memory after": "the client's thread",
    "the first run of": "the device's thread",
    "a recording of": "the device's thread",
    "runs compiled": "the device's thread",
}
"""Words of the server's lines that say how far it is, and who says it."""
TOLD_STEPS = 3
REFUSED = "is not compiled", "it is not used", "does not run", "is not compared"
"""What a server says of a program that it goes on to run as it is."""

SAME_WORK = 0.15
"""How far (relative, L2) the latents of both sides may be from each other: rounding in narrow types takes a few per
cent, other work takes far more."""


def run(setup: Setup) -> Iterator[Row]:
    for variant in setup.variants:
        yield from _variant(setup, variant)


def _variant(setup: Setup, variant: Variant) -> Iterator[Row]:
    request = setup.request()
    with setup.server(variant) as server, setup.session(variant, server.port) as session:
        settings = session.settings(request)
        conditions = session.conditioning.conditions(settings)
        text = np.concatenate([each["context"] for each in conditions.by_name.values()])
        sample(session, request, conditions)  # uploads, and finds memory
        theirs = InProcess(session.model, setup.torch_device, _dtype(variant))
        theirs.sample(settings, text)
        mine, eager = [], []
        for _ in range(ROUNDS):
            mine.append(sample(session, request, conditions))
            eager.append(theirs.sample(settings, text))
        apart = difference(mine[-1].latents, eager[-1].latents)
        if apart > SAME_WORK:
            raise SystemExit(f"step, {variant}: the two sides draw different pictures ({apart:.0%} apart)")
        note = f"{settings.width}×{settings.height}, batch of 2; latents {apart:.2%} apart"
        yield _row(f"step, {variant}", step_seconds(*mine), step_seconds(*eager), "diffusers", note)
        if not setup.on_cpu:
            graphs = [theirs.sample(settings, text, graph=True) for _ in range(ROUNDS)]
            yield _row(f"step, {variant}", step_seconds(*mine), step_seconds(*graphs), "diffusers, CUDA graph", note)

        if setup.compiles(variant):

            def draw() -> Sampled:
                return sample(session, request, conditions)

            took = until_compiled(server, draw)
            yield Row(f"compiling, {variant}", took, "s", None, "", None, "from the first picture on, beside drawing")
            mine = [draw() for _ in range(ROUNDS)]
            with theirs.compiled():
                graphs = [theirs.sample(settings, text, graph=True) for _ in range(ROUNDS)]
            apart = difference(mine[-1].latents, graphs[-1].latents)
            note = f"{settings.width}×{settings.height}, batch of 2; latents {apart:.2%} apart"
            against = "diffusers compiled, CUDA graph"
            yield _row(f"compiled step, {variant}", step_seconds(*mine), step_seconds(*graphs), against, note, COMPILED)
    if setup.compiles(variant):
        yield from _restart(setup, variant, request, conditions)


def _restart(setup: Setup, variant: Variant, request: Request, conditions: Told) -> Iterator[Row]:
    """From the start of a server's process to the first compiled run, of a program that was compiled before."""
    start = time.perf_counter()
    done: dict[str, float] = {}
    with setup.server(variant, "--warm") as server, setup.session(variant, server.port) as session:
        done["the client has opened the model"] = time.perf_counter()

        def stepped(count: int) -> None:
            if count < TOLD_STEPS:
                done[f"steps known to be done: {count}"] = time.perf_counter()

        sample(session, request, conditions, stepped)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in session.timer.seconds.items())
        done[f"the first picture is done ({stages})"] = time.perf_counter()
        until_compiled(server, lambda: sample(session, request, conditions))
        took = time.perf_counter() - start
        for line, at in zip(server.lines, server.times, strict=False):
            done.update({f"{what}: {line.strip()}": at for word, what in MILESTONES.items() if word in line})
    note = "server's process start to the first compiled run, compiled before; upload and the first picture in it"
    yield Row(f"full speed after a restart, {variant}", took, "s", None, "", Mark(10.0, "ours"), note)
    for what, at in sorted(done.items(), key=lambda each: each[1]):
        yield Row(f"restart, {what}", at - start, "s")


class Spoken(Protocol):
    """A server, or what stands for one: what it has said so far."""

    @property
    def output(self) -> str: ...


def until_compiled(server: Spoken, draw: Callable[[], object], seconds: float = COMPILE_SECONDS) -> float:
    """Let ``draw`` go on until the server's program runs compiled; how many seconds that took. Raises
    :class:`NotCompiled`, also where it takes longer than ``seconds``."""
    start = time.perf_counter()
    while not said(server, "runs compiled"):
        if refused := said(server, *REFUSED):
            raise NotCompiled(f"not compiled: {refused}")
        if time.perf_counter() > start + seconds:
            raise NotCompiled(f"not compiled after {seconds:.0f} s; the server said:\n{server.output}")
        draw()
    return time.perf_counter() - start


def said(server: Spoken, *words: str) -> str:
    """The first line of the server's in which there is one of ``words``; empty when it has said none."""
    return next((line for line in server.output.splitlines() if any(each in line for each in words)), "")


def _dtype(variant: Variant) -> torch.dtype:
    """What diffusers computes in: exact is float32 whatever the file holds."""
    return torch.float32 if variant.precision == "exact" else DTYPES[variant.type]


def _row(what: str, ours: float, theirs: float, against: str, note: str, most: float = 1.10) -> Row:
    rates = f"{1 / ours:.2f} against {1 / theirs:.2f} steps/s; {note}"
    return Row(what, ours * 1e3, "ms", theirs * 1e3, against, Mark(most), rates)
