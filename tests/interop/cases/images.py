"""Images: windows, convolutions, pools, sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tests.interop.cases.base import F16, F32, Case, shape
from tests.support import ggml


def _images() -> Iterator[Case]:
    windows = (
        (1, 1, 0, 0, 1, 1), (1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1), (2, 1, 0, 2, 1, 1), (1, 3, 2, 1, 2, 1),
    )  # fmt: skip
    for window, to in itertools.product(windows, ("F32", "F16")):
        label = f"{''.join(map(str, window))}-{to}"
        yield Case("IM2COL", label, lambda b, w=window, t=to: b.im2col(
            b.x(3, 3, 4, 5, type="F16"), b.x(12, 11, 4, 2), *w, True, ggml.TYPES[t]), "exact")  # fmt: skip
    yield Case(
        "IM2COL",
        "F32-kernel",
        lambda b: b.im2col(b.x(3, 2, 4, 5), b.x(9, 8, 4, 3), 1, 1, 1, 1, 1, 1, True, F32),
        "exact",
    )
    yield Case("IM2COL", "1d", lambda b: b.im2col(b.x(3, 6, 5), b.x(20, 6, 2), 1, 0, 1, 0, 1, 0, False, F32), "exact")
    yield Case(
        "IM2COL",
        "1d-stride",
        lambda b: b.im2col(b.x(4, 6, 5, type="F16"), b.x(20, 6, 2), 3, 0, 0, 0, 2, 0, False, F16),
        "exact",
    )
    yield Case(
        "IM2COL",
        "view",
        lambda b: b.im2col(b.x(3, 3, 4, 5), b.part(9, 8, 4, 2, margin=(0, 0, 1, 1)), 1, 1, 1, 1, 1, 1, True, F32),
        "exact",
    )
    for window, kernel in itertools.product(windows, ("F32", "F16")):
        label = f"{''.join(map(str, window))}-{kernel}"
        bound = {"F32": "f32", "F16": "f16"}[kernel]
        yield Case(
            "CONV_2D",
            label,
            lambda b, w=window, t=kernel: b.conv_2d_direct(b.x(3, 3, 4, 6, type=t), b.x(12, 11, 4, 2), *w),
            bound,
        )
    yield Case("CONV_2D", "1x1", lambda b: b.conv_2d_direct(b.x(1, 1, 8, 6), b.x(5, 4, 8, 2), 1, 1, 0, 0, 1, 1))
    yield Case("CONV_2D", "view", lambda b: b.conv_2d_direct(b.x(3, 3, 4, 6), b.part(9, 8, 4, 2), 1, 1, 1, 1, 1, 1))
    for window in windows:
        label = "".join(map(str, window))
        yield Case("CONV_2D_DW", label, lambda b, w=window: b.conv_2d_dw_direct(b.x(3, 3, 1, 6), b.x(12, 11, 6, 2), *w))
    yield Case(
        "CONV_2D_DW",
        "channels-first",
        lambda b: b.conv_2d_dw_direct(
            b.shuffled(3, 3, 1, 6, axes=(3, 2, 0, 1)), b.shuffled(12, 11, 6, 2, axes=(2, 0, 1, 3)), *windows[1]
        ),
    )
    for stride, kernel in itertools.product((1, 2, 3), ("F16", "F32")):
        yield Case("CONV_TRANSPOSE_2D", f"{stride}-{kernel}", lambda b, s=stride, t=kernel: b.conv_transpose_2d_p0(
            b.x(3, 2, 4, 5, type=t), b.x(7, 6, 5, 1), s), "f16" if kernel == "F16" else "f32")  # fmt: skip
    for op, (k0, k1, s0, s1, p0, p1) in itertools.product(
        (0, 1), ((2, 2, 2, 2, 0, 0), (3, 3, 1, 1, 0, 0), (3, 2, 2, 1, 1, 0), (3, 3, 2, 2, 1, 1))
    ):
        label = f"{('max', 'mean')[op]}-{k0}{k1}{s0}{s1}{p0}{p1}"
        yield Case(
            "POOL_2D", label, lambda b, o=op, w=(k0, k1, s0, s1), p=(p0, p1): b.pool_2d(b.x(10, 9, 3, 2), o, *w, *p)
        )
    yield Case("POOL_2D", "F16", lambda b: b.pool_2d(b.x(10, 9, 3, 2, type="F16"), 1, 2, 2, 2, 2, 0, 0))
    for mode, label in ((0, "nearest"), (1, "bilinear"), (1 | 256, "corners")):
        for to in ((16, 10, 3, 2), (24, 15, 3, 2), (11, 7, 3, 2), (4, 3, 3, 2)):
            yield Case(
                "UPSCALE", f"{label}-{shape(*to)}", lambda b, m=mode, n=to: b.interpolate(b.x(8, 5, 3, 2), *n, m)
            )
    yield Case("UPSCALE", "channels", lambda b: b.interpolate(b.x(8, 5, 3, 1), 16, 10, 6, 2, 0))
    yield Case("UPSCALE", "view", lambda b: b.interpolate(b.part(8, 5, 3, 2), 16, 10, 3, 2, 0))


CASES = [*_images()]
