"""Bytes that a sampling step sends and receives, over what it can't do without."""

from __future__ import annotations

from collections.abc import Iterator

from .proxy import CountingProxy
from .rows import Mark, Row
from .sampling import sample
from .setup import Setup

STEPS = 3


def run(setup: Setup) -> Iterator[Row]:
    counts: list[tuple[int, int]] = []
    with (
        setup.server(setup.variant) as server,
        CountingProxy(server.port) as proxy,
        setup.session(setup.variant, proxy.port) as session,
    ):
        request = setup.request(steps=STEPS)
        conditions = session.conditioning.conditions(session.settings(request))
        noted = sample(session, request, conditions, lambda _: counts.append((proxy.sent, proxy.received)))
    # the first step uploads and sends the graph; what each later one costs is the difference of two runs' bytes
    (sent_before, received_before), (sent_after, received_after) = counts[1], counts[-1]
    sent, received = (sent_after - sent_before) / (STEPS - 1), (received_after - received_before) / (STEPS - 1)
    one = noted.latents.nbytes
    needed_out, needed_back = one + 4, 2 * one  # latents and the timestep; the prediction of a batch of two
    yield Row(
        "bytes per step, both ways", sent + received, "B", needed_out + needed_back,
        "latents + timestep, prediction", Mark(1.2),
        f"{setup.size}×{setup.size}; {sent:,.0f} out, {received:,.0f} back",
    )  # fmt: skip
