"""Who compiles: a thread that starts one process after the other, and the folder in which their code is kept."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cache, partial
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from sdrpc.errors import ComputeError
from sdrpc.storage import cache_folder, entries, mark_used, read_own, shrink, write_whole

from ..convolutions import Convolution, decode, noted
from ..convolutions import encode as encode_all
from ..leaving import ends_before_python
from .job import MADE_FOR_BYTES, Job, encode, made_for

log = logging.getLogger(__name__)

Function = Callable[..., Sequence[Tensor]]
Result = TypeVar("Result")

SUFFIX = ".compiled"
TUNED = ".tuned"
"""Folders beside programs, in which Triton's kernels remember which of their forms is fastest: all are tried when one
first runs, in seconds for a program. They know the folder by the path that it had when they were compiled."""
CONVOLUTIONS, MOST_TOLD = ".convolutions", 1 << 20
"""A file of what cuDNN tries when a server starts, for each device, and the bytes that it may have."""
MAGIC = b"sdrpc compiled 2\n"
DIGEST_BYTES = 32
BUDGET = 2 << 30
"""Bytes that compiled programs may take on disk; those used longest ago go first."""
SECONDS = 1800.0
"""How long one program may take: ten times what the largest takes on a slow machine."""
WAITING = 16
"""Programs that wait to be compiled; further ones are not compiled, so that nobody can make us work for days."""
LOADED = 32
"""Programs that are kept loaded for clients that come with the same graph."""
WARM, WARM_BYTES = 4, 512 << 20
"""Programs, and bytes of code, that are loaded before anybody asks for them: a model has one or two for each size of
picture, and each takes a second and memory."""


LOADER = (
    "torch._inductor.standalone_compile",
    "torch._inductor.codecache",
    "torch._inductor.compile_fx",
    "torch._inductor.async_compile",
    "torch._inductor.select_algorithm",
    "torch._functorch._aot_autograd.autograd_cache",
)
"""What loading a compiled program imports."""
LAUNCHER = (
    "triton.language",
    "torch._inductor.runtime.triton_helpers",
    "torch._inductor.runtime.triton_heuristics",
)
"""And what a GPU's program imports when it is loaded, where there is Triton."""


def _is_left(folder: Path) -> bool:
    """Whether no server that still runs can be compiling in ``folder``."""
    try:
        return time.time() - folder.stat().st_mtime > 2 * SECONDS
    except FileNotFoundError:
        return False


