"""The same questions to ggml's server and to ours: the same answers, but for what each says of its own machine."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest

from sdrpc.ggml.types import TYPES
from sdrpc.server import Server
from sdrpc.wire import messages as m
from sdrpc.wire.records import Record
from tests.interop.conftest import NativeServer
from tests.support.client import RawClient

pytestmark = pytest.mark.interop

SHAPES = ((256, 3), (1024, 5, 2), (512, 1, 1, 3))
ODD = ((96, 7), (32, 1))
NONE = (Record(),) * 10


def devices(client: RawClient) -> list[object]:
    """How many there are, and what of their memory is more than a number of this machine.

    A client of ours is told of its share, nine tenths.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    answers: list[object] = [client.ask(m.DeviceCount()).device_count]
    for device in range(2):
        alignment = client.ask(m.GetAlignment(device)).alignment
        memory = client.ask(m.GetDeviceMemory(device))
        answers += [64 % alignment, 0 < memory.free <= memory.total]
        answers += [0.89 * machine < memory.total <= machine, client.ask(m.GetMaxSize(device)).max_size >= memory.total]
    return answers


def sizes(client: RawClient) -> list[object]:
    """What tensors of every type take, in no buffer; and results of operations that ask for room of their own."""
    answers = []
    for name, kind in TYPES.items():
        if name in client.dialect.type_numbers:
            for shape in (*SHAPES, *(shape for shape in ODD if shape[0] % kind.block == 0)):
                tensor = client.record((0, 0), shape, type=name, data=0)
                answers.append(client.ask(m.GetAllocSize(0, tensor, NONE)).alloc_size)
    matrix, x, ids = (
        client.record((0, 0), shape, type=kind, data=0, id=number)
        for number, kind, shape in ((1, "Q4_0", (64, 8, 4)), (2, "F32", (64, 2, 3)), (3, "I32", (2, 3)))
    )
    product = client.record((0, 0), (8, 2, 3), op="MUL_MAT_ID", data=0, id=4, src=(1, 2, 3))
    answers.append(client.ask(m.GetAllocSize(1, product, (matrix, x, ids, *NONE[:7]))).alloc_size)
    return answers


def memory(client: RawClient) -> list[object]:
    """INIT_TENSOR, BUFFER_CLEAR, SET_TENSOR, MEMSET_TENSOR as they show in the bytes."""
    buffer = client.buffer(4096)
    tensor = client.record(buffer, (256, 3), type="Q8_0", at=256)
    size = 256 * 3 // 32 * 34
    client.ask(m.InitTensor(tensor))
    client.ask(m.BufferClear(buffer[0], 0xA5))
    answers: list[object] = [client.get(tensor, size)]
    client.set(tensor, np.random.default_rng(1).bytes(size - 7), 5)
    client.ask(m.MemsetTensor(tensor, 11, 30, 0x7E))
    client.ask(m.MemsetTensor(tensor, size - 1, 1, 1))
    client.ask(m.MemsetTensor(tensor, 0, 0, 2))
    return [*answers, client.get(tensor, size), client.get(tensor, 13, size - 13)]


def copies(client: RawClient) -> list[object]:
    """COPY_TENSOR in a buffer, between buffers, and between devices."""
    first, second, other = client.buffer(4096), client.buffer(4096), client.buffer(4096, 1)
    source = client.record(first, (31, 7))
    client.set(source, np.random.default_rng(2).bytes(31 * 7 * 4))
    answers: list[object] = []
    for buffer, at in ((first, 2048), (second, 64), (other, 128)):
        target = client.record(buffer, (31, 7), at=at)
        answers.append(client.ask(m.CopyTensor(source, target)).result)
        answers.append(client.get(target, 31 * 7 * 4))
    back = client.record(first, (31, 7), at=1024)
    answers.append(client.ask(m.CopyTensor(client.record(other, (31, 7), at=128), back)).result)
    return [*answers, client.get(back, 31 * 7 * 4)]


def hashes(client: RawClient) -> list[object]:
    """A server without a cache has nothing."""
    tensor = client.record(client.buffer(4096), (256,))
    return [client.ask(m.SetTensorHash(tensor, 0, number)).result for number in (0, 1, 2**64 - 1)]


@pytest.mark.parametrize("questions", [devices, sizes, memory, copies, hashes], ids=lambda f: f.__name__)
def test_same_answers(
    questions: Callable[[RawClient], list[object]], shared_native_server: NativeServer, our_server: Server
) -> None:
    shared_native_server.start()
    answers = []
    for endpoint in (shared_native_server.endpoint, our_server.endpoint):
        with RawClient(int(endpoint.split(":")[1])) as client:
            answers.append(questions(client))
    assert answers[0] == answers[1]
    assert answers[0]
