"""Get real ggmls for the interop tests: their shared libraries out of packages from PyPI, built here once.

    python tools/native_ggml.py        # the two newest protocol versions, built when they are missing
    python tools/native_ggml.py --all  # those of all older ones as well

Of a source package ggml alone is compiled (a minute and a half on 2 cores); a whole wheel is built (five minutes) where
tests need the program around it: a language model, stable-diffusion.cpp's own pictures. All of it stays in a cache
outside the clone ($SDRPC_DEV_CACHE, else ~/.cache/sdrpc-dev), so that a fresh clone need not build it again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("SDRPC_DEV_CACHE") or Path.home() / ".cache" / "sdrpc-dev")
WHEELS = CACHE / "wheels"

LIBRARY = re.compile(r"^(libggml[\w-]*\.(?:so|dylib))(?:\.0)?$")
FACTS = re.compile(r"(ggml|ggml-rpc)\.h$|ggml-rpc\.cpp$")
"""Files that say what a version's numbers and messages are: kept beside the libraries, under these names."""
STEP = re.compile(r"\[ *(\d+(?:/\d+|%))\]")
"""What make and ninja say of how far they are."""
REPORT_SECONDS = 15.0

CMAKE = """\
cmake_minimum_required(VERSION 3.14)
project(native_ggml C CXX)
add_subdirectory("${GGML_FOLDER}" ggml)
"""
"""Above ggml's own, which as a project by itself wants files that source packages lack."""
CMAKE_OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_RPC=ON", "-DGGML_CCACHE=OFF")


@dataclass(frozen=True)
class Ggml(ABC):
    """A package on PyPI that brings ggml's sources, and how ggml's libraries with RPC come out of it."""

    package: str
    version: str

    @property
    def folder(self) -> Path:
        """Where the libraries are (libggml.so and what it loads from beside it), and the files of :data:`FACTS`."""
        return CACHE / f"ggml-{self.package}-{self.version}"

    def provide(self) -> None:
        """See to it that everything is where the tests look for it."""
        if not self.folder.is_dir():
            self.make()

    @abstractmethod
    def make(self) -> None:
        """Make :attr:`folder`. Raises :class:`SystemExit` with the last words of what failed."""

    def appear(self, source: Path) -> None:
        """``source`` becomes :attr:`folder`, at once: nobody sees half of it."""
        if not any(LIBRARY.search(path.name) for path in source.iterdir()):
            sys.exit(f"{self.package} {self.version} has no ggml libraries")
        source.replace(self.folder)

    def run(self, command: Sequence[str | Path], step: str = "compiling", **environment: str) -> None:
        """Run a part of the build, of which ``step`` says what it does."""
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
        last = _follow(process, step)
        if process.wait():
            sys.exit("".join(last) + f"\n{self.package} {self.version} could not be built (its last lines are above)")


