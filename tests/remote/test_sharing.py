"""Two users of one model on a server's accelerator: its memory holds the weights once, and both get their pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from sdrpc.client import connect
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.engine import sharing
from sdrpc.engine.memory import LocalBuffer
from sdrpc.engine.precision import Precision
from sdrpc.runtime.cache import Cache
from sdrpc.server import Server
from tests.support.accelerator import Untouchable

REQUEST = Request("a cat", width=64, height=64, steps=2, sampling_method="euler")
FAST = Precision("fast", torch.bfloat16, channels_last=True)


@contextmanager
def user(server: Server, tiny: Path, graphs: Path) -> Iterator[Session]:
    with ExitStack() as stack:
        (device,) = connect([server.endpoint])
        stack.callback(device.close)
        yield stack.enter_context(Session.open(tiny, device, Cache(graphs)))


def draw(session: Session) -> np.ndarray:
    return next(iter(session.generate(REQUEST))).image


def test_weights_are_there_once_for_both(tiny: Path, graphs: Path) -> None:
    device = Untouchable("CUDA0", torch.device("cpu"), FAST, threads=1)

    def weights() -> list[LocalBuffer]:
        return [buffer for buffer in device._buffers.values() if buffer.size >= sharing.LEAST]

    with Server([device]) as server, user(server, tiny, graphs) as first:
        alone = draw(first)
        one, kept = weights(), device._weights.used
        assert len(one) >= 3, "text encoder, diffusion model and VAE"
        with user(server, tiny, graphs) as second:
            assert np.array_equal(draw(second), alone)
            assert len(weights()) == 2 * len(one)
            assert {buffer.storage for buffer in weights()} == {buffer.storage for buffer in one}
            assert device._storages.spared >= sum(buffer.size for buffer in one)
            assert device._weights.used < 1.1 * kept, "and in other forms, too"
            assert np.array_equal(draw(first), alone)
            first.close()
            assert np.array_equal(draw(second), alone), "whoever had them first"
    device.close()
