"""Programs that repeat: as pure functions, compiled in another process, and how compiled code takes over."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sdrpc import storage
from sdrpc.engine import LocalDevice
from sdrpc.engine.compilation import CompiledProgram, Compiler, Origin, missing
from sdrpc.engine.compilation import compiler as compiling
from sdrpc.engine.compilation.faster import REPEATS, TIMES
from sdrpc.engine.compilation.job import Job, encode, read
from sdrpc.engine.compilation.pure import is_pure, pure
from sdrpc.engine.precision import EXACT, Precision
from sdrpc.engine.program import Bound
from sdrpc.engine.replay import Replay
from sdrpc.errors import ComputeError
from sdrpc.ggml import build as b
from sdrpc.ggml.params import Unary
from sdrpc.ggml.tensor import Graph
from sdrpc.ggml.tensor import Tensor as Node
from sdrpc.ggml.types import F16, F32
from tests.engine.compare import at

CPU = torch.device("cpu")
FAST = Precision("fast", torch.bfloat16)
N = 32
SECONDS = 2400.0
"""Compiling takes 40 seconds of a processor, most of them to import the compiler."""
INPUT, WEIGHT, OUT, BETWEEN = 0, 4096, 8192, 12288


def silu(x: Node) -> Node:
    return b.node("UNARY", x, params=Unary("SILU"))


def product(key: int) -> Graph:
    """silu(w · x) to OUT, with w in F16."""
    weight, x = b.leaf(F16, N, N, buffer=key, offset=WEIGHT), b.leaf(F32, N, 4, buffer=key, offset=INPUT)
    between = b.mul_mat(weight, x)
    return Graph((between, at(silu(between), key, OUT)))


@pytest.fixture(autouse=True)
def small_programs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdrpc.engine.compilation.faster.SMALL", 0)


class Program:
    """:func:`product` on a device with ``compiler``, run with other inputs each time."""

    def __init__(self, compiler: object, precision: Precision = FAST) -> None:
        self.device = LocalDevice("CPU", CPU, precision, threads=1, compiler=compiler)  # type: ignore[arg-type]
        self.buffer = self.device.allocate(16384)
        self.rng = np.random.default_rng(0)
        self.weigh()
        self.program = self.device.compile(product(self.buffer.key), {self.buffer.key: self.buffer})

    def weigh(self) -> None:
        self.w = self.rng.standard_normal((N, N)).astype("<f2")
        self.device.write(self.buffer, WEIGHT, self.w.tobytes())

    def __call__(self) -> None:
        """Run it, and hold the result against numpy."""
        x = self.rng.standard_normal((4, N)).astype("<f4")
        self.device.write(self.buffer, INPUT, x.tobytes())
        self.program.run()
        found = np.frombuffer(bytes(self.device.read(self.buffer, OUT, 4 * 4 * N)), "<f4").reshape(4, N)
        y = x.astype(np.float64) @ self.w.astype(np.float64).T
        wanted = y / (1 + np.exp(-y))
        assert np.linalg.norm(found - wanted) <= 2e-2 * np.linalg.norm(wanted)

    @property
    def runs_compiled(self) -> bool:
        bound = self.program.bound
        return isinstance(bound, Replay) and isinstance(bound._body, CompiledProgram)


class Told:
    """Stands for the compiler: ``answer`` makes the function of the job, or the failure. ``kept``: if it has it."""

    def __init__(self, answer: Callable[[Job], Callable[..., Sequence[Tensor]]], kept: bool = False) -> None:
        self.jobs: list[Job] = []
        self.looked_for: list[Job] = []
        self._answer, self._has = answer, kept

    def find(self, job: Job) -> Future[Callable[..., Sequence[Tensor]] | None]:
        self.looked_for.append(job)
        future: Future[Callable[..., Sequence[Tensor]] | None] = Future()
        future.set_result(self._answer(job) if self._has else None)
        return future

    def ask(self, job: Job) -> Future[Callable[..., Sequence[Tensor]]]:
        self.jobs.append(job)
        future: Future[Callable[..., Sequence[Tensor]]] = Future()
        try:
            future.set_result(self._answer(job))
        except ComputeError as error:
            future.set_exception(error)
        return future


def right(_: Job) -> Callable[..., Sequence[Tensor]]:
    return lambda *inputs: [torch.nn.functional.silu(inputs[0].float() @ inputs[1].float().mT)]


def test_a_program_as_a_pure_function() -> None:
    program = Program(None)
    program()
    program()
    bound = program.program.bound
    assert isinstance(bound, Bound)
    assert is_pure(bound.compiled.roots)
    kept = {i: tensor for i, weight in bound.weights.items() if (tensor := weight.kept) is not None}
    assert [(tensor.dtype, tensor.shape[-2:]) for tensor in kept.values()] == [(torch.bfloat16, (N, N))]
    for given in (kept, {}):
        function, inputs, stores, nodes = pure(bound, given)
        assert (torch.bfloat16 in {each.dtype for each in inputs}) == bool(given)
        (result,), (store,) = function(*inputs), stores
        assert result.dtype is store.dtype is torch.float32
        assert "UNARY" in nodes[0]
        torch.testing.assert_close(result, store)
    program.device.close()


def in_place(key: int) -> list[Node]:
    """x → x + x where x is, then what is there doubled."""
    x = b.leaf(F32, N, buffer=key, offset=INPUT)
    return [at(b.node("ADD", x, x), key, INPUT)]


def read_after_two_wrote(key: int) -> list[Node]:
    """Two nodes write the halves of what a third reads."""
    x = b.leaf(F32, N, buffer=key, offset=INPUT)
    halves = [at(b.node("ADD", x, x), key, BETWEEN + 4 * N * i) for i in range(2)]
    whole = b.leaf(F32, 2 * N, buffer=key, offset=BETWEEN)
    return [*halves, at(silu(whole), key, OUT)]


@pytest.mark.parametrize(("nodes", "expected"), [(in_place, True), (read_after_two_wrote, False)])
def test_what_reads_its_own_writing_is_no_pure_function(nodes: Callable[[int], list[Node]], expected: bool) -> None:
    device = LocalDevice("CPU", CPU, EXACT, threads=1)
    buffer = device.allocate(16384)
    bound = device.compile(Graph(tuple(nodes(buffer.key))), {buffer.key: buffer}).bound
    assert is_pure(bound.compiled.roots) is expected
    device.close()


def test_compiled_code_takes_over_when_it_agrees() -> None:
    compiler = Told(right)
    program = Program(compiler)
    for _ in range(REPEATS):
        program()
    assert not compiler.jobs, "so far it might be a text encoder's"
    program()
    program()
    assert program.runs_compiled
    program()
    assert len(compiler.jobs) == 1
    assert compiler.jobs[0].kept == (False, True), "x is written before each run"
    program.weigh()
    program()
    assert not program.runs_compiled, "the compiled program holds the weight as it was"
    for _ in range(REPEATS + 1):
        program()
    assert program.runs_compiled, "another one takes it as it comes, since it changes"
    assert [job.kept for job in compiler.jobs] == [(False, True), (False, False)]
    program.device.close()


def test_code_that_is_kept_takes_over_at_once() -> None:
    """The first run keeps weights; the second looks for code that was made for these; the third has it."""
    compiler = Told(right, kept=True)
    program = Program(compiler)
    program()
    assert not compiler.looked_for
    program()
    program()
    assert program.runs_compiled
    assert [job.kept for job in compiler.looked_for] == [(False, True)]
    program()
    assert not compiler.jobs
    program.device.close()


class Late(Told):
    """Answers when it is told to."""

    def ask(self, job: Job) -> Future[Callable[..., Sequence[Tensor]]]:
        self.jobs.append(job)
        self.answer: Future[Callable[..., Sequence[Tensor]]] = Future()
        return self.answer


def test_weights_that_change_while_code_is_made_for_them() -> None:
    compiler = Late(right)
    program = Program(compiler)
    for _ in range(REPEATS + 1):
        program()
    program.weigh()
    compiler.answer.set_result(right(compiler.jobs[0]))
    for _ in range(REPEATS + 1):
        program()
    assert [job.kept for job in compiler.jobs] == [(False, True), (False, False)]
    assert not program.runs_compiled
    compiler.answer.set_result(right(compiler.jobs[1]))
    program()
    assert program.runs_compiled
    program.device.close()


def test_weights_that_come_and_go_end_the_wish_for_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others may want the room of those that a program keeps."""
    compiler = Told(right)
    program = Program(compiler)
    kept = cycle([(False, True), (True, True)])
    monkeypatch.setattr("sdrpc.engine.compilation.faster.Faster._kept_now", lambda _: next(kept))
    with caplog.at_level(logging.INFO, "sdrpc"):
        for _ in range(REPEATS + TIMES + 4):
            program()
    assert len(compiler.jobs) == TIMES
    assert not program.runs_compiled
    assert ["come and go" in record.getMessage() for record in caplog.records] == [True]
    program.device.close()


