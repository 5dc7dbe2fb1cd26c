"""Get real ggmls for the interop tests: their shared libraries out of wheels from PyPI, built here once.

    python tools/ggml_wheel.py        # the newest, built when it is missing (5 minutes on 2 cores); prints the folder
    python tools/ggml_wheel.py --all  # those of older protocol versions as well (3 to 6 minutes each)

The wheels and the libraries stay in a cache outside the clone ($SDRPC_DEV_CACHE, else ~/.cache/sdrpc-dev), so that a
fresh clone need not build them again. Most tests use only ggml's own libraries; a whole language model needs the Python
package around the newest, which is unpacked beside them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

CACHE = Path(os.environ.get("SDRPC_DEV_CACHE") or Path.home() / ".cache" / "sdrpc-dev")
WHEELS = CACHE / "wheels"

LIBRARY = re.compile(r"^lib/(libggml[\w.-]*\.(?:so|dylib))(?:\.0)?$")
STEP = re.compile(r"\[(\d+)/(\d+)\]")
REPORT_SECONDS = 15.0


class Ggml(NamedTuple):
    """A package on PyPI that brings ggml's sources, and what it takes to get ggml's libraries with RPC out of it."""

    package: str
    version: str
    cmake_args: str = "-DGGML_RPC=ON"

    @property
    def folder(self) -> Path:
        """Where the libraries are (libggml.so and what it loads from beside it)."""
        return CACHE / f"ggml-{self.version}"

    @property
    def wheel(self) -> Path | None:
        """The wheel in the cache, if it is there."""
        return next(iter(sorted(WHEELS.glob(f"{self.package.replace('-', '_')}-{self.version}-*.whl"))), None)


PROTOCOLS = {
    "7.0.0": Ggml("llama-cpp-python", "0.3.36"),
    "5.0.0": Ggml("llama-cpp-python", "0.3.35"),
    "4.0.2": Ggml("llama-cpp-python", "0.3.34"),
    # Its names have 128 bytes. Left alone it puts ggml into its own library, which exports nothing of it.
    "3.6.1": Ggml(
        "stable-diffusion-cpp-python",
        "0.4.7",
        "-DGGML_RPC=ON -DSD_BUILD_SHARED_GGML_LIB=ON -DSD_BUILD_EXAMPLES=OFF",
    ),
}
"""By the protocol version that they speak, newest first."""
NEWEST = PROTOCOLS["7.0.0"]
FOLDERS = {protocol: ggml.folder for protocol, ggml in PROTOCOLS.items()}

PYTHON_FOLDER = CACHE / f"{NEWEST.package}-{NEWEST.version}"
"""What PYTHONPATH needs for ``import llama_cpp``, with libraries of its own."""


def build(ggml: Ggml) -> Path:
    """Build the wheel from PyPI's source package into the cache. Raises :class:`SystemExit` with pip's last words."""
    print(f"building {ggml.package} {ggml.version} with {ggml.cmake_args}, once:", file=sys.stderr, flush=True)
    # Without pip's own cache: it would hand out a wheel that someone built with other CMake arguments.
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", ggml.package, f"{ggml.package}=={ggml.version}"]
    environment = {
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1), **os.environ, "CMAKE_ARGS": ggml.cmake_args
    }  # fmt: skip
    WHEELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        process = subprocess.Popen(
            [*command, "--wheel-dir", folder],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        last = _follow(process)
        if process.wait():
            sys.exit("".join(last) + f"\n{ggml.package} {ggml.version} could not be built (pip's last lines are above)")
        made = next(Path(folder).glob("*.whl"))
        return made.replace(WHEELS / made.name)  # at once: nobody sees half a wheel


def _follow(process: subprocess.Popen[str]) -> deque[str]:
    """Say now and then how far the build is; gives its last lines."""
    last: deque[str] = deque(maxlen=40)
    started = reported = time.monotonic()
    step = "fetching the source"
    for line in process.stdout or ():
        last.append(line)
        if found := STEP.search(line):
            step = f"{found[1]} of {found[2]} steps"
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            print(f"  {reported - started:4.0f} s: {step}", file=sys.stderr, flush=True)
    return last


def unpack(source: Path, target: Path) -> None:
    """Put the wheel's ggml libraries into ``target``."""
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary, zipfile.ZipFile(source) as archive:
        folder = Path(temporary) / "lib"
        folder.mkdir()
        for name in filter(LIBRARY.search, archive.namelist()):
            (folder / Path(name).name).write_bytes(archive.read(name))
        if not any(folder.iterdir()):
            sys.exit(f"{source} has no ggml libraries")
        folder.replace(target)


def unpack_package(source: Path, target: Path) -> None:
    """Put the wheel's Python package into ``target``."""
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary, zipfile.ZipFile(source) as archive:
        folder = Path(temporary) / "python"
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("llama_cpp/")])
        folder.replace(target)


def provide(ggml: Ggml) -> None:
    """See to it that everything of ``ggml`` is where the tests look for it."""
    wanted: dict[Path, Callable[[Path, Path], None]] = {ggml.folder: unpack}
    if ggml is NEWEST:
        wanted[PYTHON_FOLDER] = unpack_package
    missing = {folder: unpack_into for folder, unpack_into in wanted.items() if not folder.is_dir()}
    if missing:
        source = ggml.wheel or build(ggml)
        for folder, unpack_into in missing.items():
            unpack_into(source, folder)
    print(ggml.folder)


def main() -> None:
    for ggml in PROTOCOLS.values():
        if ggml is NEWEST or "--all" in sys.argv[1:] or ggml.wheel:
            provide(ggml)


if __name__ == "__main__":
    main()
