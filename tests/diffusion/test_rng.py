"""Noise equals stable-diffusion.cpp's to the bit."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch

from sdrpc.diffusion import libm
from sdrpc.diffusion.rng import BLOCK, RNGS, Philox, make_rng
from sdrpc.errors import InvalidValue


def test_noise_has_the_bits_of_sd_cpp(sdcpp: dict[str, Any]) -> None:
    for key, digest in sdcpp["noise"].items():
        name, seed, sizes = key.split()
        rng = make_rng(name, int(seed))
        drawn = b"".join(rng.normal(int(size)).astype("<f4").tobytes() for size in sizes.split(","))
        assert sha256(drawn).hexdigest() == digest, key


def test_noise_of_several_blocks_is_that_of_one() -> None:
    count = 2 * BLOCK + 5
    rng, whole = Philox(1 << 40 | 3), Philox(1 << 40 | 3)
    for offset in range(2):
        np.testing.assert_array_equal(rng.normal(count), whole._some(offset, 0, count))


@pytest.mark.parametrize("name", ["log", "sin", "cos"])
def test_libm_has_glibcs_bits_for_every_uniform_value(name: str, sdcpp: dict[str, Any]) -> None:
    digest = sha256()
    for start in range(0, 1 << 24, 1 << 20):
        uniform = np.arange(start, start + (1 << 20), dtype=np.float32) * np.float32(2.0**-24)
        if name == "log":
            values = libm.log(np.float32(1) - uniform)
        else:
            values = getattr(libm, name)(np.float32(2 * np.float32(np.pi)) * uniform)
        digest.update(values.astype("<f4").tobytes())
    assert digest.hexdigest() == sdcpp["libm"][name]


def test_cpu_noise_is_torchs_up_to_the_last_bits() -> None:
    torch.manual_seed(42)
    expected = torch.randn(4, 8, 8).numpy().reshape(-1)
    assert np.allclose(make_rng("cpu", 42).normal(256), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RNGS)
def test_no_noise_and_normal_noise(name: str) -> None:
    rng = make_rng(name, 1)
    assert rng.normal(0).shape == (0,)
    values = rng.normal(100_000)
    assert values.dtype == np.float32
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "seed", "field"), [("philox", 1, "rng"), ("cuda", -1, "seed"), ("cpu", 1 << 63, "seed")]
)
def test_names_and_seeds_that_do_not_exist(name: str, seed: int, field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        make_rng(name, seed)
    assert caught.value.field == field
