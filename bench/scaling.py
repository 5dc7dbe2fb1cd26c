"""Several devices: pictures that each draws at the same time, prompts that two of them evaluate at once, and a model
whose layers are on two of them, over what one device does.

Each device has a server of its own. On GPUs there are as many as the machine has. On a CPU servers would only take each
other's cores, so each is behind a link with a long round trip and the model is tiny: then what is measured is that
nobody waits who need not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from sdrpc.client import connect
from sdrpc.device import Device
from sdrpc.diffusion.session import Session
from sdrpc.runtime.chain import Chain, Lanes, Placed
from tests.support.process import ServerProcess

from .proxy import SlowLink
from .rows import Mark, Row
from .sampling import sample
from .setup import Setup

DEVICES = (1, 2, 4)
ROUND_TRIP = 0.2
PICTURES = 4
"""Of each device, behind a first one that uploads."""


def run(setup: Setup) -> Iterator[Row]:
    if setup.on_cpu:
        setup = replace(setup, checkpoint_size="tiny", size=64)
    most = DEVICES[-1] if setup.on_cpu else torch.cuda.device_count()
    with opened(setup, most) as devices:
        yield from _pictures(setup, devices)
        if most > 1:
            one = _step(setup, devices[0])
            two = _step(setup, Lanes((Chain((devices[0],)), Chain((devices[1],)))))
            what = "steps a second, prompt and negative prompt on two devices"
            yield Row(what, 1 / two, "1/s", 1 / one, "one device", Mark(1.7, at_least=True), _note(setup))
            cut = _step(setup, Chain((devices[0], devices[1])))
            yield Row("step, layers on two devices", cut * 1e3, "ms", one * 1e3, "one device", None, _note(setup))


def _pictures(setup: Setup, devices: list[Device]) -> Iterator[Row]:
    alone = 0.0
    for count in DEVICES:
        if count > len(devices):
            return
        place = Lanes(tuple(Chain((device,)) for device in devices[:count]))
        with _session(setup, place) as session:
            list(session.generate(replace(setup.request(), batch_count=count)))
            began = time.perf_counter()
            list(session.generate(replace(setup.request(), batch_count=count * PICTURES)))
            rate = count * PICTURES / (time.perf_counter() - began)
        alone = alone or rate
        what = f"pictures a second, {count} device{'s' * (count > 1)}"
        yield Row(what, rate, "1/s", count * alone, f"{count} × one", Mark(0.95, at_least=True), _note(setup))


def _step(setup: Setup, place: Placed) -> float:
    """Seconds of a step with the diffusion model there."""
    with _session(setup, place) as session:
        request = setup.request()
        settings = session.settings(request)
        told, lanes = session.conditions(settings), range(len(place.chains) if isinstance(place, Lanes) else 1)
        sample(session, request, told)
        for _ in range(2):
            began = time.perf_counter()
            session.sample(settings, request.seed, told, lanes=lanes)
        return (time.perf_counter() - began) / settings.steps


@contextmanager
def opened(setup: Setup, count: int) -> Iterator[list[Device]]:
    """One device each of so many servers."""
    with ExitStack() as stack:
        found: list[Device] = []
        for number in range(count):
            name = "CPU" if setup.on_cpu else f"CUDA{number}"
            # what a compiler has ready in the middle of a measurement would be in some of the numbers and not in others
            options = ("--device", name, "--precision", setup.variant.precision, "--compile", "off")
            port = stack.enter_context(ServerProcess(*options)).port
            if setup.on_cpu:
                port = stack.enter_context(SlowLink(port, ROUND_TRIP)).port
            (device,) = connect([f"127.0.0.1:{port}"])
            device.name = f"RPC{number}"
            stack.callback(device.close)
            found.append(device)
        yield found


@contextmanager
def _session(setup: Setup, place: Placed) -> Iterator[Session]:
    with Session.open(setup.checkpoint(setup.variant.type), place, setup.cache) as session:
        yield session


def _note(setup: Setup) -> str:
    away = f", each device {ROUND_TRIP * 1e3:.0f} ms away" if setup.on_cpu else ""
    return f"{setup.size}×{setup.size}, {setup.steps} steps, {setup.variant}{away}"
