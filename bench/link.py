"""Steps over a link with a long round trip, over the same steps on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from .proxy import SlowLink
from .rows import Mark, Row
from .sampling import sample, step_seconds
from .setup import Setup

ROUND_TRIP = 0.020
SAMPLERS = ("euler", "euler_a", "dpm++2m")
ROUNDS = 3


def run(setup: Setup) -> Iterator[Row]:
    with ExitStack() as stack:
        server = stack.enter_context(setup.server(setup.variant, "--compile", "off"))
        far = stack.enter_context(SlowLink(server.port, ROUND_TRIP))
        sessions = [stack.enter_context(setup.session(setup.variant, port)) for port in (server.port, far.port)]
        for sampler in SAMPLERS:
            request = replace(setup.request(), sampling_method=sampler)
            told = [session.conditioning.conditions(session.settings(request)) for session in sessions]
            for _ in range(2):  # uploads, and meets each graph
                for session, conditions in zip(sessions, told, strict=True):
                    sample(session, request, conditions)
            near, distant = [], []
            for _ in range(ROUNDS):
                near.append(sample(sessions[0], request, told[0]))
                distant.append(sample(sessions[1], request, told[1]))
            yield Row(
                f"step over {ROUND_TRIP * 1e3:.0f} ms, {sampler}, {setup.variant}", step_seconds(*distant) * 1e3, "ms",
                step_seconds(*near) * 1e3, "loopback", Mark(1.1),
                f"{setup.size}×{setup.size}, {request.steps} steps, with the noise sent and the latents read",
            )  # fmt: skip
