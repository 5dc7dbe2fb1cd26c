"""Graphs that take as long as a test wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sdrpc.device import Device
from sdrpc.ggml.build import leaf, node
from sdrpc.ggml.params import MulMat
from sdrpc.ggml.tensor import OUTPUT, Graph, Tensor
from sdrpc.ggml.types import F32


def products(device: Device, n: int, count: int) -> Callable[[], object]:
    """A program of so many products of n × n matrices, one after the other."""
    buffer = device.allocate(2 * 4 * n * n)
    weight = replace(leaf(F32, n, n), buffer=buffer.key)
    result: Tensor = weight
    nodes = []
    for _ in range(count):
        result = node("MUL_MAT", weight, result, params=MulMat())
        nodes.append(result)
    nodes[-1] = replace(nodes[-1], buffer=buffer.key, offset=4 * n * n, flags=OUTPUT)
    program = device.compile(Graph(tuple(nodes)), {buffer.key: buffer})

    def run() -> object:
        program.run()
        return device.read(buffer, 4 * n * n, 4)

    return run


def endless(device: Device) -> Callable[[], object]:
    """A program that runs for half a minute or more, also where a CPU multiplies 10¹² numbers a second, and that can be
    stopped after each of its products."""
    return products(device, 1536, 4000)
