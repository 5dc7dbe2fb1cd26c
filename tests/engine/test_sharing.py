"""Two clients' buffers of one content have one memory, and neither can tell. ``SDRPC_TEST_DEVICE=CUDA0``: on a GPU."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc.device import Rows
from sdrpc.engine import sharing
from sdrpc.errors import OutOfMemory
from tests.engine.compare import error
from tests.engine.scene import BUDGET, DEVICE, FAST, KERNEL, MATRIX, NAME, SIZE, Scene, actions, did, receive
from tests.support.accelerator import Untouchable


@pytest.fixture(autouse=True, scope="module")
def _small_ones_are_worth_it() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "LEAST", 1)
        patch.setattr(sharing, "PIECE", 10_000)
        yield


@contextmanager
def clients(count: int = 2, dequant_cache: int = BUDGET) -> Iterator[list[Scene]]:
    """Several of one device, which have the same weights, each for itself."""
    device = Untouchable(NAME, DEVICE, FAST, threads=1, dequant_cache=dequant_cache)
    try:
        yield [Scene(device) for _ in range(count)]
    finally:
        device.close()


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two results differ by no more than how a convolution in bfloat16 adds up, which is another way when it is
    recorded."""
    return error(one, other) < 0.01


def gives(first: Scene, second: Scene) -> None:
    """The second one asks for all that the first one has, by what it is."""
    first.device.copy(first.weights, 0, second.weights, 0, SIZE)
    first.device.may_be_same(second.weights, first.weights)


def share(*scenes: Scene) -> bool:
    return len({scene.weights.storage for scene in scenes}) == 1


@contextmanager
def sharing_two() -> Iterator[tuple[Scene, Scene, bytes]]:
    """Two that share weights, of which two lie otherwise than they came; and what came."""
    with clients() as (first, second):
        for which in ("kernel", "kernel", "matrix", "matrix"):
            first.run(which)
        gives(first, second)
        second.run("kernel")
        assert share(first, second)
        assert first.lying == second.lying == 2
        yield first, second, first.bytes_()


def test_the_second_client_takes_no_memory_and_gets_the_same() -> None:
    with sharing_two() as (first, second, came):
        device = first.device
        used = device._weights.used
        for which in ("kernel", "matrix", "other kernel", "matrix"):
            assert alike(first.run(which), second.run(which))
        assert second.bytes_() == came
        assert device._weights.used <= used + 4 * 4096 + 9 * 16 * 32, "nothing is converted twice, but for inputs"


def test_the_second_one_s_own_memory_is_given_back_before_it_runs() -> None:
    """Also what its program was bound to before; nothing waits for the cycle collector."""
    with clients() as (first, second):
        first.run("kernel")
        gives(first, second)
        second.program("kernel")
        own = weakref.ref(second.weights.storage)
        gc.disable()
        try:
            second.run("kernel")
            assert share(first, second)
            assert own() is None
        finally:
            gc.enable()


def test_memory_goes_with_the_last_one() -> None:
    with clients(3) as scenes:
        first, second, third = scenes
        device = first.device
        first.run("kernel")
        gives(first, second)
        second.run("kernel")
        device.free(first.weights)
        gives(second, third)
        third.run("kernel")
        assert device._storages.spared == SIZE
        assert share(second, third)
        assert third.bytes_() == second.bytes_()
        device.free(second.weights)
        assert device._storages.spared == 0
        data = weakref.ref(third.weights.storage)
        expected = third.run("matrix")
        device.free(third.weights)
        assert alike(third.run("matrix"), expected), "its program goes on"
        for each in scenes:
            del each.weights
            each.programs.clear()
        gc.collect()
        assert data() is None


def test_what_is_spared_is_not_free_for_others() -> None:
    """Each may write to all of its own at any time."""
    with sharing_two() as (first, second, _):
        device = first.device
        assert device._storages.spared == SIZE
        if NAME != "CPU":
            free, device._storages.spared = device.memory().free, SIZE + (1 << 30)
            assert device.memory().free <= free - (1 << 29)
            device._storages.spared = SIZE
        device.write(second.weights, 0, b"x")
        assert device._storages.spared == 0


WRITES = {
    "write": lambda one: one.device.write(one.weights, MATRIX, bytes(8192)),
    "receive": lambda one: receive(one.device, one.weights, MATRIX, 8192, lambda memory: _fill(memory, 7)),
    "fill": lambda one: one.device.fill(one.weights, KERNEL, 100, 1),
    "clear": lambda one: one.device.clear(one.weights, 1),
    "rows": lambda one: one.device.write_rows(one.weights, Rows(KERNEL, 16, 10, 48), bytes(160)),
    "copy": lambda one: one.device.copy(one.rest, 0, one.weights, KERNEL, 5000),
    "copy within": lambda one: one.device.copy(one.weights, 0, one.weights, KERNEL, 5000),
    "program": lambda one: one.run("writes between"),
}


