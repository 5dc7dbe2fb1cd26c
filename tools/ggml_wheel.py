"""Get a real ggml for the interop tests: its shared libraries out of a wheel of llama-cpp-python, built here once.

    python tools/ggml_wheel.py        # builds the wheel when it is missing (5 minutes on 2 cores), prints the folder

The wheel and the libraries stay in a cache outside the clone ($SDRPC_DEV_CACHE, else ~/.cache/sdrpc-dev), so that a
fresh clone need not build them again. Most tests use only ggml's own libraries; a whole language model needs the Python
package around them, which is unpacked beside them.
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
from pathlib import Path

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
CMAKE_ARGS = "-DGGML_RPC=ON"

CACHE = Path(os.environ.get("SDRPC_DEV_CACHE") or Path.home() / ".cache" / "sdrpc-dev")
WHEELS = CACHE / "wheels"
FOLDER = CACHE / f"ggml-{VERSION}"
"""Where the libraries are (libggml.so and what it loads from beside it)."""

PYTHON_FOLDER = CACHE / f"llama-cpp-python-{VERSION}"
"""What PYTHONPATH needs for ``import llama_cpp``, with libraries of its own."""

LIBRARY = re.compile(r"llama_cpp/lib/(libggml[\w.-]*\.(?:so|dylib))(?:\.0)?$")
STEP = re.compile(r"\[(\d+)/(\d+)\]")
REPORT_SECONDS = 15.0


def wheel() -> Path | None:
    """The wheel in the cache, if it is there."""
    return next(iter(sorted(WHEELS.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"))), None)


def build() -> Path:
    """Build the wheel from PyPI's source package into the cache. Raises :class:`SystemExit` with pip's last words."""
    # Without pip's own cache: it would hand out a wheel that someone built with other CMake arguments.
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"]
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1), **os.environ, "CMAKE_ARGS": CMAKE_ARGS}
    WHEELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        process = subprocess.Popen(
            [*command, "--wheel-dir", folder],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        last = _follow(process)
        if process.wait():
            sys.exit("".join(last) + f"\n{PACKAGE} {VERSION} could not be built (pip's last lines are above)")
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


def unpack(source: Path) -> Path:
    """Put the wheel's ggml libraries into :data:`FOLDER`."""
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary, zipfile.ZipFile(source) as archive:
        folder = Path(temporary) / "lib"
        folder.mkdir()
        for name in filter(LIBRARY.search, archive.namelist()):
            (folder / Path(name).name).write_bytes(archive.read(name))
        if not any(folder.iterdir()):
            sys.exit(f"{source} has no ggml libraries")
        folder.replace(FOLDER)
    return FOLDER


def unpack_package(source: Path) -> Path:
    """Put the wheel's Python package into :data:`PYTHON_FOLDER`."""
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary, zipfile.ZipFile(source) as archive:
        folder = Path(temporary) / "python"
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("llama_cpp/")])
        folder.replace(PYTHON_FOLDER)
    return PYTHON_FOLDER


def main() -> None:
    unpacked = {FOLDER: unpack, PYTHON_FOLDER: unpack_package}
    missing = [unpack_into for folder, unpack_into in unpacked.items() if not folder.is_dir()]
    if missing:
        if not wheel():
            print(f"building {PACKAGE} {VERSION} with {CMAKE_ARGS}, once:", file=sys.stderr, flush=True)
        source = wheel() or build()
        for unpack_into in missing:
            unpack_into(source)
    print(FOLDER)


if __name__ == "__main__":
    main()
