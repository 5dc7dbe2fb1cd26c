"""Second passes by hand: a request that begins with an enlarged picture, but for where its noise comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from sdrpc.diffusion import conditioning, sampling
from sdrpc.diffusion.rng import Rng, make_rng


@contextmanager
def its_noise(count: int) -> Iterator[None]:
    """Within it one picture that begins with another is drawn with the noise of a second pass: what follows the
    ``count`` numbers that the VAE had for its latents, where a picture usually begins anew."""
    made: list[Rng] = []

    def make(name: str, seed: int) -> Rng:
        rng = make_rng(name, seed)
        if made:
            rng.normal(count)
        made.append(rng)
        return rng

    with patch.object(conditioning, "make_rng", make), patch.object(sampling, "make_rng", make):
        yield