def _fill(memory: memoryview, value: int) -> None:
    memory[:] = bytes([value]) * len(memory)


@pytest.mark.parametrize("by_first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("how", WRITES)
def test_who_writes_has_its_own_from_then_on(how: str, by_first: bool) -> None:
    with sharing_two() as (first, second, came), clients(1) as (alone,):
        writer, other = (first, second) if by_first else (second, first)
        expected = {which: other.run(which) for which in ("kernel", "matrix")}
        WRITES[how](writer)
        WRITES[how](alone)
        assert not share(first, second)
        assert (writer.bytes_(), other.bytes_()) == (alone.bytes_(), came)
        for _ in range(3):
            for which in expected:
                assert alike(other.run(which), expected[which])
                assert alike(writer.run(which), alone.run(which))
        assert (writer.bytes_(), other.bytes_()) == (alone.bytes_(), came)


def test_a_copy_of_its_own_is_nobodys_to_read_before_it_is_written() -> None:
    """Else another client could get half of what is written, and the rest later."""
    with sharing_two() as (first, _, _), ThreadPoolExecutor(1) as others:

        def may_read() -> bool:
            lock = first.weights.storage.forms.lock
            if free := lock.acquire(blocking=False):
                lock.release()
            return free

        with first.device._writing(first.weights, 0, 8):
            assert not others.submit(may_read).result()
        assert others.submit(may_read).result()


def test_a_buffer_that_data_comes_to_is_not_shared() -> None:
    """What comes is written without a lock: another client would get it, too."""
    with clients() as (first, second):
        gives(first, second)
        for writer in (first, second):
            with first.device.receiving(writer.weights, [(MATRIX, 8192)]):
                second.run("kernel")
                assert not share(first, second)
            gives(first, second)
        second.run("kernel")
        assert share(first, second)


def test_what_is_not_the_same_as_a_whole_stays() -> None:
    with clients() as (first, second):
        gives(first, second)
        first.device.write(second.weights, SIZE - 1, bytes([1 + first.bytes_()[-1] & 0xFF]))
        second.run("kernel")
        assert not share(first, second)
        first.device.copy(first.weights, SIZE - 1, second.weights, SIZE - 1, 1)
        second.run("kernel")
        assert not share(first, second), "nobody has said so again"
        gives(first, second)
        first.device.free(first.weights)
        second.run("kernel")
        assert first.device._storages.spared == 0


def test_a_program_without_memory_for_its_own_copy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have taken what there was. Both go on with what they have."""

    def full(size: int) -> None:
        raise OutOfMemory(NAME, size)

    with sharing_two() as (first, second, came):
        with monkeypatch.context() as patch:
            patch.setattr(first.device._storages, "_make", full)
            for act in (lambda: first.device.write(first.weights, 0, b"x"), lambda: second.run("writes between")):
                with pytest.raises(OutOfMemory):
                    act()
        assert share(first, second)
        assert first.bytes_() == second.bytes_() == came
        first.device.write(first.weights, 0, b"x")
        assert second.bytes_() == came


asks = st.tuples(st.just("asks"), st.just(None))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), asks | actions), min_size=3, max_size=14))
def test_neither_can_tell(steps: list[tuple[int, tuple[str, object]]]) -> None:
    """Whatever two do in whatever order, asking for what the other one has now and then: all is as on a device where
    nothing is shared or changed where it lies."""
    with clients() as two, clients(dequant_cache=0) as others:
        for number, (who, (what, about)) in enumerate(steps):
            if what == "asks":
                gives(two[1 - who], two[who])
                others[0].device.copy(others[1 - who].weights, 0, others[who].weights, 0, SIZE)
                continue
            found = [did(each[who], what, about, number) for each in (two, others)]
            if what == "run":
                assert alike(*(np.frombuffer(each, np.float32) for each in found)), about
            else:
                assert found[0] == found[1], (what, about)
        assert [each.bytes_() for each in two] == [each.bytes_() for each in others]


def test_clients_at_work_at_the_same_time() -> None:
    """One writes and looks, the other one asks and computes."""
    with clients() as (first, second):
        came = first.bytes_()
        wrong: list[str] = []

        def write() -> None:
            for number in range(40):
                new = came if number % 2 else bytes([number]) * SIZE
                first.device.write(first.weights, 0, new)
                first.run("kernel")
                if first.bytes_() != new:
                    wrong.append("first")

        def ask() -> None:
            for _ in range(40):
                gives(first, second)
                before = second.bytes_()
                second.run("matrix")
                if second.bytes_() != before:
                    wrong.append("second")

        threads = [threading.Thread(target=each) for each in (write, ask)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert not wrong
