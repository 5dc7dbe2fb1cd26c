"""Each fusion on a small graph: once where it must fire, once beside where it must not. The result is right in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from sdrpc.engine import LocalDevice
from sdrpc.engine.fuse import RULES
from sdrpc.ggml import build as b
from sdrpc.ggml.params import Eps, GroupNorm, Im2Col, Scale, SoftMax, Unary, Window3D
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import F16
from tests.engine.compare import Leaves, check, error, place
from tests.support import reference

Case = Callable[[Leaves], Sequence[Tensor]]


class Steps(list[Tensor]):
    """Nodes in order; adding one gives it back."""

    def do(self, node: Tensor) -> Tensor:
        self.append(node)
        return node


def convolution(
    *,
    batch: int = 1,
    kernel_first: bool = False,
    taps: int = 3,
    bias: bool = True,
    used_twice: bool = False,
    outputs: int = 7,
) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        s = Steps()
        kernel, x = leaves.normal(taps, taps, 5, outputs, type="F16"), leaves.normal(9, 8, 5, batch)
        pad = taps // 2
        columns = s.do(b.node("IM2COL", kernel, x, params=Im2Col(1, 1, pad, pad, 1, 1, 1), type=F16))
        rows = s.do(b.reshape(columns, columns.ne[0], 72 * batch))
        flat = s.do(b.reshape(kernel, columns.ne[0], outputs))
        if kernel_first:
            product = s.do(b.mul_mat(flat, rows))
            image = s.do(b.permute(s.do(b.reshape(product, outputs, 9, 8, batch)), 2, 0, 1, 3))
        else:
            product = s.do(b.mul_mat(rows, flat))
            image = s.do(b.permute(s.do(b.reshape(product, 9, 8, batch, outputs)), 0, 1, 3, 2))
        y = s.do(b.cont(image))
        if bias:
            row = s.do(b.reshape(leaves.normal(outputs), 1, 1, outputs))
            y = s.do(b.node("ADD", y, row))
        if used_twice:
            y = s.do(b.node("ADD", y, s.do(b.cont(s.do(b.reshape(product, *y.ne))))))
        return s

    return case


def convolution_3d(*, batch: int = 1, used_twice: bool = False) -> Case:
    """As ggml_conv_3d says it."""

    def case(leaves: Leaves) -> list[Tensor]:
        s = Steps()
        kernel, x = leaves.normal(3, 3, 2, 5 * 4, type="F16"), leaves.normal(7, 6, 4, 5 * batch)
        params = Window3D(1, 1, 1, 1, 1, 0, 1, 1, 1, channels=5)
        columns = s.do(b.node("IM2COL_3D", kernel, x, params=params, type=F16))
        rows = s.do(b.reshape(columns, columns.ne[0], 42 * 3 * batch))
        product = s.do(b.mul_mat(rows, s.do(b.reshape(kernel, columns.ne[0], 4))))
        images = s.do(b.permute(s.do(b.reshape(product, 42, 3, batch, 4)), 0, 1, 3, 2))
        y = s.do(b.reshape(s.do(b.cont(images)), 7, 6, 3, 4 * batch))
        y = s.do(b.node("UNARY", y, params=Unary("SILU")))
        if used_twice:
            s.do(b.node("ADD", y, s.do(b.reshape(product, *y.ne))))
        return s

    return case


def linear(*, row: bool = True, used_twice: bool = False) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        product = b.mul_mat(leaves.normal(12, 7, type="F16"), leaves.normal(12, 5, 3))
        added = b.node("ADD", product, leaves.normal(*((7,) if row else (7, 5, 3))))
        return [product, added, *([b.node("MUL", added, product)] if used_twice else [])]

    return case


def normed(op: str, *, per: str, silu: bool = False, used_twice: bool = False) -> Case:
    params = {"NORM": Eps(1e-5), "RMS_NORM": Eps(1e-5), "GROUP_NORM": GroupNorm(4, 1e-6)}[op]

    def case(leaves: Leaves) -> list[Tensor]:
        s = Steps()
        x = leaves.normal(6, 5, 8, 2)
        ne = {"row": (6,), "channel": (1, 1, 8), "all": (6, 5, 8, 2)}[per]
        norm = s.do(b.node(op, x, params=params))
        scaled = s.do(b.node("MUL", norm, leaves.normal(*ne)))
        y = s.do(b.node("ADD", scaled, leaves.normal(*ne))) if op != "RMS_NORM" else scaled
        if silu:
            y = s.do(b.node("UNARY", y, params=Unary("SILU")))
        if used_twice:
            s.do(b.node("ADD", y, norm))
        return s

    return case


def attention(
    *, mask: str = "", used_twice: bool = False, groups: int = 4, bias: float = 0.0, sinks: bool = False
) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        s = Steps()
        q, k = leaves.normal(16, 9, 4, 2), leaves.normal(16, 11, groups, 2)
        v = s.do(b.cont(s.do(b.permute(leaves.normal(16, groups, 11, 2), 1, 2, 0, 3))))
        scores = s.do(b.mul_mat(k, q, prec=10))
        masks = leaves.normal(11, 9)
        weights = s.do(b.inplace("SCALE", scores, params=Scale(0.25)))
        if mask == "added":
            weights = s.do(b.inplace("ADD", weights, masks))
        more = [masks if mask == "operand" else None, leaves.normal(4) if sinks else None]
        weights = s.do(b.node("SOFT_MAX", weights, *more, params=SoftMax(1.0, bias)))
        out = s.do(b.mul_mat(v, weights))
        if used_twice:
            s.do(b.node("ADD", out, s.do(b.node("SUM_ROWS", weights))))
        return s

    return case


def copies(*, used_twice: bool = False) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        s = Steps()
        x = s.do(b.node("SIN", leaves.normal(6, 5, 4)))
        y = s.do(b.cont(s.do(b.permute(x, 1, 2, 0, 3))))
        z = s.do(b.cont(s.do(b.permute(s.do(b.reshape(y, 4, 6, 5)), 1, 0, 2, 3))))
        s.do(b.node("MUL", z, s.do(b.node("COS", z)) if used_twice else s.do(b.node("COS", leaves.normal(*z.ne)))))
        return s

    return case


def scaled(factor: float) -> Case:
    def case(leaves: Leaves) -> list[Tensor]:
        x = b.node("SCALE", leaves.normal(5, 3), params=Scale(factor))
        return [x, b.node("SQR", x)]

    return case


FUSES: dict[str, tuple[Case, dict[str, int]]] = {
    "convolution": (convolution(), {"convolution": 1, "conv_bias": 1}),
    "of a batch": (convolution(batch=3), {"convolution": 1, "conv_bias": 1}),
    "kernel first": (convolution(kernel_first=True), {"convolution": 1, "conv_bias": 1}),
    "kernel first, batch": (convolution(kernel_first=True, batch=3), {"convolution": 1, "conv_bias": 1}),
    "many channels": (convolution(batch=2, outputs=16 * 72), {"convolution": 1, "conv_bias": 1}),
    "of one tap": (convolution(taps=1), {"convolution": 1, "conv_bias": 1}),
    "without bias": (convolution(bias=False), {"convolution": 1, "conv_bias": 0}),
    "product of a batch used twice": (convolution(batch=3, used_twice=True), {"convolution": 0}),
    "of three dimensions": (convolution_3d(), {"convolution": 1}),
    "of three dimensions and a batch": (convolution_3d(batch=2), {"convolution": 1}),
    "of three dimensions, used twice": (convolution_3d(batch=2, used_twice=True), {"convolution": 0}),
    "linear": (linear(), {"linear": 1}),
    "sum with a matrix": (linear(row=False), {"linear": 0}),
    "product used twice": (linear(used_twice=True), {"linear": 0}),
    "layer norm": (normed("NORM", per="row"), {"layer_norm": 1}),
    "norm by channel": (normed("NORM", per="channel"), {"layer_norm": 0}),
    "norm used twice": (normed("NORM", per="row", used_twice=True), {"layer_norm": 0}),
    "group norm": (normed("GROUP_NORM", per="channel"), {"group_norm": 1, "norm_silu": 0}),
    "group norm by row": (normed("GROUP_NORM", per="row"), {"group_norm": 0}),
    "group norm and silu": (normed("GROUP_NORM", per="channel", silu=True), {"group_norm": 1, "norm_silu": 1}),
    "RMS norm": (normed("RMS_NORM", per="row"), {"rms_norm": 1}),
    "RMS norm by everything": (normed("RMS_NORM", per="all"), {"rms_norm": 0}),
    "attention": (attention(), {"attention": 1}),
    "attention, mask added": (attention(mask="added"), {"attention": 1}),
    "attention, mask in softmax": (attention(mask="operand"), {"attention": 1}),
    "attention with slopes": (attention(mask="operand", bias=8.0), {"attention": 1}),
    "attention of groups": (attention(groups=2), {"attention": 1}),
    "attention with sinks": (attention(sinks=True), {"attention": 0}),
    "attention, mask and sinks": (attention(mask="operand", sinks=True), {"attention": 0}),
    "weights used twice": (attention(used_twice=True), {"attention": 0}),
    "copies": (copies(), {"no_copy": 2}),
    "copy used twice": (copies(used_twice=True), {"no_copy": 1}),
    "scale by one": (scaled(1.0), {"no_scale": 1}),
    "scale by two": (scaled(2.0), {"no_scale": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSES)
def test_fusion(device: LocalDevice, name: str) -> None:
    case, expected = FUSES[name]
    leaves = Leaves(len(name))
    fired = check(device, leaves, case(leaves))
    assert {rule: fired.get(rule, 0) for rule in expected} == expected


def test_every_rule_has_a_case() -> None:
    fired = {rule for _, expected in FUSES.values() for rule, times in expected.items() if times}
    assert fired | {"view_of_view"} == set(RULES)


def test_what_must_be_stored_is_not_swallowed(exact: LocalDevice) -> None:
    """An intermediate that the client put into its buffer is computed, though it stands inside of a fusion."""
    leaves = Leaves()
    nodes = linear()(leaves)
    buffer = exact.allocate(len(leaves.memory) + 4096)
    try:
        graph, new, end = place(nodes, buffer.key, len(leaves.memory), nodes)
        exact.write(buffer, 0, leaves.memory)
        program = exact.compile(Graph(graph.nodes), {buffer.key: buffer})
        program.run()
        assert not program.fusions.get("linear")
        memory = {buffer.key: bytearray(leaves.memory) + bytearray(4096)}
        wanted = reference.run(graph, memory, keep=graph.nodes)
        held = {buffer.key: np.frombuffer(exact.read(buffer, 0, end), np.uint8)}
        for node in nodes:
            assert error(reference.read(new[node], held), wanted[new[node]]) < 1e-5
    finally:
        exact.free(buffer)
