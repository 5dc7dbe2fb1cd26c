"""The living definition of the operations: a slow interpreter of graphs on plain bytes.

It shares nothing with the compilers: operands are read, strides and all, from byte memory, each operation is computed
naively (in float64 unless told otherwise), rounded to the declared type of the result, and written back as bytes. So
in-place operations, aliases and memory that nodes share behave as they do in ggml.

Arrays are in torch's order: an array's shape is ``ne`` reversed, always four dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import gguf
import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from sdrpc.ggml.ops import ALIASES
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import NUMPY_DTYPES
from tests.support import reference_attention, reference_integers, reference_recurrent

Array = np.ndarray[Any, Any]
Memory = Mapping[int, bytearray | Array]
"""Bytes of each buffer by its key (arrays are of uint8)."""


def run(graph: Graph, memory: Memory, keep: Collection[Tensor] = (), dtype: type = np.float64) -> dict[Tensor, Array]:
    """Execute ``graph`` on ``memory``, in place. Nodes in no buffer get memory of their own.

    Returns what each node of ``keep`` was when it had just been computed (by default the nodes flagged OUTPUT, and the
    last one). ``dtype`` is what floats are computed in.
    """
    wanted = set(keep) or {node for node in graph.nodes if node.is_output} | {graph.nodes[-1]}
    own: dict[Tensor, Array] = {}
    last_use = {root(source): i for i, node in enumerate(graph.nodes) for source in node.src if source is not None}
    kept = {}
    for i, node in enumerate(graph.nodes):
        if node.op not in ALIASES:
            if not root(node).buffer and root(node) not in own:
                own[root(node)] = np.full(root(node).nbytes, 0xFF, np.uint8)
            sources = [source and read(source, memory, own, dtype) for source in node.src]
            for i, state in UPDATES.get(node.op, lambda *_: {})(*sources).items():
                sources[i] = state
                write(node.src[i], state, memory, own)
            write(node, OPS[node.op](node, *sources), memory, own)
        if node in wanted:
            kept[node] = read(node, memory, own, dtype)
        for source in {root(s) for s in node.src if s is not None}:
            if last_use[source] == i:
                own.pop(source, None)
    return kept


def root(tensor: Tensor) -> Tensor:
    """The tensor that owns the bytes."""
    while tensor.view_src is not None:
        tensor = tensor.view_src
    return tensor


def read(tensor: Tensor, memory: Memory, own: Mapping[Tensor, Array] | None = None, dtype: type = np.float64) -> Array:
    """The tensor's elements as a new array: floats as ``dtype``, integers as int64."""
    if not tensor.type.plain:
        raw = np.ascontiguousarray(_bytes(tensor, memory, own or {}))
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.type.name]).astype(dtype)
    stored = _elements(tensor, memory, own or {})
    if tensor.type.name == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(dtype)
    return stored.astype(np.int64 if stored.dtype.kind == "i" else dtype)


def write(tensor: Tensor, value: Array, memory: Memory, own: Mapping[Tensor, Array] | None = None) -> None:
    """``value``, rounded to the tensor's type (blocks: as gguf does), into its bytes."""
    if not tensor.type.plain:
        blocks = gguf.quants.quantize(value.astype(np.float32), gguf.GGMLQuantizationType[tensor.type.name])
        _bytes(tensor, memory, own or {})[...] = blocks
        return
    with np.errstate(over="ignore"):  # beyond F16's range is infinite, as in ggml
        target = _elements(tensor, memory, own or {})
        target[...] = _bf16(value) if tensor.type.name == "BF16" else value.astype(target.dtype)


def _bf16(value: Array) -> Array:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(value.astype(np.float32)).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def _place(tensor: Tensor, memory: Memory, own: Mapping[Tensor, Array]) -> tuple[Any, int]:
    if tensor.buffer:
        return memory[tensor.buffer], tensor.offset
    offset = 0
    while tensor.view_src is not None:
        tensor, offset = tensor.view_src, offset + tensor.view_offset
    return own[tensor], offset