def missing(device: torch.device) -> str:
    """What a compiler for ``device`` lacks here; empty when it is there."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):  # to import the compiler and see takes seconds
        return "it needs torch 2.8 or newer"
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "Triton is not installed"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton does not support this GPU"
        return ""
    if device.type != "cpu":
        return f"there is none for {device.type}"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "there is no C++ compiler"
    return ""


class Compiler:
    """Compiles programs, one at a time, for all devices of this process. Any thread may ask. ``folder``: where code is
    kept for the next start, by default in the user's cache. Close it when done."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder("compiled") if folder is None else folder
        self._changed = threading.Condition()
        self._finding: deque[tuple[Future[Function | None], Job]] = deque()
        self._waiting: deque[tuple[Future[Function], Job]] = deque()
        self._warming: deque[tuple[Future[int], bytes]] = deque()
        self._loaded: OrderedDict[str, Function] = OrderedDict()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        ends_before_python(self)

    def find(self, job: Job) -> Future[Function | None]:
        """The compiled program, later, if it is kept; None where it has to be compiled."""
        future: Future[Function | None] = Future()
        with self._changed:
            if self._closed or len(self._finding) >= WAITING:
                future.set_result(None)
                return future
            self._finding.append((future, job))
            self._begin()
        return future

    def ask(self, job: Job) -> Future[Function]:
        """The compiled program, later; :class:`ComputeError` says why there is none. Cancel it when it is not wanted
        any more."""
        future: Future[Function] = Future()
        with self._changed:
            if self._closed or len(self._waiting) >= WAITING:
                future.set_exception(ComputeError("too many programs wait to be compiled"))
                return future
            self._waiting.append((future, job))
            self._begin()
        return future

    def warm(self, device: torch.device, threads: int) -> Future[int]:
        """Load the programs for ``device`` that were used last, in the background, so that who asks for one need not
        wait for that; how many, later. What loads them is there at once, if any are kept."""
        with suppress(OSError):  # which is told when they are loaded
            if any(True for _ in entries(self.folder, SUFFIX)):
                try:
                    prepare()
                except (ImportError, LookupError, AttributeError) as error:  # another torch may have it elsewhere
                    log.warning("what loads compiled programs is not there before they are asked for: %s", error)
        future: Future[int] = Future()
        with self._changed:
            self._warming.append((future, made_for(device, threads)))
            self._begin()
        return future

    def convolutions(self, device: torch.device, threads: int) -> list[Convolution]:
        """Those that were computed where the programs for ``device`` were compiled or used, the last ones last."""
        return self._convolutions(self._told_in(made_for(device, threads)))

    def _told_in(self, where: bytes) -> Path:
        return self.folder / (where.hex() + CONVOLUTIONS)

    def _convolutions(self, path: Path) -> list[Convolution]:
        data = read_own(path, MOST_TOLD)
        try:
            return [] if data is None else decode(data)
        except ValueError as error:
            log.warning("%s: %s", path, error)
            return []

    def _remember_convolutions(self, where: bytes) -> None:
        """Keep those that were computed so far, for the next start."""
        path, computed = self._told_in(where), noted()
        before = self._convolutions(path) if computed else []
        if set(computed) <= set(before):
            return
        try:
            write_whole(path, encode_all([*(each for each in before if each not in computed), *computed]))
            shrink(self.folder, CONVOLUTIONS, MOST_TOLD)
        except OSError as error:
            log.warning("%s: convolutions are not kept: %s", path, error.strerror)

    def close(self, seconds: float | None = None) -> bool:
        """End what is being compiled; whether that was possible within ``seconds``."""
        with self._changed:
            self._closed = True
            for queue in (self._finding, self._waiting, self._warming):
                for future, _ in queue:
                    future.cancel()
                queue.clear()
            self._changed.notify()
            if self._process is not None:
                self._process.kill()
        if self._thread is not None:
            self._thread.join(seconds)
            return not self._thread.is_alive()
        return True

    def _begin(self) -> None:
        """There is something to do."""
        self._changed.notify()
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="sdrpc-compiler", daemon=True)
            thread.start()
            self._thread = thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._finding or self._warming or self._waiting or self._closed)
                if self._closed:
                    return
                if self._finding:
                    work = self._look
                elif self._warming:
                    warming, where = self._warming.popleft()
                    work = partial(_settle, warming, partial(self._load_last_used, where))
                else:
                    future, job = self._waiting.popleft()
                    work = partial(_settle, future, partial(self._made, job))
                    del future, job
            work()
            del work

    def _load_last_used(self, where: bytes) -> int:
        """Load programs that were made for ``where``. Who asks for one that is kept does not wait for all."""
        prepare()
        count = size = 0
        for entry in sorted(entries(self.folder, SUFFIX), key=lambda each: each.used, reverse=True):
            key = entry.path.name.removesuffix(SUFFIX)
            if self._closed or count == WARM or size + entry.size > WARM_BYTES:
                break
            self._look()
            code = self._kept(entry.path, where)
            if code is None or key in self._loaded:
                continue
            try:
                self._load(key, entry.path, code, used=False)
            except Exception as error:
                log.warning("%s: does not load: %s", entry.path, error)
                continue
            count, size = count + 1, size + entry.size
        log.info("%d compiled programs are ready", count)
        return count

    def _look(self) -> None:
        """Give those that look for programs what is kept."""
        while True:
            with self._changed:
                if not self._finding:
                    return
                future, job = self._finding.popleft()
            _settle(future, partial(self._found, job))
            del future, job

    def _found(self, job: Job) -> Function | None:
        """The program, loaded, or from the disk."""
        self._remember_convolutions(job.made_for)
        key = job.key
        if key in self._loaded:
            self._loaded.move_to_end(key)
            return self._loaded[key]
        path = self.folder / (key + SUFFIX)
        code = self._kept(path, job.made_for)
        return None if code is None else self._load(key, path, code)

    def _made(self, job: Job) -> Function:
        """The program as it is kept, or compiled."""
        function = self._found(job)
        if function is not None:
            return function
        key = job.key
        code = self._compiled(job)
        path = self.folder / (key + SUFFIX)
        self._keep(path, job.made_for, code)
        return self._load(key, path, code)

    def _load(self, key: str, path: Path, code: bytes, used: bool = True) -> Function:
        if used:
            mark_used(path)
        prepare()
        with _no_look_for_garbage():
            self._loaded[key] = function = loaded(code)
        while len(self._loaded) > LOADED:
            self._loaded.popitem(last=False)
        return function

    def _kept(self, path: Path, where: bytes) -> bytes | None:
        """The code in ``path``; None when there is none, it is damaged or was made for something else."""
        data = read_own(path, BUDGET)
        if data is None:
            return None
        start = len(MAGIC) + MADE_FOR_BYTES + DIGEST_BYTES
        return data[start:] if data[:start] == _head(where, data[start:]) else None

    def _keep(self, path: Path, where: bytes, code: bytes) -> None:
        try:
            write_whole(path, _head(where, code) + code)
            shrink(self.folder, SUFFIX, BUDGET)
            for tuned in self.folder.glob("*" + TUNED):
                if not tuned.with_suffix(SUFFIX).exists() and _is_left(tuned):
                    shutil.rmtree(tuned)
        except OSError as error:
            log.warning("%s: compiled programs are not kept: %s", self.folder, error.strerror)

    def _compiled(self, job: Job) -> bytes:
        with tempfile.TemporaryDirectory(prefix="sdrpc-compile-") as work, self._tuned(job, Path(work)) as tuned:
            result, said = Path(work) / "result", Path(work) / "said"
            with said.open("wb") as errors:
                process = self._start(work, tuned, job.threads, errors)
                try:
                    code = _told(process, encode(job, result))
                finally:
                    process.kill()
                    process.wait()
                    with self._changed:
                        self._process = None
            if code or not result.is_file():
                raise ComputeError(f"compiling failed: {_last_line(said)}")
            return result.read_bytes()

    @contextmanager
    def _tuned(self, job: Job, otherwise: Path) -> Iterator[Path]:
        """The folder that kernels of ``job`` will remember, for the compiling process to work in: empty before and
        after. ``otherwise``: where there can be none, or another server works in it."""
        folder = self.folder / (job.key + TUNED)
        try:
            if _is_left(folder) or folder.with_suffix(SUFFIX).exists():  # that has just been found damaged
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, mode=0o700)
        except OSError:
            folder = otherwise / "inductor"
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, work: str, tuned: Path, threads: int, errors: BinaryIO) -> subprocess.Popen[bytes]:
        """The compiling process. It runs in its own empty folder, in which no module can stand before ours."""
        paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "TORCHINDUCTOR_CACHE_DIR": str(tuned.resolve()),
            "TRITON_CACHE_DIR": str(Path(work) / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        }
        with self._changed:
            if self._closed:
                raise ComputeError("the device is closed")
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", __package__], cwd=work, env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip
            return self._process


