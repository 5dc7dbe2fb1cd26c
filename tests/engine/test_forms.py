"""Weights that lie in their buffer as they are computed with: nobody who looks at the bytes can tell.
``SDRPC_TEST_DEVICE=CUDA0``: where programs are recorded, too."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sdrpc.device import Buffer, Rows, Span
from sdrpc.engine.dtypes import DTYPES
from sdrpc.engine.forms import changed, changed_back, fits, rest_bytes
from sdrpc.engine.memory import LocalBuffer
from sdrpc.engine.program import Bound
from sdrpc.engine.weights import LAID, Source, WeightFormat, convert
from sdrpc.errors import ConnectionLost
from sdrpc.ggml.tensor import contiguous_strides, dims
from sdrpc.ggml.types import BF16, F16, F32, Type
from tests.engine.compare import error
from tests.engine.scene import BUDGET, DEVICE, KERNEL, MATRIX, NAME, SIZE, actions, did, receive, scene

HALF, NARROW = torch.float16, torch.bfloat16


def source(type: Type, ne: tuple[int, ...], format: WeightFormat, start: int = 0) -> Source:
    shape = dims(*ne)
    nb = contiguous_strides(type, shape)
    return Source(1, start, start + nb[3] * shape[3], type, shape, nb, format)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("type", "wanted"), [(F16, NARROW), (F16, HALF), (BF16, NARROW), (F32, torch.float32)], ids=str
)
def test_what_is_changed_can_be_changed_back_to_the_bit(type: Type, wanted: torch.dtype, together: bool) -> None:
    """Of float16: every number that there is."""
    place = source(type, (4, 16, 31, 32), WeightFormat(wanted, together))
    assert fits(place) == (together or (type is F16 and wanted is NARROW))
    if not fits(place):
        return
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16)) | (halves & 0x3FF == 0)]
    assert len(halves) == 4 * 16 * 31 * 32 + 2, "all but two"
    numbers = torch.from_numpy(halves[1:-1].view(np.float16).copy()).to(DEVICE, DTYPES[type])
    raw = numbers.view(32, 31, 16, 4)
    wished = convert(raw, type, place.ne, place.format)
    data = numbers.view(torch.uint8)
    before = data.clone()
    found = changed(data, place)
    assert found is not None
    weight, rest = found
    assert weight.data_ptr() == data.data_ptr(), "it lies there"
    assert (weight.dtype, weight.stride()) == (wished.dtype, wished.stride())
    assert torch.equal(weight, wished)
    assert rest_bytes(place) == (0 if rest is None else rest.nbytes)
    assert torch.equal(changed_back(data, place, rest), before)


def test_numbers_that_could_not_be_changed_back_stay() -> None:
    numbers = torch.ones(4096, dtype=HALF)
    numbers[77] = torch.nan
    before = numbers.view(torch.uint8).clone()
    assert changed(numbers.view(torch.uint8), source(F16, (4096,), WeightFormat(NARROW))) is None
    assert torch.equal(numbers.view(torch.uint8), before)


@pytest.mark.parametrize(
    "place",
    [
        source(F32, (64, 64), WeightFormat(NARROW)),
        source(F16, (64, 64), WeightFormat(torch.float32)),
        source(F16, (63, 65), WeightFormat(NARROW)),
        source(F16, (8, 8), WeightFormat(NARROW)),
        source(F16, (64, 64), WeightFormat(NARROW), start=32),
        source(F16, (64, 64), WeightFormat(NARROW))._replace(nb=(2, 256, 16384, 16384)),
        source(F16, (64, 64), WeightFormat(torch.uint8, packed=True)),
    ],
    ids=["loses half", "is larger", "is odd", "is small", "lies between", "has gaps", "is packed"],
)
def test_what_can_not_lie_there(place: Source) -> None:
    assert not fits(place)


@settings(max_examples=40, deadline=None)
@given(st.lists(actions, max_size=14))
def test_nobody_can_tell(steps: list[tuple[str, object]]) -> None:
    """Whatever is read, written and run in whatever order: bytes are those of a device that changes none, and so are
    results, but for how convolutions of another layout add up."""
    with scene() as one, scene(dequant_cache=0) as other:
        for number, (what, about) in enumerate(steps):
            found = [did(each, what, about, number) for each in (one, other)]
            if what == "run":
                assert error(np.frombuffer(found[0], np.float32), np.frombuffer(found[1], np.float32)) < 0.01, about
            else:
                assert found[0] == found[1], (what, about)
            assert other.lying == 0
        assert one.bytes_() == other.bytes_()


def test_there_is_no_second_copy() -> None:
    with scene() as one:
        before = one.bytes_()
        assert [one.run("kernel").any() for _ in range(2)] == [True, True]
        assert one.lying == 1
        for _ in range(3):
            one.run("other kernel")
            one.run("matrix")
        assert one.lying == 3
        rests, inputs = (9 * 16 * 32 + 64 * 64) // 2, (6 * 6 * 16 + 64 * 8) * 2
        assert one.device._weights.used == rests + 3 * LAID + inputs, "inputs that nobody wrote to are kept, too"
        assert one.bytes_() == before
        assert one.lying == 3, "reading changes nothing"
        one.device.free(one.weights)
        assert one.device._weights.used == inputs
        assert one.run("kernel").any(), "a program goes on with a buffer that was freed"


@pytest.mark.parametrize("which", ["kernel", "a matrix of floats"])
def test_of_what_was_freed_nothing_is_kept(which: str) -> None:
    """By a program that has never run before: neither in the place of what came nor beside it. Nobody would give it
    back."""
    with scene() as one:
        one.program(which)
        one.device.write(one.rest, 0, bytes(1 << 14))
        one.device.free(one.weights)
        for _ in range(3):
            one.run(which)
            one.device.write(one.rest, 0, bytes(1 << 14))
        assert one.device._weights.used == 0


def test_what_is_copied_to_another_device_is_as_it_came() -> None:
    with scene() as one, scene() as other:
        before = one.bytes_()
        for each in (one, other):
            each.run("kernel")
            each.device.fill(each.weights, MATRIX, SIZE - MATRIX, 1)
            each.run("other kernel")
        assert (one.lying, other.lying) == (2, 2)
        start = KERNEL + 1000
        size = MATRIX - start
        assert one.device.copy_to(
            Span(one.device, one.weights, start, size), Span(other.device, other.weights, start, size)
        )
        assert (one.lying, other.lying) == (2, 1)
        assert other.bytes_() == before[:MATRIX] + b"\1" * (SIZE - MATRIX)


def test_who_wants_it_otherwise_gets_it_for_good() -> None:
    with scene() as one, scene(dequant_cache=0) as other:
        for _ in range(3):
            for which in ("kernel", "matrix", "a matrix of kernels", "kernel"):
                assert error(one.run(which), other.run(which)) < 0.01
        assert one.lying == 1, "the matrix"
        one.device.write(one.weights, 0, bytes(SIZE))
        assert one.lying == 0
        assert not one.run("kernel").any()


def test_what_another_program_has_changed_since_it_was_written() -> None:
    """It is no weight any more to the one that has used it before, which reads it as it came."""
    with scene() as one, scene(dequant_cache=0) as other:
        new = np.random.default_rng(1).standard_normal(SIZE // 2).astype("<f2").tobytes()
        for which in ("kernel", "kernel", "kernel of another image", "kernel"):
            if which == "kernel of another image":
                for each in (one, other):
                    each.device.write(each.weights, 0, new)
            assert error(one.run(which), other.run(which)) < 0.01, which
        assert one.lying == 0


def test_what_another_program_has_changed_since_a_run_that_took_it_as_it_came() -> None:
    """What was recorded then, or is compiled, reads it as it came and is of no use any more."""
    with scene(dequant_cache=0) as one, scene(dequant_cache=0) as other:
        for _ in range(3):
            assert error(one.run("kernel"), other.run("kernel")) < 0.01
        one.device._weights.budget = BUDGET
        for which in ("kernel of another image", "kernel of another image"):
            assert error(one.run(which), other.run(which)) < 0.01
        assert one.lying == 1
        bound = one.programs["kernel"].bound
        if isinstance(bound, Bound):
            assert bound.begin()
        assert error(one.run("kernel"), other.run("kernel")) < 0.01


def test_what_does_not_fit_into_the_budget_is_converted_each_time() -> None:
    with scene(dequant_cache=64 * 64 // 2 + LAID + 4000) as one, scene(dequant_cache=0) as other:
        for _ in range(3):
            for which in ("matrix", "kernel"):
                assert error(one.run(which), other.run(which)) < 0.01
        assert one.lying == 1


def test_whoever_wants_bytes_to_stay_waits_for_the_run_that_uses_them() -> None:
    with scene() as one:
        before = one.bytes_()
        for which in ("matrix", "matrix", "other kernel"):
            one.run(which)
        storage = one.weights.storage
        came: list[bytes] = []

        def wait() -> None:
            with storage.forms.as_they_came(storage.data, MATRIX, MATRIX + 100):
                came.append(storage.data[:SIZE].cpu().numpy().tobytes())

        waiting = threading.Thread(target=wait)
        with storage.forms.in_use():
            waiting.start()
            assert one.bytes_() == before, "reading does not wait"
            assert one.lying == 2
            assert not came
            with storage.forms.as_they_came(storage.data, KERNEL, KERNEL + 100):
                assert one.lying == 2, "this one lies as it came anyway"
        waiting.join(60)
        assert came == [before]
        for which in ("matrix", "matrix", "other kernel"):
            one.run(which)
        assert one.lying == 0, "all of it stays as it came"


class Asked(TorchDispatchMode):
    """Asks from another thread, whenever torch is to write to ``memory``, whether that could read it now."""

    def __init__(self, buffer: LocalBuffer) -> None:
        super().__init__()
        self.buffer = buffer
        self.answers: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if func._schema.is_mutable else None
        if isinstance(target, torch.Tensor) and _is_in(target, self.buffer.storage.data):
            asking = threading.Thread(target=self._ask)
            asking.start()
            asking.join()
        return func(*args, **(kwargs or {}))

    def _ask(self) -> None:
        lock = self.buffer.storage.forms.lock
        self.answers.append(lock.acquire(blocking=False))
        if self.answers[-1]:
            lock.release()


def _is_in(part: torch.Tensor, whole: torch.Tensor) -> bool:
    return 0 <= part.data_ptr() - whole.data_ptr() < whole.nbytes


@pytest.mark.parametrize("how", ["write", "fill", "rows", "copy", "copy within", "from another device"])
def test_nobody_can_read_between_what_a_write_makes_of_bytes_and_the_write(how: str) -> None:
    """A weight that is written over is not changed back before: a reader would see what nobody ever sent. On a GPU it
    must not come between in the one stream in which all of it is queued."""
    size, new = 8192, bytes(range(256)) * 32
    with scene() as one, scene() as other:
        one.run("matrix")
        one.run("matrix")
        device, weights = one.device, one.weights
        assert one.lying == 1
        expected = new
        with Asked(weights) as asked:
            match how:
                case "write":
                    device.write(weights, MATRIX, new)
                case "fill":
                    device.fill(weights, MATRIX, size, 7)
                    expected = bytes([7]) * size
                case "rows":
                    device.write_rows(weights, Rows(MATRIX, 256, 32, 256), new)
                case "copy":
                    device.write(one.rest, 0, new)
                    device.copy(one.rest, 0, weights, MATRIX, size)
                case "copy within":
                    expected = bytes(device.read(weights, KERNEL, size))
                    device.copy(weights, KERNEL, weights, MATRIX, size)
                case "from another device":
                    other.device.write(other.rest, 0, new)
                    assert other.device.copy_to(
                        Span(other.device, other.rest, 0, size), Span(device, weights, MATRIX, size)
                    )
        assert asked.answers == ([] if NAME == "CPU" and how == "write" else [False]), "not while it waits"
        assert bytes(device.read(weights, MATRIX, size)) == expected
        assert one.lying == 0


@pytest.mark.parametrize("size", [1000, (1 << 20) + 1, 4 << 20])
def test_what_is_received_is_there_and_only_what_was_received(size: int) -> None:
    """Pieces of all sizes: into memory that the CPU touches; through memory that a GPU reads itself, and through
    ordinary memory, where nothing is written if filling it fails."""
    with scene() as one:
        buffer, rng = one.device.allocate(size + 2), np.random.default_rng(0)
        first, other = rng.bytes(size), rng.bytes(size)

        def lost(memory: memoryview) -> None:
            memory[:] = other
            raise ConnectionLost("somewhere", "receiving")

        receive(one.device, buffer, 1, size, lambda memory: memory.__setitem__(slice(None), first))
        with pytest.raises(ConnectionLost):
            receive(one.device, buffer, 1, size, lost)
        there = other if one.device.torch_device.type == "cpu" else first
        assert bytes(one.device.read(buffer, 0, size + 2)) == b"\0" + there + b"\0"


def test_two_that_copy_to_and_fro_do_not_wait_for_each_other() -> None:
    with scene() as one:
        a, b = one.weights, one.rest
        done: list[int] = []

        def copy(source: Buffer, target: Buffer) -> None:
            for _ in range(300):
                one.device.copy(source, 0, target, 0, 4096)
            done.append(1)

        threads = [threading.Thread(target=copy, args=each, daemon=True) for each in ((a, b), (b, a))]
        for each in threads:
            each.start()
        for each in threads:
            each.join(60)
        assert done == [1, 1]


def test_readers_beside_runs_see_what_came() -> None:
    with scene() as one:
        before, storage = one.bytes_(), one.weights.storage
        wrong: list[int] = []
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                with storage.forms.lock:
                    if storage.forms.read(storage.data, 0, SIZE).cpu().numpy().tobytes() != before:
                        wrong.append(1)

        reading = threading.Thread(target=read)
        reading.start()
        try:
            for _ in range(20):
                one.run("kernel")
                one.run("matrix")
                one.device.write(one.weights, MATRIX, before[MATRIX : MATRIX + 8192])
        finally:
            done.set()
            reading.join()
        assert not wrong