def wrong(_: Job) -> Callable[..., Sequence[Tensor]]:
    return lambda *inputs: [right(_)(*inputs)[0] * 1.2]


def no_number(_: Job) -> Callable[..., Sequence[Tensor]]:
    return lambda *inputs: [right(_)(*inputs)[0] * float("nan")]


def raising(_: Job) -> Callable[..., Sequence[Tensor]]:
    def function(*_: Tensor) -> Sequence[Tensor]:
        raise RuntimeError("no kernel image\nis available")

    return function


def failing(_: Job) -> Callable[..., Sequence[Tensor]]:
    raise ComputeError("compiling failed: no compiler")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (wrong, "gives other numbers: it is not used; 1 of 1 results are farther than 1.25e-01, node 1 (UNARY"),
        (no_number, "is inf from what it was, over 128 elements"),
        (raising, "does not run: no kernel image"),
        (failing, "is not compiled: compiling failed: no compiler"),
    ],
)
def test_what_is_of_no_use_is_said_once(
    answer: Callable[[Job], Callable[..., Sequence[Tensor]]], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    program = Program(Told(answer))
    with caplog.at_level(logging.WARNING):
        for _ in range(REPEATS + 4):
            program()
    assert not program.runs_compiled
    assert [said in record.getMessage() for record in caplog.records] == [True]
    program.device.close()


@pytest.mark.parametrize(
    ("factor", "follows", "takes_over"), [(1.05, False, True), (1.05, True, False), (1.005, True, True)]
)
def test_results_are_compared_in_the_roundings_of_what_they_are_computed_in(
    factor: float, follows: bool, takes_over: bool
) -> None:
    def answer(job: Job) -> Callable[..., Sequence[Tensor]]:
        return lambda *inputs: [right(job)(*inputs)[0] * factor]

    program = Program(Told(answer), Precision("fast", torch.bfloat16, follows=follows))
    for _ in range(REPEATS + 1):
        program()
    program.program.run()
    assert program.runs_compiled is takes_over
    program.device.close()


def covered(key: int) -> Graph:
    """silu(x) to OUT, and silu(w · x) over its second half: as native clients place what they need no more."""
    weight, x = b.leaf(F16, N, N, buffer=key, offset=WEIGHT), b.leaf(F32, N, 4, buffer=key, offset=INPUT)
    product = at(b.mul_mat(weight, x), key, BETWEEN)
    return Graph((at(silu(x), key, OUT), product, at(silu(product), key, OUT + 4 * N * 2)))


@pytest.mark.parametrize(("factor", "takes_over"), [(1.0, True), (1.2, False)])
def test_results_that_lie_over_parts_of_others(factor: float, takes_over: bool) -> None:
    def answer(_: Job) -> Callable[..., Sequence[Tensor]]:
        def function(*inputs: Tensor) -> list[Tensor]:
            x, w = (next(each for each in inputs if each.shape[-2] == rows) for rows in (4, N))
            product = x.float() @ w.float().mT
            return [factor * torch.nn.functional.silu(x), product, torch.nn.functional.silu(product)]

        return function

    device = LocalDevice("CPU", CPU, FAST, threads=1, compiler=Told(answer))  # type: ignore[arg-type]
    buffer = device.allocate(16384)
    rng = np.random.default_rng(0)
    device.write(buffer, WEIGHT, rng.standard_normal((N, N)).astype("<f2").tobytes())
    program = device.compile(covered(buffer.key), {buffer.key: buffer})
    x = rng.standard_normal((4, N)).astype("<f4")
    left = []
    for _ in range(REPEATS + 3):
        device.write(buffer, INPUT, x.tobytes())
        program.run()
        left.append(np.frombuffer(bytes(device.read(buffer, OUT, 4 * N * 6)), "<f4"))
    assert isinstance(program.bound, Replay)
    assert isinstance(program.bound._body, CompiledProgram) is takes_over
    for one in left:
        assert np.linalg.norm(one - left[0]) <= 2e-2 * np.linalg.norm(left[0])
        np.testing.assert_allclose(one[: 2 * N].reshape(2, N), x[:2] / (1 + np.exp(-x[:2])), rtol=1e-5)
    device.close()


def zeros_below(key: int) -> Graph:
    """64 halves that are zero to OUT, and silu(x) over all but the first 16 of them."""
    nothing, x = b.leaf(F16, 2 * N, buffer=key, offset=WEIGHT), b.leaf(F32, N, 4, buffer=key, offset=INPUT)
    return Graph((at(b.node("CONT", nothing), key, OUT), at(silu(x), key, OUT + 2 * N)))


def test_bytes_of_another_result_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    """Numbers that a compiled program has rounded end in a half that is zero, as is what lies below them; the last
    bits of those that were there are any half."""

    def rounded(_: Job) -> Callable[..., Sequence[Tensor]]:
        def function(*inputs: Tensor) -> list[Tensor]:
            (x,) = (each for each in inputs if each.dtype is torch.float32)
            return [torch.zeros(1, 1, 1, 2 * N, dtype=torch.float16), torch.nn.functional.silu(x).bfloat16().float()]

        return function

    device = LocalDevice("CPU", CPU, FAST, threads=1, compiler=Told(rounded))  # type: ignore[arg-type]
    buffer = device.allocate(16384)
    device.write(buffer, INPUT, np.random.default_rng(0).standard_normal((4, N)).astype("<f4").tobytes())
    program = device.compile(zeros_below(buffer.key), {buffer.key: buffer})
    with caplog.at_level(logging.INFO, "sdrpc"):
        for _ in range(REPEATS + 3):
            program.run()
    assert isinstance(program.bound, Replay)
    assert isinstance(program.bound._body, CompiledProgram)
    assert "over 128 elements" in caplog.text, "silu(x) is what is rounded"
    device.close()


def test_where_there_is_no_memory_to_compare_results(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(stores: Sequence[Tensor]) -> list[Tensor]:
        for store in stores:
            store.zero_()
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("sdrpc.engine.compilation.faster._left", full)
    program = Program(Told(right))
    for _ in range(REPEATS + 4):
        program()  # right each time
    assert not program.runs_compiled
    assert ["not compared: no memory" in record.getMessage() for record in caplog.records] == [True]
    program.device.close()


def test_exact_stays_what_it_is() -> None:
    compiler = Told(right)
    program = Program(compiler, EXACT)
    for _ in range(REPEATS + 4):
        program()
    assert not compiler.jobs
    program.device.close()


def job(precision: Precision = FAST, kept: bool = True) -> Job:
    return Job(Origin(product(7), precision, {7: 16384}, {7: 0}), CPU, (False, kept), 1)


def test_a_job_as_bytes() -> None:
    made, result = read(io.BytesIO(encode(job(), Path("there"))))
    assert result == Path("there")
    assert made.key == job().key
    assert made.origin.precision == FAST
    others = {job(kept=False).key, job(Precision("fast", torch.float16)).key, job()._replace(threads=2).key}
    assert len(others | {made.key}) == 4


@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's about itself
def test_a_real_compiler_and_what_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking := missing(CPU):
        pytest.skip(lacking)
    # torch compiles a program for each set of a processor's vectors, to see that the compiler knows it: half the work
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.VecISA.check_build", lambda *_: True, raising=False)
    compiler = Compiler(tmp_path)
    program = Program(compiler)
    for runs in (2, REPEATS - 1):  # after the second it looks for code that is kept, after REPEATS it asks for some
        for _ in range(runs):
            program()
        replay = program.program.bound
        assert isinstance(replay, Replay)
        assert replay._faster is not None
        asked = replay._faster._asked
        assert asked is not None
        assert (asked.result(SECONDS) is None) == (runs == 2)
    program()
    assert program.runs_compiled
    program()
    program.device.close()
    compiler.close()

    monkeypatch.setattr(compiling.Compiler, "_compiled", lambda _, job: failing(job))
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o077 == 0
    assert path.name == job().key + compiling.SUFFIX
    again = Compiler(tmp_path)
    assert again.find(job(kept=False)).result(SECONDS) is None
    function = again.find(job()).result(SECONDS)
    assert function is not None
    assert again.ask(job()).result(SECONDS) is function
    x, w = torch.randn(1, 1, 4, N), torch.randn(1, 1, N, N).bfloat16()
    (result,) = function(x, w)
    (wanted,) = right(job())(x, w)
    torch.testing.assert_close(result.flatten(), wanted.flatten(), rtol=5e-2, atol=5e-2)
    warm = Compiler(tmp_path)
    assert warm.warm(CPU, 2).result(SECONDS) == 0, "it was made for one thread"
    assert warm.warm(CPU, 1).result(SECONDS) == 1
    data = bytearray(path.read_bytes())
    path.unlink()
    (result,) = warm.ask(job()).result(SECONDS)(x, w)
    torch.testing.assert_close(result.flatten(), wanted.flatten(), rtol=5e-2, atol=5e-2)
    warm.close()
    data[len(data) // 2] ^= 1
    storage.write_whole(path, bytes(data))
    assert Compiler(tmp_path).warm(CPU, 1).result(SECONDS) == 0
    with pytest.raises(ComputeError, match="no compiler"):
        Compiler(tmp_path).ask(job()).result(SECONDS)


def test_what_kernels_remember_goes_with_their_program(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path)
    mine, theirs, left = (tmp_path / (name + compiling.TUNED) / "aa" for name in ("mine", "theirs", "left"))
    for folder in (mine, theirs, left):
        folder.mkdir(parents=True)
        (folder / "kernel.best_config").write_text("{}")
    os.utime(left.parent, (0, 0))
    compiler._keep(tmp_path / ("mine" + compiling.SUFFIX), bytes(20), b"code")
    assert mine.exists()
    assert theirs.exists(), "another server may be compiling there"
    assert not left.parent.exists()
    with compiler._tuned(job(), tmp_path) as folder:
        assert folder == tmp_path / (job().key + compiling.TUNED)
        assert not list(folder.iterdir())
        (folder / "source.py").write_text("")
        with compiler._tuned(job(), tmp_path) as meanwhile:
            assert meanwhile == tmp_path / "inductor"
        assert (folder / "source.py").exists()
    assert not folder.exists()
    compiler.folder = tmp_path / "mine.compiled"  # a file
    with compiler._tuned(job(), tmp_path) as folder:
        assert folder == tmp_path / "inductor"
    compiler.close()


def test_code_is_for_one_device_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code names the device that it launches its kernels on."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    first, second = (job()._replace(device=torch.device("cuda", number)) for number in (0, 1))
    assert first.key != second.key
    assert first.made_for != second.made_for
    assert first.key == job()._replace(device=torch.device("cuda")).key


def test_what_loads_programs_is_there_before_clients_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[threading.Thread] = []
    monkeypatch.setattr(compiling, "prepare", lambda: prepared.append(threading.current_thread()))
    here = threading.current_thread()
    for kept in (False, True):
        if kept:
            (tmp_path / ("some" + compiling.SUFFIX)).write_bytes(b"damaged")
        prepared.clear()
        compiler = Compiler(tmp_path)
        loading = compiler.warm(CPU, 1)
        assert (here in prepared) == kept, "without a program nobody waits"
        assert loading.result(SECONDS) == 0
        compiler.close()


def test_a_server_starts_with_a_torch_that_has_its_loader_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "LOADER", ("torch._inductor.moved",))
    monkeypatch.setattr(compiling, "prepare", compiling.prepare.__wrapped__)
    (tmp_path / ("some" + compiling.SUFFIX)).write_bytes(b"damaged")
    compiler = Compiler(tmp_path)
    loading = compiler.warm(CPU, 1)
    assert isinstance(loading.exception(SECONDS), ModuleNotFoundError)
    assert "No module named 'torch._inductor.moved'" in caplog.text
    compiler.close()


def test_a_device_that_compiles_nothing_has_nothing_to_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler = Compiler(tmp_path)
    asked: list[tuple[torch.device, int]] = []
    compiler.warm = lambda *where: asked.append(where) or Future()  # type: ignore[method-assign, func-returns-value]
    for precision, given in ((FAST, None), (EXACT, compiler), (FAST, compiler)):
        device = LocalDevice("CPU", CPU, precision, threads=3, compiler=given)
        assert device.warm() == (given is not None and precision is FAST)
        device.close()  # which waits for torch's libraries
    assert asked == [(CPU, 3)]
    assert not caplog.records
    compiler.close()


def test_a_queue_that_is_full_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "WAITING", 0)
    full = Compiler(tmp_path)
    with pytest.raises(ComputeError, match="too many"):
        full.ask(job()).result(SECONDS)
    assert full.find(job()).result(SECONDS) is None
    full.close()
    with pytest.raises(ComputeError):
        full.ask(job()).result(SECONDS)
    assert full.find(job()).result(SECONDS) is None


def test_a_thread_that_could_not_begin_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who closed the compiler was told that it had never been started, and nobody tried again."""

    def no_room(_: object) -> None:
        raise RuntimeError("can't start new thread")

    compiler = Compiler(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_room)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            compiler.find(job())
    assert compiler.find(job()).result(240.0) is None
    assert compiler.close(240.0)
