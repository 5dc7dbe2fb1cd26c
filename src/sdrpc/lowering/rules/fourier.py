"""Discrete Fourier transforms, as products with matrices of sines and cosines: FreeU filters small pictures so."""

# ruff: noqa: ARG001  all rules are called alike, whether or not they need what they get

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod

import numpy as np

from ...errors import CaptureError
from ..emitter import Complex, Emitter, Value
from .base import Out, filled, positive, rule

LONGEST = 4096
"""Elements of a dimension that is transformed: the matrices have as many rows and columns."""


@rule("_fft_c2c")
def fft(e: Emitter, out: Out, x: Value | Complex, dim: Sequence[int], normalization: int, forward: bool) -> Complex:
    """X[k] = Σ x[n] exp(∓2πi kn / N) for each dimension in turn; ``normalization``: 0 none, 1 by √N, 2 by N."""
    real, imaginary = (x.real, x.imaginary) if isinstance(x, Complex) else (x, filled(e, Out(x.shape, "f"), 0))
    sizes = [x.shape[positive(d, len(x.shape))] for d in dim]
    for d in dim:
        real, imaginary = _along(e, real, imaginary, positive(d, len(x.shape)), -1 if forward else 1)
    factor = 1 / (1, math.sqrt(prod(sizes)), prod(sizes))[normalization]
    return Complex(e.scale(real, factor), e.scale(imaginary, factor))


def _along(e: Emitter, real: Value, imaginary: Value, dim: int, sign: int) -> tuple[Value, Value]:
    n = real.shape[dim]
    if n > LONGEST:
        raise CaptureError(f"a Fourier transform of {n:,} elements, more than {LONGEST:,}")
    turns = np.outer(np.arange(n), np.arange(n)) % n * (2 * np.pi / n)
    cosines, sines = (e.constant(f(turns).astype(np.float32)) for f in (np.cos, np.sin))

    def times(matrix: Value, x: Value) -> Value:
        last = len(x.shape) - 1
        rows = e.transpose(e.f32(x), dim, last)
        product = e.mul_mat(matrix, e.reshape(rows, (prod(rows.shape[:-1]), n)))
        return e.transpose(e.reshape(product, rows.shape), dim, last)

    mixed = times(sines, real), times(sines, imaginary)
    return (
        e.binary("ADD", times(cosines, real), e.scale(mixed[1], -sign)),
        e.binary("ADD", times(cosines, imaginary), e.scale(mixed[0], sign)),
    )
