"""Layers whose weights are in one format or another, on the engine of this process: 16 bits, and 8 bits a number that
are multiplied as they are, or made 16-bit floats first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
import torch

from sdrpc.engine import LocalDevice, devices
from sdrpc.engine.operations import EngineOp
from sdrpc.engine.values import ordered
from sdrpc.ggml.build import leaf, mul_mat, node
from sdrpc.ggml.memory_planner import bind, lay_out
from sdrpc.ggml.params import Unary
from sdrpc.ggml.tensor import OUTPUT, Graph, Tensor
from sdrpc.ggml.types import F32, TYPES, Type

from .kernels import hearing
from .rows import Row
from .setup import Setup
from .step import NotCompiled, until_compiled

FORMATS = ("BF16", "Q8_0", "F8_E4M3", "F8_E4M3_SCALED", "MXFP8", "I8_CONVROT")
"""The first one is what the others are measured against."""
COMPILED = ("BF16", "F8_E4M3_SCALED", "I8_CONVROT")
"""Those that are also measured compiled, which takes up to a minute each."""
ROUNDS = 9
SECONDS = 60.0
"""How long compiling is waited for."""
SIZES = {"full": (4096, 3072, 12288, 16), "tiny": (32, 256, 512, 16)}
"""Rows, numbers of a row, and within a layer, layers: those of FLUX.1 for a picture of 1024×1024."""
PERIOD = 100_003
"""Numbers after which a tensor's contents repeat."""
SCALE = 0.0005
"""Of numbers in 8 bits, such that layers change little."""


def run(setup: Setup) -> Iterator[Row]:
    yield from _rows(setup, "as they come", FORMATS, "off")
    if setup.compiles(setup.variant):
        yield from _rows(setup, "compiled", COMPILED, "auto")


def _rows(setup: Setup, way: str, formats: Sequence[str], compiling: str) -> Iterator[Row]:
    found = {device.name: device for device in devices("fast", compile=compiling)}
    theirs = 0.0
    try:
        for name in formats:
            seconds, note = _measured(setup, found[setup.device], name, compiling == "auto")
            theirs = theirs or seconds
            yield Row(f"layers in {name}, {way}", seconds * 1e3, "ms", theirs * 1e3, FORMATS[0], None, note)
    finally:
        for each in found.values():
            each.close()


def _measured(setup: Setup, device: LocalDevice, name: str, compiled: bool) -> tuple[float, str]:
    """Of layers with weights in the format ``name``: seconds, and what of them is computed in 8 bits."""
    graph = _layers(TYPES[name], *SIZES[setup.checkpoint_size])
    last, leaves = graph.nodes[-1], graph.leaves
    laid_out = lay_out([each.nbytes for each in (*leaves, last)], device.alignment)
    buffer = device.allocate(laid_out.size)
    places = {each: (buffer.key, at) for each, at in zip((*leaves, last), laid_out.offsets, strict=True)}
    rng = np.random.default_rng(0)
    contents = {each.type: _contents(each, rng) for each in leaves[:2]}  # all of a type have as many bytes
    for each, at in zip(leaves, laid_out.offsets, strict=False):
        device.write(buffer, at, contents[each.type])
    program = device.compile(bind(graph, places), {buffer.key: buffer})

    def once() -> float:
        start = time.perf_counter()
        program.run()
        if not setup.on_cpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    values = ordered(program.bound.compiled.roots)
    eights = sum(value.op is EngineOp.PRODUCT_8BIT for value in values)
    note = f"{eights} products in 8 bits" if eights else "products in 16 bits"
    with hearing() as heard:
        for _ in range(4):  # weights are converted, the run is recorded
            once()
        if compiled:
            try:
                until_compiled(heard, once, SECONDS)
            except NotCompiled as reason:
                note += f"; {reason}"
        once()  # recorded anew
        seconds = median(once() for _ in range(ROUNDS))
    device.free(buffer)
    return seconds, note


def _layers(type: Type, rows: int, width: int, within: int, count: int) -> Graph:
    """``count`` times: to ``within`` numbers a row, GELU, back, added to what came in."""
    nodes: list[Tensor] = []
    x = leaf(F32, width, rows)
    for _ in range(count):
        wide = mul_mat(leaf(type, width, within), x)
        bent = node("UNARY", wide, params=Unary("GELU"))
        narrow = mul_mat(leaf(type, within, width), bent)
        x = node("ADD", x, narrow, flags=OUTPUT)
        nodes += (wide, bent, narrow, x)
    return Graph(tuple(nodes))


def _contents(tensor: Tensor, rng: np.random.Generator) -> memoryview:
    """Normal numbers; of blocks, numbers of 8 bits and one scale. They repeat: to draw hundreds of millions
    takes minutes."""
    held, count = tensor.type, tensor.nbytes // tensor.type.size
    drawn = min(count, PERIOD // held.block)
    numbers = torch.from_numpy(rng.standard_normal(drawn * held.block, np.float32))
    if held is F32:
        blocks = numbers.view(torch.uint8).numpy()
    elif held.plain:
        blocks = (numbers * SCALE).bfloat16().view(torch.uint8).numpy()
    else:
        eights = held.name in ("Q8_0", "I8_CONVROT")
        codes = (numbers * 40).to(torch.int8) if eights else numbers.to(torch.float8_e4m3fn)
        width = held.size - held.block
        head = {4: np.float32(SCALE).tobytes(), 2: np.float16(SCALE).tobytes(), 1: bytes([116]), 0: b""}[width]
        blocks = np.empty((drawn, held.size), np.uint8)
        blocks[:, :width] = np.frombuffer(head, np.uint8)
        blocks[:, width:] = codes.view(torch.uint8).numpy().reshape(drawn, held.block)
    return np.resize(blocks, tensor.nbytes).data