def _elements(tensor: Tensor, memory: Memory, own: Mapping[Tensor, Array]) -> Array:
    """A writable, strided view of a plain tensor."""
    dtype = np.dtype("<u2") if tensor.type.name == "BF16" else NUMPY_DTYPES[tensor.type.name]
    buffer, offset = _place(tensor, memory, own)
    return np.ndarray(tensor.ne[::-1], dtype, buffer, offset, tensor.nb[::-1])


def _bytes(tensor: Tensor, memory: Memory, own: Mapping[Tensor, Array]) -> Array:
    """The blocks of a quantized tensor: the last dimension counts bytes."""
    buffer, offset = _place(tensor, memory, own)
    shape = (*tensor.ne[:0:-1], tensor.type.row_bytes(tensor.ne[0]))
    return np.ndarray(shape, np.uint8, buffer, offset, (*tensor.nb[:0:-1], 1))


# Copies


def _copy(node: Tensor, x: Array, _into: Array | None = None) -> Array:
    return x.reshape(node.ne[::-1])


def _repeat(node: Tensor, x: Array) -> Array:
    return np.tile(x, [n // m for n, m in zip(node.ne[::-1], x.shape, strict=True)])


def _concat(node: Tensor, a: Array, b: Array) -> Array:
    return np.concatenate([a, b], axis=3 - node.params.dim)


def _pad(node: Tensor, x: Array) -> Array:
    *amounts, circular = node.params
    if not circular:
        return np.pad(x, [(amounts[2 * i], amounts[2 * i + 1]) for i in (3, 2, 1, 0)])
    for i in range(4):
        x = np.take(x, (np.arange(node.ne[i]) - amounts[2 * i]) % x.shape[3 - i], axis=3 - i)
    return x


def _pad_reflect(node: Tensor, x: Array) -> Array:
    return np.pad(x, [(0, 0)] * 3 + [tuple(node.params)], mode="reflect")


def _set(node: Tensor, a: Array, b: Array, add: bool = False) -> Array:
    nb1, nb2, nb3, offset, _ = node.params
    size = node.type.size
    result = np.ascontiguousarray(a)
    strides = [n // size * result.itemsize for n in (nb3, nb2, nb1, size)]
    part = as_strided(result.reshape(-1)[offset // size :], b.shape, strides)
    part[...] = part + b if add else b
    return result


def _get_rows(_: Tensor, a: Array, rows: Array) -> Array:
    assert rows.min() >= 0
    return np.take_along_axis(a, rows[0][..., None], axis=2)


def _set_rows(_: Tensor, values: Array, rows: Array, into: Array) -> Array:
    for i3, i2 in np.ndindex(values.shape[:2]):
        into[i3, i2, rows[0, i3 % rows.shape[1], i2 % rows.shape[2]]] = values[i3, i2]
    return into


# Element by element


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Tensor, Array, Array], Array]:
    def apply(node: Tensor, a: Array, b: Array) -> Array:
        return function(a, _repeat(node, b))

    return apply


def _each(function: Callable[[Array], Array]) -> Callable[[Tensor, Array], Array]:
    def apply(_: Tensor, x: Array) -> Array:
        with np.errstate(all="ignore"):
            return function(x)

    return apply


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))


def _gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1 + torch.erf(torch.from_numpy(x / math.sqrt(2))).numpy())


def _gelu_quick(x: Array) -> Array:
    return x * _sigmoid(1.702 * x)


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


UNARY: dict[str, Callable[[Array], Array]] = {
    "ABS": np.abs, "SGN": np.sign, "NEG": np.negative, "STEP": lambda x: (x > 0).astype(x.dtype), "TANH": np.tanh,
    "ELU": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), "RELU": _relu, "SIGMOID": _sigmoid,
    "GELU": _gelu, "GELU_QUICK": _gelu_quick, "GELU_ERF": _gelu_erf, "SILU": _silu,
    "HARDSWISH": lambda x: x * np.clip((x + 3) / 6, 0, 1), "HARDSIGMOID": lambda x: np.clip((x + 3) / 6, 0, 1),
    "EXP": np.exp, "EXPM1": np.expm1, "SOFTPLUS": lambda x: np.logaddexp(x, 0), "FLOOR": np.floor, "CEIL": np.ceil,
    "ROUND": lambda x: np.trunc(x + np.copysign(0.5, x)), "TRUNC": np.trunc,
}  # fmt: skip


