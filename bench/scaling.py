"""Several devices: pictures that each draws at the same time, prompts that two of them evaluate at once, and a model
whose layers are on two of them, over what one device does.

Each device has a server of its own, but where it says otherwise. On GPUs there are as many as the machine has. On a CPU
servers would only take each other's cores, so each is behind a link with a long round trip and the model is tiny: then
what is measured is that nobody waits who need not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from sdrpc.cli.entry import threads_take_turns
from sdrpc.client import connect
from sdrpc.device import Device
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.session import Session
from sdrpc.runtime.chain import Chain, Lanes, Placed
from tests.support.process import ServerProcess

from . import prompts
from .proxy import SlowLink
from .rows import Mark, Row
from .sampling import Sampled, sample
from .setup import Setup

PICTURES, PROMPTS, LAYERS = PARTS = ("pictures", "prompts", "layers")
DEVICES = (2, 4)
ROUND_TRIP = 0.2
OF_EACH = 4
"""Pictures of each device, behind a first one that uploads."""


def run(setup: Setup) -> Iterator[Row]:
    if setup.on_cpu:
        setup = replace(setup, checkpoint_size="tiny", size=64)
    most, parts = DEVICES[-1] if setup.on_cpu else torch.cuda.device_count(), setup.families.parts
    threads_take_turns()  # as the commands do
    with opened(setup, most) as devices:
        alone = 0.0
        if PICTURES in parts:
            alone, of_one = _side_by_side(setup, devices[:1])
            yield Row("pictures a second, 1 device", alone, "1/s", None, "", None, f"{_note(setup)}; {of_one}")
            yield from _pictures(setup, devices, alone)
        if most > 1 and {PROMPTS, LAYERS} & set(parts):
            with in_pairs(setup, devices) as pairs:
                yield from _in_pairs(setup, Chain((devices[0],)), pairs)
    if most > 1 and PICTURES in parts and not setup.on_cpu:
        with opened(setup, most, together=True, apart=True) as devices:
            yield from _pictures(setup, devices, alone, " of one server")


def _in_pairs(setup: Setup, one: Chain, pairs: Mapping[str, Chain]) -> Iterator[Row]:
    if PROMPTS in setup.families.parts:
        yield from prompts.rows(partial(_sampled, setup), one, pairs, _note(setup), prompts.MARK)
    if LAYERS in setup.families.parts:
        alone = _sampled(setup, one).seconds * 1e3
        for where, pair in pairs.items():
            cut = _sampled(setup, pair).seconds * 1e3
            yield Row(f"step, layers on two devices of {where}", cut, "ms", alone, "one device", None, _note(setup))


def _pictures(setup: Setup, devices: list[Device], alone: float, where: str = "") -> Iterator[Row]:
    """Of several devices, over what one of them draws in a second."""
    for count in DEVICES:
        if count <= len(devices):
            rate, parts = _side_by_side(setup, devices[:count])
            what, mark = f"pictures a second, {count} devices{where}", Mark(0.95, at_least=True)
            yield Row(what, rate, "1/s", count * alone, f"{count} × one", mark, f"{_note(setup)}; {parts}")


def _side_by_side(setup: Setup, devices: list[Device]) -> tuple[float, str]:
    """Pictures a second, and of what a picture's time consists."""
    sampled: dict[int, float] = {}

    def noted(event: Event) -> None:
        if event.stage == "sample":
            sampled[event.picture] = event.seconds

    count = OF_EACH * len(devices)
    with _session(setup, Lanes(tuple(Chain((device,)) for device in devices))) as session:
        list(session.generate(replace(setup.request(), batch_count=len(devices))))
        began, computed = time.perf_counter(), time.process_time()
        list(session.generate(replace(setup.request(), batch_count=count), noted))
        seconds, here = time.perf_counter() - began, time.process_time() - computed
    took = [1e3 * each for each in sampled.values()]
    steps = f"its steps {median(took):.0f} ms, {min(took):.0f} to {max(took):.0f}"
    return count / seconds, f"of a picture {steps}, {1e3 * here / count:.0f} ms of the client's processor"


def _sampled(setup: Setup, place: Placed, guided: bool = True) -> Sampled:
    """A picture with the diffusion model there."""
    with _session(setup, place) as session:
        request = setup.request() if guided else replace(setup.request(), cfg_scale=1.0)
        settings = session.settings(request)
        told = session.conditioning.conditions(settings)
        lanes = range(len(place.chains) if isinstance(place, Lanes) else 1)
        sample(session, request, told)
        for _ in range(2):
            began = time.perf_counter()
            latents = session.sampling.sample(settings, request.seed, told, lanes=lanes)
        return Sampled(latents, (time.perf_counter() - began) / settings.steps)


@contextmanager
def in_pairs(setup: Setup, apart: list[Device]) -> Iterator[dict[str, Chain]]:
    """Pairs of devices by where they are: the first two of these, which have a server each, and two of one server,
    where the machine has as many."""
    with ExitStack() as stack:
        pairs = {"two servers": apart[:2]}
        if not setup.on_cpu:
            pairs["one server"] = stack.enter_context(opened(setup, 2, together=True))
        yield {where: Chain(tuple(pair)) for where, pair in pairs.items()}


@contextmanager
def opened(setup: Setup, count: int, together: bool = False, apart: bool = False) -> Iterator[list[Device]]:
    """So many devices, each of a server of its own, or all ``together`` of one, over one connection or ``apart``."""
    with ExitStack() as stack:
        found: list[Device] = []
        names = ["CPU" if setup.on_cpu else f"CUDA{number}" for number in range(count)]
        for offered in [",".join(names)] if together else names:
            # what a compiler has ready in the middle of a measurement would be in some of the numbers and not in others
            options = ("--device", offered, "--precision", setup.variant.precision, "--compile", "off")
            port = stack.enter_context(ServerProcess(*options)).port
            if setup.on_cpu:
                port = stack.enter_context(SlowLink(port, ROUND_TRIP)).port
            for device in connect([f"127.0.0.1:{port}"], apart=apart):
                stack.callback(device.close)
                device.name = f"RPC{len(found)}"
                found.append(device)
        yield found


@contextmanager
def _session(setup: Setup, place: Placed) -> Iterator[Session]:
    with Session.open(setup.checkpoint(setup.variant.type), place, setup.cache) as session:
        yield session


def _note(setup: Setup) -> str:
    away = f", each device {ROUND_TRIP * 1e3:.0f} ms away" if setup.on_cpu else ""
    return f"{setup.size}×{setup.size}, {setup.steps} steps, {setup.variant}{away}"
