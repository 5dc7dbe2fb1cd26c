"""Prompt weights are applied as stable-diffusion.cpp applies them."""

from __future__ import annotations

import numpy as np
import pytest

from sdrpc.prompts import apply_weights


def test_weights_scale_and_keep_the_mean() -> None:
    hidden = np.random.default_rng(0).normal(0.3, 1, (77, 16)).astype(np.float32)
    weights = np.ones(77, np.float32)
    weights[3] = 1.5
    weighted = apply_weights(hidden, weights)
    assert weighted.mean() == pytest.approx(hidden.mean(), rel=1e-5)
    ratio = weighted / hidden
    assert (ratio[3] / ratio[0]).mean() == pytest.approx(1.5, rel=1e-5)
    np.testing.assert_array_equal(apply_weights(hidden, np.ones(77, np.float32)), hidden)


def test_a_mean_of_rounding_errors_scales_nothing() -> None:
    hidden = np.random.default_rng(0).normal(0, 1, (77, 768))
    hidden = ((hidden - hidden.mean(1, keepdims=True)) / hidden.std(1, keepdims=True)).astype(np.float32)
    weights = np.ones(77, np.float32)
    weights[3] = 1.3
    np.testing.assert_array_equal(apply_weights(hidden, weights), hidden * weights[:, None])