def _xielu(node: Tensor, x: Array) -> Array:
    _, alpha_n, alpha_p, beta, eps = node.params
    falling = alpha_n * (np.expm1(np.minimum(x, eps)) - x)
    return np.where(x > 0, alpha_p * x * x, falling) + beta * x


def _unary(node: Tensor, x: Array) -> Array:
    if node.params.op == "XIELU":
        return _xielu(node, x)
    with np.errstate(over="ignore"):
        return UNARY[node.params.op](x)


GLU: dict[str, Callable[[Array, Array, Any], Array]] = {
    "REGLU": lambda x, g, _: _relu(x) * g, "GEGLU": lambda x, g, _: _gelu(x) * g,
    "SWIGLU": lambda x, g, _: _silu(x) * g, "GEGLU_ERF": lambda x, g, _: _gelu_erf(x) * g,
    "GEGLU_QUICK": lambda x, g, _: _gelu_quick(x) * g,
    "SWIGLU_OAI": lambda x, g, p: (
        np.minimum(x, p.limit) * _sigmoid(p.alpha * np.minimum(x, p.limit)) * (np.clip(g, -p.limit, p.limit) + 1)
    ),
    "SWIGLU_CLAMP": lambda x, g, p: _silu(np.minimum(x, p.limit)) * np.clip(g, -p.limit, p.limit),
}  # fmt: skip


def _glu(node: Tensor, a: Array, b: Array | None = None) -> Array:
    if b is None:
        half = node.ne[0]
        first, second = a[..., :half], a[..., half : 2 * half]
        a, b = (second, first) if node.params.swapped else (first, second)
    return GLU[node.params.op](a, b, node.params)


def _diag_mask(value: float) -> Callable[[Tensor, Array], Array]:
    def apply(node: Tensor, x: Array) -> Array:
        row, column = np.indices(x.shape[2:])
        return np.where(column > node.params.n_past + row, value, x)

    return apply


def _timestep_embedding(node: Tensor, steps: Array) -> Array:
    dim, max_period = node.params
    half = dim // 2
    angles = steps[0, 0, 0][:, None] * np.exp(-math.log(max_period) * np.arange(half) / half)
    result = np.zeros(node.ne[::-1])
    result[0, 0, :, : 2 * half] = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return result


# Rows and reductions


def _norm(node: Tensor, x: Array) -> Array:
    x = x - x.mean(axis=3, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=3, keepdims=True) + node.params.eps)


def _rms_norm(node: Tensor, x: Array) -> Array:
    return x / np.sqrt((x * x).mean(axis=3, keepdims=True) + node.params.eps)


def _l2_norm(node: Tensor, x: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return x / np.maximum(np.sqrt((x * x).sum(axis=3, keepdims=True)), node.params.eps)


def _group_norm(node: Tensor, x: Array) -> Array:
    each = math.ceil(x.shape[1] / node.params.groups)
    result = []
    for first in range(0, x.shape[1], each):
        group = x[:, first : first + each]
        group = group - group.mean(axis=(1, 2, 3), keepdims=True)
        result.append(group / np.sqrt((group * group).mean(axis=(1, 2, 3), keepdims=True) + node.params.eps))
    return np.concatenate(result, axis=1)


def _argsort(node: Tensor, x: Array) -> Array:
    return np.argsort(-x if node.params.order else x, axis=3, kind="stable")


def _top_k(node: Tensor, x: Array) -> Array:
    return np.argsort(-x, axis=3, kind="stable")[..., : node.ne[0]]


def _tri(node: Tensor, x: Array) -> Array:
    return (np.triu(x), np.triu(x, 1), np.tril(x), np.tril(x, -1))[node.params.part]


# Products


def _spread(a: Array, like: Array) -> Array:
    """``a`` with each of its outer two dimensions repeated, element by element, as often as ``like`` has them."""
    for axis in (0, 1):
        a = np.repeat(a, like.shape[axis] // a.shape[axis], axis=axis) if a.shape[axis] > 1 else a
    return a


def _mul_mat(node: Tensor, a: Array, b: Array, *scales_and_bias: Array) -> Array:
    if scales_and_bias:
        return reference_integers.mul_mat(node, a, b, *scales_and_bias)
    return b @ _spread(a, b).swapaxes(2, 3)


def _out_prod(_: Tensor, a: Array, b: Array) -> Array:
    return b.swapaxes(2, 3) @ _spread(a, b)


# Images


def _windows(x: Array, k: tuple[int, int], s: tuple[int, int], p: tuple[int, int], d: tuple[int, int]) -> Array:
    """(…, H, W) → (…, OH, OW, KH, KW); each pair is (height, width)."""
    reach = tuple(d[i] * (k[i] - 1) + 1 for i in (0, 1))
    # a window that is larger than its input still has one place, by C's division
    behind = [max(p[i], reach[i] - p[i] - x.shape[-2 + i]) for i in (0, 1)]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(p[0], behind[0]), (p[1], behind[1])])
    return sliding_window_view(padded, reach, axis=(-2, -1))[..., :: s[0], :: s[1], :: d[0], :: d[1]]