@contextmanager
def _no_look_for_garbage() -> Iterator[None]:
    """While much is made and nothing thrown away: Python would go through all of it again and again, which takes a
    third of the time to import the loader."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _settle(future: Future[Result], work: Callable[[], Result]) -> None:
    """Do ``work`` for ``future``, unless that was cancelled."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)


def _head(where: bytes, code: bytes) -> bytes:
    """What stands before ``code`` in a file."""
    return MAGIC + where + blake2b(where + code, digest_size=DIGEST_BYTES).digest()


def _told(process: subprocess.Popen[bytes], job: bytes) -> int:
    """Give ``job`` to ``process`` and wait for its end: the exit status. Its input stays open: that says that somebody
    waits."""
    assert process.stdin is not None  # noqa: S101
    with process.stdin:
        try:
            process.stdin.write(job)
            process.stdin.flush()
        except OSError:  # it died before it had read all; its status tells
            pass
        try:
            return process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise ComputeError(f"compiling took longer than {SECONDS:.0f} seconds") from None


def _last_line(said: Path) -> str:
    lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "the process said nothing"


@cache
def prepare() -> None:
    """Do what the first program to be loaded would wait for: import the loader and what it imports when it loads, which
    takes seconds, and have it take the digest of torch's own sources."""
    began = time.monotonic()
    with _no_look_for_garbage():
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # else it starts processes to compile in
        for name in (*LOADER, *(LAUNCHER if find_spec("triton") is not None else ())):
            import_module(name)
        imported = time.monotonic()
        sys.modules["torch._inductor.codecache"].torch_key()
    log.info(
        "the loader of compiled programs is there after %.1f s, of which its digest of torch took %.1f",
        time.monotonic() - began,
        time.monotonic() - imported,
    )


def loaded(code: bytes) -> Function:
    """The function in ``code``, which a compiling process of ours has made."""
    from torch._inductor import CompiledArtifact  # type: ignore[attr-defined,unused-ignore]
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    began, modules = time.monotonic(), len(sys.modules)
    folder = tempfile.mkdtemp(prefix="sdrpc-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "code"
    path.write_bytes(code)
    with temporary_cache_dir(folder):
        function: Function = CompiledArtifact.load(path=str(path), format="binary")
    path.unlink()
    log.info(
        "a compiled program of %.1f MB is loaded after %.1f s, %d modules among it",
        len(code) / 1e6, time.monotonic() - began, len(sys.modules) - modules,
    )  # fmt: skip
    return function
