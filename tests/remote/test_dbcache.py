"""Blocks that a server does not compute: the steps are those of diffusers' first block cache, and so is the picture."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diffusers.hooks import FirstBlockCacheConfig

import sdrpc
from bench.proxy import CountingProxy
from sdrpc.client import connect
from sdrpc.device import Device
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.schedules import make_sigmas
from sdrpc.diffusion.session import Session
from sdrpc.errors import InvalidValue
from sdrpc.runtime.cache import Cache
from sdrpc.runtime.chain import Chain
from tests.remote.test_ahead import QUEUES
from tests.support.pictures import BOUNDS, Case, Checkpoints, drawing, predicts, request
from tests.support.process import ServerProcess
from tests.support.references.draw import draw, psnr
from tests.support.trouble import Passage, Trouble

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers' scheduler with numpy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers, about itself
]

STEPS = 8
FLUX, WAN = Case("flux1-dev", "safetensors"), Case("wan", "safetensors")
THRESHOLDS = {FLUX: 0.55, WAN: 0.49}
"""For blocks of random numbers, which change more from one step to the next than trained ones; no step's change is as
near to them as sums differ."""


def asked(case: Case, **changes: Any) -> Request:
    option = f"Fn=1,warmup=0,threshold={THRESHOLDS[case]}"
    return replace(request(case), **{"steps": STEPS, "cache_mode": "dbcache", "cache_option": option, **changes})


@contextmanager
def counted(blocks: Any) -> Iterator[list[int]]:
    """How often each of the blocks computes something."""
    runs = [0] * len(blocks)

    def wrapped(number: int, forward: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            runs[number] += 1
            return forward(*arguments, **named)

        return run

    for number, block in enumerate(blocks):
        block.forward = wrapped(number, block.forward)
    yield runs


@pytest.fixture(scope="module")
def reused(checkpoints: Checkpoints) -> dict[Case, tuple[np.ndarray, int]]:
    """Diffusers' pictures with its cache, and how many of its evaluations left out blocks."""
    return {case: _with_first_block_cache(checkpoints, case) for case in THRESHOLDS}


def _with_first_block_cache(checkpoints: Checkpoints, case: Case) -> tuple[np.ndarray, int]:
    pipeline = checkpoints.made(case).pipeline()
    module = pipeline.transformer
    blocks = [*module.blocks] if case == WAN else [*module.transformer_blocks, *module.single_transformer_blocks]
    sigmas = make_sigmas("discrete", STEPS, predicts(case.family)).tolist()
    with counted(blocks) as runs:
        module.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLDS[case]))
        picture = draw(pipeline, replace(drawing(case), sigmas=sigmas)).pixels
    assert runs[-1] == runs[1] < runs[0]
    return picture, runs[0] - runs[-1]


def drawn(session: Session, wanted: Request) -> np.ndarray:
    if session.model.frames:
        (film,) = session.generate_video(wanted)
        return np.stack(list(film.frames))
    (picture,) = session.generate(wanted)
    return picture.image


@pytest.mark.parametrize("case", THRESHOLDS, ids=str)
def test_a_picture_is_that_of_diffusers_with_its_cache(
    case: Case,
    checkpoints: Checkpoints,
    reused: dict[Case, tuple[np.ndarray, int]],
    ports: list[int],
    cache: Cache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Diffusers asks for one prompt after the other, we for a batch of both where there are two."""
    picture, left_out = reused[case]
    together = 2 if (request(case).cfg_scale or 1) > 1 else 1
    with CountingProxy(ports[0]) as proxy, caplog.at_level(logging.INFO, "sdrpc"):
        (device,) = connect([f"127.0.0.1:{proxy.port}"])
        with Session.open(checkpoints.files(case), device, cache) as session:
            drawn(session, asked(case, steps=1))  # uploads
            before = proxy.sent + proxy.received
            found = drawn(session, asked(case))
            crossed = proxy.sent + proxy.received - before
            blocks = session.model["diffusion"].blocks
        device.close()
    assert psnr(found, picture) >= BOUNDS["exact"]
    said = [record.message for record in caplog.records if "blocks were not computed" in record.message]
    expected = f"{blocks - 1} of {blocks} blocks were not computed in {left_out // together} of {STEPS} evaluations"
    assert expected in said[-1]
    assert "s less" in said[-1]
    between_blocks = 4 * 256 * (256 + 4 * 8)  # of FLUX: a text and a picture of so many tokens
    assert case != FLUX or crossed < 4 * found.size + between_blocks, "it stays on the device"


def test_latents_that_stay_on_the_device_as_well(
    checkpoints: Checkpoints, reused: dict[Case, tuple[np.ndarray, int]], cache: Cache
) -> None:
    events: list[Event] = []
    with ServerProcess("--precision", "exact", python=(sys.executable, "-c", QUEUES)) as server:
        (device,) = connect([f"127.0.0.1:{server.port}"])
        assert device.queues
        with Session.open(checkpoints.files(FLUX), device, cache) as session:
            (picture,) = session.generate(asked(FLUX), events.append)
        device.close()
    assert psnr(picture.image, reused[FLUX][0]) >= BOUNDS["exact"]
    assert [event.done for event in events if event.stage == "sample"] == list(range(STEPS + 1))


def test_a_server_that_is_lost_on_the_way(
    checkpoints: Checkpoints, reused: dict[Case, tuple[np.ndarray, int]], ports: list[int], cache: Cache
) -> None:
    """What was between blocks is gone with it: the picture begins anew, and no step is told twice."""
    events: list[Event] = []
    with Trouble(ports[0], happens=Passage.cut) as trouble:
        (device,) = connect([trouble.endpoint])

        def on_event(event: Event) -> None:
            events.append(event)
            if event.stage == "sample" and event.done == STEPS // 2:
                trouble.at = len(trouble.requests)

        with Session.open(checkpoints.files(FLUX), device, cache) as session:
            (picture,) = session.generate(asked(FLUX), on_event)
        device.close()
        assert trouble.connections == 2
    assert psnr(picture.image, reused[FLUX][0]) >= BOUNDS["exact"]
    assert [event.done for event in events if event.stage == "sample"] == list(range(STEPS + 1))


def test_what_it_does_not_go_with(checkpoints: Checkpoints, device: Device, cache: Cache, ports: list[int]) -> None:
    flux, unet = checkpoints.files(FLUX), checkpoints.files(Case("sd1", "safetensors"))
    other = sdrpc.devices(rpc=f"127.0.0.1:{ports[1]}")["RPC0"]
    both = {"diffusion": Chain((device, other)), "all": device}
    for files, place, option, says in (
        (unet, device, "Fn=1", "Stable Diffusion 1.x has no row of blocks"),
        (flux, device, "", "Fn=8,Bn=0: of the 4 blocks of the diffusion model none is left between these; 3 together"),
        (flux, device, "Fn=1,Bn=3", "Fn=1,Bn=3: of the 4 blocks"),
        (flux, both, "Fn=1", "diffusion is not on one device as a whole"),
    ):
        with Session.open(files, place, cache) as session, pytest.raises(InvalidValue, match=re.escape(says)):
            next(session.generate(asked(FLUX, cache_option=option)))
    other.close()
