"""What SD 1.5's graphs are made of, at 512×512, operation by operation, and sd-cli's UNet graph as a whole: our server
beside ggml's own on the same CPU. One client drives both, ours; the servers take turns, and their results must agree.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np

from sdrpc.client import connect
from sdrpc.client.remote import RemoteDevice, RemoteProgram
from sdrpc.device import Buffer
from sdrpc.ggml import build
from sdrpc.ggml.build import leaf, mul_mat, node
from sdrpc.ggml.memory_planner import bind, lay_out, place
from sdrpc.ggml.params import Concat, Eps, FlashAttn, Glu, GroupNorm, Im2Col, Scale, SoftMax, Unary, Upscale
from sdrpc.ggml.tensor import OUTPUT, Graph, Tensor, sources
from sdrpc.ggml.types import F16, F32, I32, TYPES, Type
from tests.engine import recorded

from .native import native_server
from .rows import Mark, Row
from .setup import Setup, Variant

ROUNDS, SECONDS = 9, 1.0
"""A case is run so often, or for as long, by each server."""
NATIVE = "ggml"
MARKS = {"exact": Mark(1.0), "fast": Mark(0.4)}
"""For the whole graph, on a CPU that computes in bfloat16."""
NMSE = {"exact": 1e-3, "fast": 1e-2}
"""How far results may be apart: ggml rounds what it multiplies with F16 and with blocks to 10 and 8 bits, and a whole
UNet adds that up."""
ROOM = ("--dequant-cache", "4G")
"""Options of a server that may keep all of the UNet's weights in the form that it computes with."""
LEAVES, NODES = 1, 2
"""Keys of a case's buffers until the servers give them."""


class Case(NamedTuple):
    """``result`` of some leaves, one operation or the few that are always together."""

    operation: str
    result: Tensor
    what: str = ""


def _matrix(weight: str, k: int, m: int, n: int) -> Case:
    return Case(f"MUL_MAT {weight}", mul_mat(leaf(TYPES[weight], k, m), leaf(F32, k, n)), f"{m}×{k} · {k}×{n}")


def _scores(head: int, queries: int, heads: int = 8) -> Case:
    result = mul_mat(leaf(F32, head, queries, heads), leaf(F32, head, queries, heads))
    return Case("MUL_MAT F32 × F32", result, f"{heads} heads of {queries}×{head} · {head}×{queries}")