class Source(Ggml):
    """ggml alone is compiled, out of the package's sources."""

    def make(self) -> None:
        print(f"building the ggml of {self.package} {self.version}, once:", file=sys.stderr, flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            work = Path(temporary)
            found = self._unpack(self._fetch(work), work / "source")
            (work / "CMakeLists.txt").write_text(CMAKE)
            build = work / "build"
            self.run(["cmake", "-S", work, "-B", build, f"-DGGML_FOLDER={found}", *CMAKE_OPTIONS])
            self.run(["cmake", "--build", build, "--target", "ggml", "--parallel", str(os.cpu_count() or 1)])
            result = work / "result"
            result.mkdir()
            for path in build.rglob("libggml*"):
                if LIBRARY.search(path.name):
                    shutil.copy(path, result / path.name)
            for path in found.rglob("*"):
                if FACTS.search(path.name):
                    shutil.copy(path, result / path.name)
            self.appear(result)

    def _fetch(self, folder: Path) -> Path:
        """The source package, as a file in ``folder``."""
        command = [sys.executable, "-m", "pip", "download", "--verbose", "--no-deps", "--no-binary", self.package]
        self.run([*command, "--dest", str(folder), f"{self.package}=={self.version}"], "fetching the source")
        return next(folder.glob("*.tar.gz"))

    def _unpack(self, archive: Path, folder: Path) -> Path:
        """The one folder of ggml's sources in ``archive``, unpacked below ``folder``."""
        with tarfile.open(archive) as package:
            names = package.getnames()
            (inside,) = {
                name.removesuffix("/include/ggml.h") for name in names if name.endswith("/ggml/include/ggml.h")
            }
            wanted = [member for member in package if member.name.startswith(f"{inside}/")]
            package.extractall(folder, wanted, filter="data")
        return folder / inside


class Wheel(Ggml):
    """The whole package is built, with shared ggml libraries in it, and kept."""

    @property
    def wheel(self) -> Path | None:
        """The wheel in the cache, if it is there."""
        return next(iter(sorted(WHEELS.glob(f"{self.package.replace('-', '_')}-{self.version}-*.whl"))), None)

    @property
    def python_folder(self) -> Path:
        """What PYTHONPATH needs for the package itself, with libraries of its own."""
        return CACHE / f"{self.package}-{self.version}"

    def provide(self) -> None:
        super().provide()
        if self is LANGUAGE and not self.python_folder.is_dir():
            with tempfile.TemporaryDirectory(dir=CACHE) as temporary, zipfile.ZipFile(self._built()) as archive:
                folder = Path(temporary) / "python"
                archive.extractall(folder, [name for name in archive.namelist() if name.startswith("llama_cpp/")])
                folder.replace(self.python_folder)

    def make(self) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary, zipfile.ZipFile(self._built()) as archive:
            result = Path(temporary) / "result"
            result.mkdir()
            for name in archive.namelist():
                file = Path(name).name
                if (name.startswith("lib/") and LIBRARY.search(file)) or FACTS.search(file):
                    (result / file).write_bytes(archive.read(name))
            self.appear(result)

    def _built(self) -> Path:
        if self.wheel:
            return self.wheel
        arguments = CMAKE_ARGUMENTS[self.package]
        print(f"building {self.package} {self.version} with {arguments}, once:", file=sys.stderr, flush=True)
        # Without pip's own cache: it would hand out a wheel that someone built with other CMake arguments.
        command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir"]
        command += ["--no-binary", self.package, f"{self.package}=={self.version}"]
        parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        WHEELS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            self.run([*command, "--wheel-dir", folder], CMAKE_ARGS=arguments, CMAKE_BUILD_PARALLEL_LEVEL=parallel)
            made = next(Path(folder).glob("*.whl"))
            return made.replace(WHEELS / made.name)


CMAKE_ARGUMENTS = {
    "llama-cpp-python": "-DGGML_RPC=ON",
    # Left alone it puts ggml into its own library, which exports nothing of it.
    "stable-diffusion-cpp-python": "-DGGML_RPC=ON -DSD_BUILD_SHARED_GGML_LIB=ON -DSD_BUILD_EXAMPLES=OFF",
}
LANGUAGE = Wheel("llama-cpp-python", "0.3.36")
"""Its Python package runs whole language models."""
PICTURES = Wheel("stable-diffusion-cpp-python", "0.4.7")
"""Its Python package draws stable-diffusion.cpp's pictures. Its ggml has names of 128 bytes."""

PROTOCOLS: dict[str, Ggml] = {
    "8.0.0": Source("xllamacpp", "2026.10.11549"),
    "7.0.0": LANGUAGE,
    "6.0.0": Source("xllamacpp", "2026.9.10809"),
    "5.1.0": Source("xllamacpp", "2026.8.10566"),
    "5.0.0": Source("llama-cpp-python", "0.3.35"),
    "4.0.2": Source("llama-cpp-python", "0.3.34"),
    "3.6.1": PICTURES,
}
"""By the protocol version that they speak, newest first."""
ALWAYS = ("8.0.0", "7.0.0")
FOLDERS = {protocol: ggml.folder for protocol, ggml in PROTOCOLS.items()}
LANGUAGE_PROTOCOL = next(protocol for protocol, ggml in PROTOCOLS.items() if ggml is LANGUAGE)
PYTHON_FOLDER = LANGUAGE.python_folder


def _follow(process: subprocess.Popen[str], step: str) -> deque[str]:
    """Say now and then how far the build is; gives its last lines."""
    last: deque[str] = deque(maxlen=40)
    started = reported = time.monotonic()
    for line in process.stdout or ():
        last.append(line)
        if found := STEP.search(line):
            step = f"compiling, {found[1]}"
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            print(f"  {reported - started:4.0f} s: {step}", file=sys.stderr, flush=True)
    return last


def main() -> None:
    for protocol, ggml in PROTOCOLS.items():
        if protocol in ALWAYS or "--all" in sys.argv[1:]:
            ggml.provide()
            print(f"{protocol}  {ggml.folder}")


if __name__ == "__main__":
    main()
