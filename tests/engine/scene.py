"""A device with weights that programs want in another form, and all that a client can do to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import torch
from hypothesis import strategies as st

from sdrpc.device import Buffer, Rows
from sdrpc.engine import LocalDevice
from sdrpc.engine.device import LocalProgram
from sdrpc.engine.precision import Precision
from sdrpc.ggml import build as b
from sdrpc.ggml.params import Conv2D
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import BF16, F16, F32, Type
from tests.engine.compare import at

NAME = os.environ.get("SDRPC_TEST_DEVICE", "CPU")
DEVICE = torch.device("cpu") if NAME == "CPU" else torch.device("cuda", int(NAME.removeprefix("CUDA")))
FAST = Precision("fast", torch.bfloat16, channels_last=True)
BUDGET = 1 << 20

IMAGE, ROWS, OUT = 0, 8192, 16384
"""Inputs and outputs, in a buffer of their own."""
KERNEL, MATRIX, OTHER, SIZE = 64, 64 + 9216 + 128, 64 + 9216 + 128 + 8192, 28_000
"""Weights: a kernel of 3×3, 16 → 32 channels; a matrix of 64×64; a kernel in BF16; and bytes around them."""


def numbers(seed: int, size: int) -> bytes:
    """Bytes that are moderate numbers in F16, BF16 and F32, wherever one begins to read."""
    rng = np.random.default_rng(seed)
    return bytes(rng.integers(0x30, 0x40, size, np.uint8) | (rng.integers(0, 2, size, np.uint8) << 7))


def receive(device: LocalDevice, buffer: Buffer, offset: int, size: int, fill: Callable[[memoryview], None]) -> None:
    """Have ``fill`` put ``size`` bytes into ``buffer``, as data that comes from a client."""
    with device.receiving(buffer, [(offset, size)]) as received:
        received([(offset, size)], fill)


class Scene:
    """A client of ``device`` with weights in one buffer and inputs and outputs in another."""

    def __init__(self, device: LocalDevice) -> None:
        self.device = device
        self.weights, self.rest = self.device.allocate(SIZE), self.device.allocate(1 << 16)
        self.device.write(self.weights, 0, numbers(0, SIZE))
        self.device.write(self.rest, 0, numbers(1, 1 << 14))
        self.programs: dict[str, LocalProgram] = {}

    def leaf(self, type: Type, *ne: int, start: int) -> Tensor:
        return b.leaf(type, *ne, buffer=self.weights.key, offset=start)

    def convolution(self, type: Type = F16, start: int = KERNEL, image: int = IMAGE) -> Tensor:
        x = b.leaf(F32, 6, 6, 16, 1, buffer=self.rest.key, offset=image)
        return b.node("CONV_2D", self.leaf(type, 3, 3, 16, 32, start=start), x, params=Conv2D(1, 1, 1, 1, 1, 1))

    def product(self) -> Tensor:
        return b.mul_mat(self.leaf(F16, 64, 64, start=MATRIX), b.leaf(F32, 64, 8, buffer=self.rest.key, offset=ROWS))

    def node(self, which: str) -> Tensor:
        """What a program computes."""
        match which:
            case "kernel":
                return self.convolution()
            case "kernel of another image":
                return self.convolution(image=ROWS)
            case "other kernel":
                return self.convolution(BF16, OTHER)
            case "matrix":
                return self.product()
            case "a matrix of kernels":  # the same bytes, wanted otherwise
                matrix = self.leaf(F16, 64, 72, start=KERNEL)
                return b.mul_mat(matrix, b.leaf(F32, 64, 8, buffer=self.rest.key, offset=ROWS))
            case "a matrix of floats":  # which become half as many bytes
                matrix = self.leaf(F32, 64, 32, start=MATRIX)
                return b.mul_mat(matrix, b.leaf(F32, 64, 8, buffer=self.rest.key, offset=ROWS))
            case "bytes across":
                return b.cont(self.leaf(F16, 1024, start=MATRIX - 512))
        raise ValueError(which)

    def program(self, which: str) -> LocalProgram:
        if which not in self.programs:
            buffers = {each.key: each for each in (self.weights, self.rest)}
            if which == "writes between":
                place = self.leaf(F32, 512, start=MATRIX + 1024)
                graph = Graph((b.cpy(b.leaf(F32, 512, buffer=self.rest.key, offset=ROWS), place),))
            else:
                graph = Graph((at(self.node(which), self.rest.key, OUT),))
            self.programs[which] = self.device.compile(graph, buffers)
        return self.programs[which]

    def run(self, which: str) -> np.ndarray:
        """What a program gives."""
        self.program(which).run()
        return np.frombuffer(bytes(self.device.read(self.rest, OUT, 8192)), np.float32).copy()

    def bytes_(self) -> bytes:
        return bytes(self.device.read(self.weights, 0, SIZE))

    @property
    def lying(self) -> int:
        """Weights that lie there otherwise than they came."""
        return len(self.weights.storage.forms._laid)


@contextmanager
def scene(dequant_cache: int = BUDGET) -> Iterator[Scene]:
    device = LocalDevice(NAME, DEVICE, FAST, threads=1, dequant_cache=dequant_cache)
    try:
        yield Scene(device)
    finally:
        device.close()


PROGRAMS = [
    "kernel",
    "kernel of another image",
    "other kernel",
    "matrix",
    "a matrix of kernels",
    "bytes across",
    "writes between",
]


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    start = draw(st.sampled_from([0, KERNEL, MATRIX, OTHER]) | st.integers(0, SIZE - 1))
    end = draw(st.sampled_from([KERNEL + 9216, MATRIX + 8192, OTHER + 9216, SIZE]) | st.integers(1, SIZE))
    return min(start, end), max(start, end)


actions = st.one_of(
    st.tuples(st.just("run"), st.sampled_from(PROGRAMS)),
    st.tuples(st.just("run"), st.sampled_from(PROGRAMS[:4])),
    st.tuples(st.sampled_from(["read", "write", "fill", "copy", "rows", "read rows", "receive"]), ranges()),
)


def did(one: Scene, what: str, about: object, number: int) -> bytes:
    """Do ``what``; what comes back. Of what is written ``number`` decides the bytes."""
    if what == "run":
        assert isinstance(about, str)
        return one.run(about).tobytes()
    assert isinstance(about, tuple)
    start, end = about
    size = end - start
    rows = Rows(start, 16, max(size // 48, 1), 48)
    new = numbers(number, size)
    match what:
        case "read":
            return bytes(one.device.read(one.weights, start, size))
        case "write":
            one.device.write(one.weights, start, new)
        case "receive":
            receive(one.device, one.weights, start, size, BytesIO(new).readinto)
        case "fill":
            one.device.fill(one.weights, start, size, 1)
        case "copy":
            size = min(size, 3000)
            one.device.copy(one.weights, start, one.weights, (start * 7 + 640) % (SIZE - size), size)
        case "rows" if rows.offset + rows.extent <= SIZE:
            one.device.write_rows(one.weights, rows, bytes(range(16)) * rows.copies)
        case "read rows" if rows.offset + rows.extent <= SIZE:
            return bytes(one.device.read_rows(one.weights, rows))
    return b""