def _im2col(node: Tensor, kernel: Array, x: Array) -> Array:
    s0, s1, p0, p1, d0, d1, is_2d = node.params
    if not is_2d:  # (1, N, C, W): one dimension less, the channels are where the height was
        x, kernel, s1, p1, d1 = x[0][:, :, None, :], kernel[0][:, :, None, :], 1, 0, 1
    windows = _windows(x, kernel.shape[2:], (s1, s0), (p1, p0), (d1, d0))
    return np.ascontiguousarray(windows.transpose(0, 2, 3, 1, 4, 5)).reshape(node.ne[::-1])


def _conv_2d(node: Tensor, kernel: Array, x: Array) -> Array:
    s0, s1, p0, p1, d0, d1, _ = node.params
    windows = _windows(x, kernel.shape[2:], (s1, s0), (p1, p0), (d1, d0))
    return np.tensordot(windows, kernel, axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)


def _conv_2d_dw(node: Tensor, kernel: Array, x: Array) -> Array:
    s0, s1, p0, p1, d0, d1, _ = node.params
    windows = _windows(x, kernel.shape[2:], (s1, s0), (p1, p0), (d1, d0))
    return np.einsum("nchwyx,cyx->nchw", windows, kernel[:, 0])


def _conv_transpose_2d(node: Tensor, kernel: Array, x: Array) -> Array:
    stride, (height, width) = node.params.stride, x.shape[2:]
    result = np.zeros(node.ne[::-1])
    for y, z in np.ndindex(kernel.shape[2:]):
        rows = slice(y, y + stride * (height - 1) + 1, stride)
        columns = slice(z, z + stride * (width - 1) + 1, stride)
        result[:, :, rows, columns] += np.einsum("nchw,co->nohw", x, kernel[:, :, y, z])
    return result


def _conv_transpose_1d(node: Tensor, kernel: Array, x: Array) -> Array:
    stride, length = node.params.stride, x.shape[3]
    result = np.zeros(node.ne[::-1])
    for tap in range(kernel.shape[3]):
        places = slice(tap, tap + stride * (length - 1) + 1, stride)
        result[0, 0, :, places] += np.einsum("cl,co->ol", x[0, 0], kernel[0, :, :, tap])
    return result


def _col2im_1d(node: Tensor, columns: Array) -> Array:
    stride, channels, padding = node.params
    taps, steps = columns.shape[3] // channels, columns.shape[2]
    whole = np.zeros((channels, (steps - 1) * stride + taps))
    for step in range(steps):
        whole[:, step * stride : step * stride + taps] += columns[0, 0, step].reshape(channels, taps)
    return whole[None, None, :, padding : whole.shape[1] - padding]


