"""glibc's single-precision logarithm, sine and cosine to the bit, on numpy arrays.

stable-diffusion.cpp's noise for ``--rng cpu`` and ``std_default`` goes through ``logf``, ``cosf`` and ``sinf``: their
last bit decides whether two programs draw the same picture. numpy's own single-precision functions differ from glibc's
in about a tenth of all values, and correctly rounded ones in one of a hundred. glibc evaluates short polynomials in
double precision (the algorithms and constants are those of Arm's Optimized Routines: logf.c, sincosf.c); the same
arithmetic on float64 arrays gives the same bits, which the tests show for every value that the generators can produce.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

_hex = float.fromhex

_LN2 = _hex("0x1.62e42fefa39efp-1")
_LOG_POLY = tuple(map(_hex, ("-0x1.00ea348b88334p-2", "0x1.5575b0be00b6ap-2", "-0x1.ffffef20a4123p-2")))
_LOG_OFFSET = 0x3F330000
_LOG_TABLE = np.array(
    [
        [_hex(inverse), _hex(log)]
        for inverse, log in (
            ("0x1.661ec79f8f3bep+0", "-0x1.57bf7808caadep-2"), ("0x1.571ed4aaf883dp+0", "-0x1.2bef0a7c06ddbp-2"),
            ("0x1.49539f0f010bp+0", "-0x1.01eae7f513a67p-2"), ("0x1.3c995b0b80385p+0", "-0x1.b31d8a68224e9p-3"),
            ("0x1.30d190c8864a5p+0", "-0x1.6574f0ac07758p-3"), ("0x1.25e227b0b8eap+0", "-0x1.1aa2bc79c81p-3"),
            ("0x1.1bb4a4a1a343fp+0", "-0x1.a4e76ce8c0e5ep-4"), ("0x1.12358f08ae5bap+0", "-0x1.1973c5a611cccp-4"),
            ("0x1.0953f419900a7p+0", "-0x1.252f438e10c1ep-5"), ("0x1p+0", "0x0p+0"),
            ("0x1.e608cfd9a47acp-1", "0x1.aa5aa5df25984p-5"), ("0x1.ca4b31f026aap-1", "0x1.c5e53aa362eb4p-4"),
            ("0x1.b2036576afce6p-1", "0x1.526e57720db08p-3"), ("0x1.9c2d163a1aa2dp-1", "0x1.bc2860d22477p-3"),
            ("0x1.886e6037841edp-1", "0x1.1058bc8a07ee1p-2"), ("0x1.767dcf5534862p-1", "0x1.4043057b6ee09p-2"),
        )
    ]
)  # fmt: skip

_TWO_OVER_PI = _hex("0x1.45f306dc9c883p+23")  # times 2^24
_HALF_PI = _hex("0x1.921fb54442d18p+0")
_COS_POLY = tuple(
    map(_hex, ("-0x1.ffffffd0c621cp-2", "0x1.55553e1068f19p-5", "-0x1.6c087e89a359dp-10", "0x1.99343027bf8c3p-16"))
)
_SIN_POLY = tuple(map(_hex, ("-0x1.555545995a603p-3", "0x1.1107605230bc4p-7", "-0x1.994eb3774cf24p-13")))


def log(x: F32) -> F32:
    """The natural logarithm of positive, normal float32 values."""
    bits = x.view(np.uint32)
    offset = (bits - np.uint32(_LOG_OFFSET)).view(np.int32)
    entry = _LOG_TABLE[(offset >> 19) & 15]
    exponent = (offset >> 23).astype(np.float64)
    mantissa = (bits - (offset & np.int32(-(1 << 23))).view(np.uint32)).view(np.float32).astype(np.float64)
    r = mantissa * entry[..., 0] - 1.0
    base = entry[..., 1] + exponent * _LN2
    square = r * r
    a0, a1, a2 = _LOG_POLY
    y = a0 * square + (a1 * r + a2)
    return (y * square + (base + r)).astype(np.float32)


def sin(x: F32) -> F32:
    """The sine of float32 values between -120 and 120 (radians)."""
    return _sin_cos(x, 0)


def cos(x: F32) -> F32:
    """The cosine of float32 values between -120 and 120 (radians)."""
    return _sin_cos(x, 1)


def _sin_cos(x: F32, shift: int) -> F32:
    """The sine (``shift`` 0) or cosine (1): reduced to ±π/4, then one of two polynomials by quadrant."""
    wide = x.astype(np.float64)
    quadrant = ((wide * _TWO_OVER_PI).astype(np.int32) + 0x800000) >> 24
    wide -= quadrant * _HALF_PI
    square = wide * wide
    quadrant += shift
    s1, s2, s3 = _SIN_POLY
    cube = wide * square
    sine = (wide + cube * s1) + cube * square * (s2 + square * s3)
    c1, c2, c3, c4 = _COS_POLY
    fourth = square * square
    cosine = ((1.0 + square * c1) + fourth * c2) + fourth * square * (c3 + square * c4)
    value = np.where(quadrant & 1, cosine, sine)
    return np.where(quadrant & 2, -value, value).astype(np.float32)