def _convolution(side: int, inputs: int, outputs: int, taps: int = 3) -> Case:
    """What ggml_conv_2d makes."""
    kernel, image = leaf(F16, taps, taps, inputs, outputs), leaf(F32, side, side, inputs)
    window = Im2Col(1, 1, taps // 2, taps // 2, 1, 1, 1)
    columns = node("IM2COL", kernel, image, params=window, type=F16)
    patches = build.reshape(columns, columns.ne[0], side * side)
    product = mul_mat(patches, build.reshape(kernel, taps * taps * inputs, outputs))
    result = build.cont(build.permute(build.reshape(product, side, side, 1, outputs), 0, 1, 3, 2))
    return Case("IM2COL + MUL_MAT", result, f"{inputs} → {outputs}, {taps}×{taps}, {side}×{side}")


def _attention(head: int, queries: int, keys: int, heads: int = 8) -> Case:
    q, k, v = leaf(F32, head, queries, heads), leaf(F16, head, keys, heads), leaf(F16, head, keys, heads)
    result = node("FLASH_ATTN_EXT", q, k, v, None, params=FlashAttn(head**-0.5))
    return Case("FLASH_ATTN_EXT", result, f"{heads} heads of {head}, {queries} × {keys}")


def _image(side: int, channels: int) -> Tensor:
    return leaf(F32, side, side, channels)


def _heads(head: int, tokens: int, heads: int = 8) -> Tensor:
    """Rows of tokens seen head by head."""
    return build.permute(leaf(F32, head, heads, tokens), 0, 2, 1, 3)


CASES = (
    _matrix("F32", 1280, 10240, 256), _matrix("F16", 1280, 10240, 256), _matrix("BF16", 1280, 10240, 256),
    _matrix("Q8_0", 1280, 10240, 256), _matrix("Q4_K", 1280, 10240, 256),
    _matrix("F16", 320, 320, 4096), _matrix("F16", 320, 2560, 4096), _matrix("F16", 768, 320, 77),
    _matrix("F16", 1280, 1280, 1),
    _scores(40, 1024), _scores(80, 1024),
    _convolution(64, 320, 320), _convolution(64, 960, 320), _convolution(32, 640, 640), _convolution(16, 1280, 1280),
    _convolution(8, 1280, 1280), _convolution(8, 2560, 1280), _convolution(64, 320, 320, 1),
    _convolution(128, 512, 512),
    _attention(40, 4096, 4096), _attention(80, 1024, 1024), _attention(160, 256, 256), _attention(40, 4096, 77),
    Case("SOFT_MAX", node("SOFT_MAX", leaf(F32, 1024, 1024, 8), params=SoftMax(80**-0.5)), "8 heads of 1024²"),
    Case("GROUP_NORM", node("GROUP_NORM", _image(64, 320), params=GroupNorm(32, 1e-6)), "64×64×320"),
    Case("GROUP_NORM", node("GROUP_NORM", _image(512, 128), params=GroupNorm(32, 1e-6)), "512×512×128"),
    Case("NORM", node("NORM", leaf(F32, 320, 4096), params=Eps(1e-5)), "4096 rows of 320"),
    Case("ADD", node("ADD", _image(64, 320), _image(64, 320)), "64×64×320"),
    Case("ADD of channels", node("ADD", _image(64, 320), leaf(F32, 1, 1, 320)), "64×64×320"),
    Case("MUL by a row", node("MUL", leaf(F32, 320, 4096), leaf(F32, 320)), "4096 rows of 320"),
    Case("SCALE", node("SCALE", _image(64, 320), params=Scale(0.5)), "64×64×320"),
    Case("UNARY SILU", node("UNARY", _image(64, 320), params=Unary("SILU")), "64×64×320"),
    Case("UNARY GELU", node("UNARY", leaf(F32, 1280, 4096), params=Unary("GELU")), "4096 rows of 1280"),
    Case("GLU GEGLU", node("GLU", leaf(F32, 2560, 4096), params=Glu("GEGLU")), "4096 rows of 2560"),
    Case("UPSCALE", node("UPSCALE", _image(32, 640), params=Upscale(0), ne=(64, 64, 640)), "32×32×640"),
    Case("CONCAT", node("CONCAT", _image(64, 320), _image(64, 320), params=Concat(2)), "64×64×320, channels"),
    Case("CONT of heads", build.cont(_heads(40, 4096)), "4096 × 8 × 40"),
    Case("CONT transposed", build.cont(build.transpose(leaf(F32, 4096, 320))), "4096 × 320"),
    Case("CPY to F16", build.cast(_heads(40, 4096), F16), "4096 × 8 × 40"),
    Case("GET_ROWS", node("GET_ROWS", leaf(F16, 768, 49408), leaf(I32, 77)), "77 rows of 768"),
    Case("a round trip", node("SCALE", leaf(F32, 1), params=Scale(1.0, 1.0)), "one number"),
)  # fmt: skip


class Ready(NamedTuple):
    """A graph on a server. ``at`` is where its result lies; ``inputs`` are overwritten by a run."""

    device: RemoteDevice
    program: RemoteProgram
    buffers: tuple[Buffer, ...]
    at: tuple[Buffer, int, int]
    inputs: tuple[tuple[Buffer, int, bytes], ...] = ()

    def run(self) -> float:
        """Seconds until the first bytes of the result are here."""
        buffer, offset, size = self.at
        for each in self.inputs:
            self.device.write(*each)
        start = time.perf_counter()
        self.program.run()
        self.device.read(buffer, offset, min(size, 64))
        return time.perf_counter() - start

    def result(self) -> np.ndarray:
        return np.frombuffer(self.device.read(*self.at), np.uint8)

    def free(self) -> None:
        for buffer in self.buffers:
            self.device.free(buffer)


def run(setup: Setup) -> Iterator[Row]:
    part = "unet" if setup.checkpoint_size == "full" else "clip"
    marks = MARKS if setup.on_cpu and part == "unet" else {}
    for options in (ROOM, ()):
        with _servers(setup, options) as devices:
            whole = {name: recorded_on(device, part) for name, device in devices.items()}
            what = " ".join(("128×128", *options))
            yield from _rows(f"recorded {part}", recorded.load(part).graph.nodes[-1].type, whole, what, marks)
            if options:
                continue
            rng = np.random.default_rng(0)
            for case in CASES:
                contents = [_contents(each, rng) for each in _graph(case.result).leaves]
                ready = {name: _ready(device, case, contents) for name, device in devices.items()}
                yield from _rows(case.operation, case.result.type, ready, case.what)


@contextmanager
def _servers(setup: Setup, options: Sequence[str]) -> Iterator[dict[str, RemoteDevice]]:
    """The first device of ggml's server and of ours in each precision, started with ``options``."""
    with ExitStack() as stack:
        endpoints = {NATIVE: stack.enter_context(native_server())}
        for precision in MARKS:
            server = stack.enter_context(setup.server(Variant("f16", precision), *options))
            endpoints[precision] = f"127.0.0.1:{server.port}"
        devices = {}
        for name, endpoint in endpoints.items():
            devices[name], *_ = connect([endpoint])
            stack.callback(devices[name].close)
        yield devices


def _rows(
    operation: str, type: Type, ready: Mapping[str, Ready], what: str, marks: Mapping[str, Mark] | None = None
) -> Iterator[Row]:
    """Measured, and freed."""
    seconds = _seconds(list(ready.values()))
    found = dict(zip(ready, seconds, strict=True))
    results = {name: _numbers(each.result(), type) for name, each in ready.items()}
    for each in ready.values():
        each.free()
    for precision in MARKS:
        apart = _nmse(results[precision], results[NATIVE])
        if not apart <= NMSE[precision]:
            raise SystemExit(f"{operation}, {what}, {precision}: results are {apart:.1e} apart")
        yield Row(
            f"{operation}, {precision}", found[precision] * 1e3, "ms", found[NATIVE] * 1e3, "ggml's server",
            (marks or {}).get(precision), f"{what}; NMSE {apart:.0e}",
        )  # fmt: skip


def _seconds(ready: Sequence[Ready]) -> list[float]:
    """Of a run, for each of them."""
    for each in ready:  # programs are compiled, weights converted, memory touched
        each.run()
        each.run()
    runs: list[list[float]] = []
    start = time.perf_counter()
    while len(runs) < ROUNDS and (len(runs) < 3 or time.perf_counter() - start < SECONDS * len(ready)):
        runs.append([each.run() for each in ready])
    return [median(times) for times in zip(*runs, strict=True)]


def _graph(result: Tensor) -> Graph:
    done: dict[Tensor, None] = {}

    def visit(tensor: Tensor) -> None:
        for source in sources(tensor):
            if source.op != "NONE" and source not in done:
                visit(source)
        done[tensor] = None

    visit(result)
    return Graph(tuple(done))


def _ready(device: RemoteDevice, case: Case, contents: Sequence[bytes]) -> Ready:
    """The case on a server, placed as clients of its kind do it: ours leave what lies between to our servers."""
    graph = _graph(replace(case.result, flags=OUTPUT))
    laid_out = lay_out([each.nbytes for each in graph.leaves], device.alignment)
    starts = dict(zip(graph.leaves, laid_out.offsets, strict=True))
    graph = bind(graph, {each: (LEAVES, offset) for each, offset in starts.items()})
    if device.target.managed:
        graph = bind(graph, {graph.nodes[-1]: (NODES, 0)})
        size = graph.nodes[-1].nbytes
    else:
        graph, size = place(graph, device.alignment, NODES)
    weights, nodes = device.allocate(laid_out.size), device.allocate(size)
    for offset, data in zip(laid_out.offsets, contents, strict=True):
        device.write(weights, offset, data)
    keys = {LEAVES: weights.key, NODES: nodes.key}
    graph = bind(graph, {t: (keys[t.buffer], t.offset) for t in graph.tensors if t.buffer and t.view_src is None})
    program = device.compile(graph, {weights.key: weights, nodes.key: nodes})
    last = graph.nodes[-1]
    return Ready(device, program, (weights, nodes), (nodes, last.offset, last.nbytes))


def recorded_on(device: RemoteDevice, part: str) -> Ready:
    buffers = {number: device.allocate(size) for number, size in recorded.load(part).sizes.items()}
    graph = recorded.load(part, {number: buffer.key for number, buffer in buffers.items()}).graph
    by_key: dict[int, Buffer] = {buffer.key: buffer for buffer in buffers.values()}
    last = graph.nodes[-1]
    rng = np.random.default_rng(0)
    inputs = []
    for each in graph.leaves:
        content = by_key[each.buffer], each.offset, recorded.contents(each, rng).tobytes()
        device.write(*content)
        if each.buffer == last.buffer:  # all results share that
            inputs.append(content)
    program = device.compile(graph, by_key)
    at = by_key[last.buffer], last.offset, last.nbytes
    return Ready(device, program, tuple(by_key.values()), at, tuple(inputs))


def _contents(tensor: Tensor, rng: np.random.Generator) -> bytes:
    """Random numbers of about one; row numbers that exist; blocks of any bits with sane scales."""
    if tensor.type is I32:
        return rng.integers(0, 77, tensor.elements, np.int32).tobytes()
    if tensor.type.plain:
        numbers = rng.standard_normal(tensor.elements, np.float32)
        if tensor.type.name == "BF16":
            return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return numbers.astype({"F32": np.float32, "F16": np.float16}[tensor.type.name]).tobytes()
    blocks = rng.integers(0, 256, (tensor.elements // tensor.type.block, tensor.type.size), np.uint8)
    scales = {"Q8_0": 1, "Q4_K": 2}[tensor.type.name]
    blocks[:, : 2 * scales] = np.frombuffer(np.full(scales, 0.02, np.float16).tobytes(), np.uint8)
    return blocks.tobytes()


def _numbers(data: np.ndarray, type: Type) -> np.ndarray:
    return data.view({"F32": np.float32, "F16": np.float16}[type.name]).astype(np.float64)


def _nmse(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())