def _volumes(node: Tensor, kernel: Array, x: Array) -> Array:
    """(N · C, D, H, W) → (N, C, OD, OH, OW, KD, KH, KW)"""
    s0, s1, s2, p0, p1, p2, d0, d1, d2, channels = node.params[:10]
    images = x[: len(x) // channels * channels].reshape(-1, channels, *x.shape[1:])
    reach = [d * (k - 1) + 1 for d, k in zip((d2, d1, d0), kernel.shape[1:], strict=True)]
    padding = [(p, max(p, r - p - n)) for p, r, n in zip((p2, p1, p0), reach, x.shape[1:], strict=True)]
    padded = np.pad(images, [(0, 0), (0, 0), *padding])
    windows = sliding_window_view(padded, reach, axis=(2, 3, 4))
    return windows[:, :, ::s2, ::s1, ::s0, ::d2, ::d1, ::d0]


def _im2col_3d(node: Tensor, kernel: Array, x: Array) -> Array:
    return _volumes(node, kernel, x).transpose(0, 2, 3, 4, 1, 5, 6, 7).reshape(node.ne[::-1])


def _conv_3d(node: Tensor, kernel: Array, x: Array) -> Array:
    kernels = kernel.reshape(node.params.outputs, node.params.channels, *kernel.shape[1:])
    return np.einsum("ncdhwzyx,oczyx->nodhw", _volumes(node, kernel, x), kernels).reshape(node.ne[::-1])


LEAST = float(np.finfo(np.float32).min)
"""The largest of nothing."""


def _pool_1d(node: Tensor, x: Array) -> Array:
    op, k, s, p = node.params
    result = np.zeros(node.ne[::-1])
    for i in range(node.ne[0]):
        window = x[..., max(i * s - p, 0) : max(i * s - p + k, 0)]
        if window.size:
            result[..., i] = window.mean(axis=3) if op else window.max(axis=3)
        else:
            result[..., i] = 0 if op else LEAST
    return result


def _pool_2d(node: Tensor, x: Array) -> Array:
    op, k0, k1, s0, s1, p0, p1 = node.params
    padding = [(0, 0), (0, 0), (p1, p1), (p0, p0)]
    padded = np.pad(x, padding, constant_values=0 if op else LEAST)
    windows = _windows(padded, (k1, k0), (s1, s0), (0, 0), (1, 1))
    return windows.mean(axis=(4, 5)) if op else windows.max(axis=(4, 5))


def _upscale(node: Tensor, x: Array) -> Array:
    for axis, n in enumerate(node.ne[::-1]):
        x = np.moveaxis(
            np.moveaxis(x, axis, 3) @ _resizing(x.shape[axis], n, node.params.mode if axis > 1 else 0), 3, axis
        )
    return x


def _resizing(old: int, n: int, mode: int) -> Array:
    """How much each of ``old`` elements counts in each of ``n`` new ones."""
    kind, corners, smooth = mode & 0xFF, bool(mode & 256), bool(mode & 512)
    factor = np.float32((n - 1) / (old - 1) if corners and n > 1 and old > 1 else n / old)
    result = np.zeros((old, n))
    for i in range(n):
        if kind == 0:
            result[min(int(np.float32(i) / factor), old - 1), i] = 1
            continue
        offset = 0.0 if corners else 0.5
        at = float(np.float32(i + offset) / factor) - offset  # where it falls on a whole number, rounding decides
        if smooth:
            reach = max(1.0, float(1 / factor))
            first, last = max(int(at + 2 * offset - reach), 0), min(int(at + 2 * offset + reach), old)
            result[first:last, i] = np.maximum(1 - np.abs(np.arange(first, last) - at) / reach, 0)
            result[:, i] /= result[:, i].sum() or 1
            continue
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            result[min(max(tap, 0), old - 1), i] += max(1 - abs(tap - at), 0) if kind == 1 else _keys(abs(tap - at))
    return result


def _keys(x: float, a: float = -0.75) -> float:
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def _win_part(node: Tensor, x: Array) -> Array:
    across, down, size = node.params
    padded = np.pad(x[0], [(0, down * size - x.shape[1]), (0, across * size - x.shape[2]), (0, 0)])
    windows = [
        padded[y : y + size, z : z + size] for y, z in np.ndindex(down, across) for y, z in [(y * size, z * size)]
    ]
    return np.stack(windows)


def _win_unpart(node: Tensor, x: Array) -> Array:
    size, (_, width, height, _) = node.params.size, node.ne
    result = np.zeros(node.ne[::-1])
    for i, (y, z) in enumerate(np.ndindex(math.ceil(height / size), math.ceil(width / size))):
        part = result[0, y * size : (y + 1) * size, z * size : (z + 1) * size]
        part[...] = x[i, : part.shape[0], : part.shape[1]]
    return result


def _get_rel_pos(node: Tensor, table: Array) -> Array:
    n = node.ne[1]
    return np.array([[table[0, 0, y - z + n - 1] for z in range(n)] for y in range(n)])[None]


def _add_rel_pos(node: Tensor, scores: Array, across: Array, down: Array) -> Array:
    n = across.shape[3]
    pairs = scores.reshape(*across.shape, n)
    return (pairs + down[..., :, None] + across[..., None, :]).reshape(scores.shape)


UPDATES: dict[str, Callable[..., dict[int, Array]]] = {"OPT_STEP_ADAMW": reference_recurrent.adamw_moments}
"""Operations that write over sources before they read them: function of the sources → the new ones, by number."""

OPS: dict[str, Callable[..., Array]] = {
    "DUP": _copy, "CPY": _copy, "CONT": _copy, "REPEAT": _repeat, "CONCAT": _concat, "PAD": _pad, "SET": _set,
    "PAD_REFLECT_1D": _pad_reflect, "ROLL": lambda node, x: np.roll(x, tuple(node.params), (3, 2, 1, 0)),
    "ACC": lambda node, a, b: _set(node, a, b, add=True), "GET_ROWS": _get_rows, "SET_ROWS": _set_rows,
    "ARANGE": lambda node: (node.params.start + node.params.step * np.arange(node.ne[0])).reshape(1, 1, 1, -1),
    "FILL": lambda node, x: np.full(x.shape, node.params.value),
    "ADD": _binary(np.add), "SUB": _binary(np.subtract), "MUL": _binary(np.multiply),
    "DIV": _binary(np.divide), "ADD1": lambda _, a, b: a + b,
    "SQR": _each(np.square), "SQRT": _each(np.sqrt), "LOG": _each(np.log),
    "SIN": _each(np.sin), "COS": _each(np.cos), "SCALE": lambda node, x: x * node.params.scale + node.params.bias,
    "CLAMP": lambda node, x: np.maximum(np.minimum(x, node.params.max), node.params.min),
    "LEAKY_RELU": lambda node, x: np.where(x > 0, x, x * node.params.slope), "UNARY": _unary, "GLU": _glu,
    "DIAG_MASK_INF": _diag_mask(-np.inf), "DIAG_MASK_ZERO": _diag_mask(0.0),
    "TIMESTEP_EMBEDDING": _timestep_embedding,
    "SUM": lambda _, x: x.sum(keepdims=True), "SUM_ROWS": lambda _, x: x.sum(axis=3, keepdims=True),
    "MEAN": lambda _, x: x.mean(axis=3, keepdims=True), "ARGMAX": lambda _, x: x.argmax(axis=3)[None],
    "ARGSORT": _argsort, "TOP_K": _top_k, "COUNT_EQUAL": lambda _, a, b: (a == b).sum(keepdims=True), "TRI": _tri,
    "DIAG": lambda _, x: x * np.eye(x.shape[3]), "CUMSUM": lambda _, x: x.cumsum(axis=3),
    "NORM": _norm, "RMS_NORM": _rms_norm, "L2_NORM": _l2_norm, "GROUP_NORM": _group_norm,
    "MUL_MAT": _mul_mat, "OUT_PROD": _out_prod,
    "IM2COL": _im2col, "CONV_2D": _conv_2d, "CONV_2D_DW": _conv_2d_dw, "CONV_TRANSPOSE_2D": _conv_transpose_2d,
    "POOL_2D": _pool_2d, "UPSCALE": _upscale, "IM2COL_3D": _im2col_3d, "CONV_3D": _conv_3d,
    "CONV_TRANSPOSE_1D": _conv_transpose_1d, "COL2IM_1D": _col2im_1d, "POOL_1D": _pool_1d, "WIN_PART": _win_part,
    "WIN_UNPART": _win_unpart, "GET_REL_POS": _get_rel_pos, "ADD_REL_POS": _add_rel_pos,
    **reference_attention.OPS,
    **reference_integers.OPS,
    **reference_recurrent.OPS,
}  # fmt: skip
"""Operation → function of the node and its sources' arrays (None for a source that is not there)."""
