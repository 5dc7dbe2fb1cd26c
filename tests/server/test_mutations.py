"""Conversations that were right once, with a few bytes changed: whatever they mean now, the server has no fault."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from struct import pack

import pytest

from sdrpc.device import Bytes
from sdrpc.ggml import params
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from sdrpc.wire.records import Record
from tests.server.conftest import Scene, eventually
from tests.support.client import Adder, RawClient

INTERESTING = [0, 1, 2, 4, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
CONVERSATIONS = 150


def recorded(scene: Scene) -> list[bytes]:
    """The messages of a client that uses most commands, as it sent them."""
    sent: list[bytes] = []
    with scene.client(Capability.ERRORS) as client:
        whole = client.send

        def record(*parts: Bytes) -> None:
            sent.append(b"".join(map(bytes, parts)))
            whole(*parts)

        client.send = record  # type: ignore[method-assign]
        add = Adder(client, elements=16)
        add()
        add()
        image = client.record(add.buffer, (8, 2), id=1)
        kernel = client.record(add.buffer, (2, 2), id=2, at=64)
        other = client.buffer(4096)
        nodes = [
            client.record(add.buffer, (2, 2), id=4, op="VIEW", src=(1,), view_src=1, params=params.View(0)),
            client.record(other, (2, 2), id=5, at=512, op="CONT", src=(4,)),
            client.record(other, (2, 2), id=6, at=1024, op="MUL_MAT", src=(2, 5)),
            client.record(other, (2, 2), id=7, at=2048, op="SOFT_MAX", src=(6,), params=params.SoftMax(1.0)),
            client.record(other, (2, 4), id=8, at=3072, op="CONCAT", src=(7, 5), params=params.Concat(1)),
        ]
        nodes[0] = nodes[0]._replace(nb=image.nb)
        client.compute([4, 5, 6, 7, 8], [image, kernel, *nodes])
        client.get(nodes[-1], 32)
        client.ask(messages.CopyTensor(nodes[1], nodes[2]))
        client.ask(messages.GetAllocSize(0, image, (Record(),) * 10))
        client.ask(messages.MemsetTensor(image, 0, 8, 1))
        client.ask(messages.FreeBuffer(other[0]))
        client.ask(messages.DeviceCount())
    return sent


def mutated(conversation: Sequence[bytes], rng: random.Random) -> bytes:
    """One or more changes: a byte, a number, a piece cut out or doubled, messages in another order."""
    parts = [bytearray(part) for part in conversation]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        part = rng.choices(parts, [len(part) for part in parts])[0]  # graphs have most bytes
        at = rng.randrange(len(part))
        match rng.randrange(6):
            case 0:
                part[at] ^= 1 << rng.randrange(8)
            case 1:
                part[at : at + 4] = pack("<I", rng.choice(INTERESTING) % 2**32)
            case 2:
                part[at : at + 8] = pack("<Q", rng.choice(INTERESTING))
            case 3:
                del part[at : at + rng.randrange(1, 64)]
            case 4:
                part[at:at] = part[at : at + rng.randrange(1, 64)]
            case _:
                i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
                parts[i], parts[j] = parts[j], parts[i]
    return b"".join(parts)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_conversations(scene: Scene, seed: int) -> None:
    assert scene.caplog is not None
    conversation = recorded(scene)
    rng = random.Random(seed)
    for _ in range(CONVERSATIONS):
        with RawClient(scene.server.port, capabilities=Capability.ERRORS) as client:
            try:
                client.send(mutated(conversation, rng))
                client.socket.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # thrown out before it had said all
            finally:
                client.ended()
    assert eventually(lambda: scene.server.clients == 1)
    assert not [record.getMessage() for record in scene.caplog.records if "fault" in record.getMessage()]
    scene.goes_on()
