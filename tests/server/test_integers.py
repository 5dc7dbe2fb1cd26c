"""What stable-diffusion.cpp's client (protocol 5.0.1) sends for INT8 ConvRot weights, over the wire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sdrpc.ggml import params
from sdrpc.ggml.dialect import dialects
from sdrpc.server import Server
from tests.server.conftest import CountingDevice, Scene
from tests.support import reference_integers
from tests.support.client import RawClient

K, ROWS, N = 64, 5, 8
PACKED = (K, 9)
"""Five rows fill up to eight; the ninth holds their scales."""
AT = {"x": 0, "weight": 2048, "scales": 3072, "bias": 3328, "packed": 3584, "y": 4608}


class Linear:
    """A layer as the client says it: rotated and quantized rows, then their product with a matrix in I8."""

    def __init__(self, client: RawClient, **changed: dict[str, Any]) -> None:
        self.client, buffer = client, client.buffer(8192)
        fields: dict[str, dict[str, Any]] = {
            "x": {"ne": (K, ROWS)},
            "weight": {"ne": (K, N), "type": "I8"},
            "scales": {"ne": (N,)},
            "bias": {"ne": (N,)},
            "packed": {"ne": PACKED, "type": "I8", "op": "QUANTIZE_I8_CONVROT", "src": (1,),
                       "params": params.Rotation(K)},
            "y": {"ne": (N, ROWS), "op": "MUL_MAT", "src": (2, 5, 3, 4), "params": params.MulMat(group=K)},
        }  # fmt: skip
        self.tensors = {
            name: client.record(buffer, id=i, at=AT[name], name=name.encode(), **{**one, **changed.get(name, {})})
            for i, (name, one) in enumerate(fields.items(), 1)
        }

    def compute(self, *nodes: str) -> None:
        self.client.compute([self.tensors[name].id for name in nodes], list(self.tensors.values()))


@pytest.fixture(params=["5.0.1", "7.0.0"])
def scene(request: pytest.FixtureRequest, device: CountingDevice, caplog: pytest.LogCaptureFixture) -> Iterator[Scene]:
    with Server([device], dialects()[request.param]) as server, Scene(server, caplog) as scene:
        yield scene


@pytest.mark.parametrize("at_once", [True, False], ids=["one graph", "two graphs"])
def test_a_linear_layer(scene: Scene, at_once: bool) -> None:
    """In one graph the packed rows are a value, in two they are bytes that the client left there."""
    layer = Linear(scene.client())
    random = np.random.default_rng(1)
    x, bias = random.standard_normal((ROWS, K)).astype("f4"), random.standard_normal(N).astype("f4")
    weight, scales = random.integers(-128, 128, (N, K)).astype("i1"), random.uniform(0.01, 0.1, N).astype("f4")
    for name, values in (("x", x), ("weight", weight), ("scales", scales), ("bias", bias)):
        layer.client.set(layer.tensors[name], values)
    for nodes in (("packed", "y"),) if at_once else (("packed",), ("y",)):
        layer.compute(*nodes)
    numbers, scale = reference_integers.quantized(x.astype("f8"), K)
    packed = layer.client.get(layer.tensors["packed"], K * 9)
    assert packed[: ROWS * K] == numbers.astype("i1").tobytes()
    np.testing.assert_allclose(np.frombuffer(packed, "<f4", ROWS, 8 * K), scale[:, 0], rtol=1e-6)
    y = np.frombuffer(layer.client.get(layer.tensors["y"], 4 * N * ROWS), "<f4").reshape(ROWS, N)
    np.testing.assert_allclose(y, numbers @ weight.T.astype("f8") * scale * scales + bias, rtol=1e-5, atol=1e-5)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no room for scales": ({"packed": {"ne": (K, 8)}}, r"QUANTIZE_I8_CONVROT.*declared shape \[64, 8, 1, 1\]"),
    "rotation that is no power of 4": ({"packed": {"params": params.Rotation(32)}}, "rotation of 32 numbers"),
    "more rows than are packed": (
        {"y": {"ne": (N, 9)}},
        r"MUL_MAT.*\[64, 9, 1, 1\] bytes are not those of 9 rows",
    ),
    "as many rows as fit, in huge dimensions": (
        {"y": {"ne": (N, 2**31 - 1, 2**31 - 1), "nb": (4, 4, 4, 4)}}, "MUL_MAT"),
    "a scale too few": ({"scales": {"ne": (N - 1,)}}, "MUL_MAT.*7 scales or biases for 8 rows"),
    "a bias in integers": ({"bias": {"type": "I32"}}, "MUL_MAT.*scales or bias of type I32"),
    "weights of 4 bits": ({"y": {"params": params.MulMat(0, 0, K, 1)}}, "MUL_MAT.*packed as kind 1"),
    "weights of another length": ({"weight": {"ne": (K // 2, N)}}, "MUL_MAT.*can't"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_ends_one_connection(scene: Scene, what: str) -> None:
    changed, reason = WRONG[what]
    layer = Linear(scene.client(), **changed)
    layer.compute("packed", "y")
    scene.ends(layer.client, reason)
