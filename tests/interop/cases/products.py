"""Matrix products."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tests.interop.cases.base import FLOATS, QUANTIZED, Case, shape


def _products() -> Iterator[Case]:
    bounds = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
    for kind in (*FLOATS, *QUANTIZED):
        bound = bounds.get(kind, "quantized")
        for k, m, n, batch, repeat in (
            (256, 16, 1, (1, 1), (1, 1)), (512, 33, 9, (1, 1), (1, 1)), (256, 7, 5, (3, 2), (1, 1)),
            (256, 16, 8, (2, 1), (2, 3)),
        ):  # fmt: skip
            label = f"{kind}-{k}x{m}x{n}-{shape(*batch)}-{shape(*repeat)}"
            yield Case("MUL_MAT", label, lambda b, t=kind, k=k, m=m, n=n, s=batch, r=repeat: b.mul_mat(
                b.x(k, m, *s, type=t), b.x(k, n, s[0] * r[0], s[1] * r[1])), bound)  # fmt: skip
    yield Case("MUL_MAT", "F16-F16", lambda b: b.mul_mat(b.x(64, 9, type="F16"), b.x(64, 5, type="F16")), "f16")
    yield Case("MUL_MAT", "BF16-BF16", lambda b: b.mul_mat(b.x(64, 9, type="BF16"), b.x(64, 5, type="BF16")), "bf16")
    for k in (1, 33, 77):
        yield Case("MUL_MAT", f"F32-odd{k}", lambda b, k=k: b.mul_mat(b.x(k, 5, 2), b.x(k, 3, 2)))
        yield Case("MUL_MAT", f"F16-odd{k}", lambda b, k=k: b.mul_mat(b.x(k, 5, 2, type="F16"), b.x(k, 3, 2)), "f16")
    for kind, axes in itertools.product(("F32", "F16"), ((0, 2, 1, 3), (0, 1, 3, 2), (0, 3, 2, 1))):
        label = f"permuted-{kind}-{''.join(map(str, axes))}"
        yield Case("MUL_MAT", label, lambda b, t=kind, a=axes: b.mul_mat(
            b.shuffled(32, 6, 4, 2, axes=a, type=t), b.shuffled(32, 5, 4, 2, axes=a)), bounds[kind])  # fmt: skip
    yield Case("MUL_MAT", "views", lambda b: b.mul_mat(b.part(32, 6, 2), b.part(32, 5, 2)))
    yield Case(
        "MUL_MAT",
        "weight-view",
        lambda b: b.mul_mat(b.part(256, 6, type="Q8_0", margin=(0, 2, 0, 0)), b.x(256, 5)),
        "quantized",
    )
    yield Case("MUL_MAT", "f32-wanted", lambda b: b.prec_f32(b.mul_mat(b.x(64, 9, type="F16"), b.x(64, 5))), "f16")
    for kind in ("F32", "F16", "Q4_0", "Q8_0"):
        yield Case(
            "OUT_PROD", kind, lambda b, t=kind: b.out_prod(b.x(32, 6, type=t), b.x(8, 6)), bounds.get(kind, "f32")
        )
    yield Case("OUT_PROD", "batch", lambda b: b.out_prod(b.x(16, 6, 2, 3), b.x(8, 6, 2, 3)))
    yield Case("OUT_PROD", "repeat", lambda b: b.out_prod(b.x(16, 6), b.x(8, 6, 2, 3)))


CASES = [*_products()]
