"""sd-server in a Ray cluster: pictures a minute on several devices, over what one device draws.

All devices are of this machine, so they have to take their time elsewhere: each is a server behind a link with a long
round trip, which a step waits for once. What is measured is the queue, the actors and what they tell, not arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from tests.cluster.process import cluster, until_there
from tests.support.process import ServerProcess
from tests.web.process import WebServer

from .proxy import SlowLink
from .rows import Mark, Row
from .setup import Setup

DEVICES = (1, 2, 4)
ROUND_TRIP = 1.0
STEPS = 10
PICTURES = 3
"""Of each device, behind a first one that uploads."""


def run(setup: Setup) -> Iterator[Row]:
    model = replace(setup, checkpoint_size="tiny").checkpoint("f16")
    alone = 0.0
    for count in DEVICES:
        with ExitStack() as stack:
            servers = [
                stack.enter_context(ServerProcess("--precision", "exact", "--device", "CPU")) for _ in range(count)
            ]
            links = [stack.enter_context(SlowLink(server.port, ROUND_TRIP)) for server in servers]
            names = [f"127.0.0.1:{link.port}" for link in links]
            address = stack.enter_context(cluster(*(f"rpc:{name}" for name in names)))
            options = ("-m", str(model), "--ray", address)
            web = stack.enter_context(WebServer(setup.folder / f"queue{count}", *options))
            until_there(web, *names)
            _draw(web, model.stem, count)
            began = time.perf_counter()
            _draw(web, model.stem, count * PICTURES)
            rate = 60 * count * PICTURES / (time.perf_counter() - began)
        alone = alone or rate
        yield Row(
            f"pictures a minute, {count} device{'s' * (count > 1)} in a Ray cluster", rate, "1/min", count * alone,
            f"{count} × one", Mark(0.9, at_least=True),
            f"64×64, {STEPS} steps, each device {ROUND_TRIP * 1e3:.0f} ms away",
        )  # fmt: skip


def _draw(web: WebServer, model: str, count: int) -> None:
    jobs = [web.submit(model=model, sample_params={"sample_steps": STEPS}) for _ in range(count)]
    for job in jobs:
        web.until(job, "completed")
