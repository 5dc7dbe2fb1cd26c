"""The memory that ``sd-cli -M convert`` takes for a file of any size.

    python -m bench.converting z-image --type q8_0    # 20 GB of zeros, which take no room on a disk

It writes a whole model of real shapes as a sparse file, converts it, and prints how large both files are and the peak
of the process's own memory (:class:`bench.memory.Watched`). Not part of ``make bench``: it takes minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.checkpoints import FAMILIES
from tools.checkpoints.make import write_zeros

from .memory import GB, Watched, watching


def main() -> int:
    parser = argparse.ArgumentParser(description="The memory that converting a large file takes.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--size", choices=("tiny", "reduced", "full"), default="full")
    parser.add_argument("--type", default="q8_0")
    parser.add_argument("--output", default="converted.gguf")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, path = Path(folder) / "zeros.safetensors", Path(folder) / options.output
        write_zeros(options.family, source, size=options.size)
        command = [sys.executable, "-m", "sdrpc", "sd-cli", "-M", "convert", "-m", source, "-o", path]
        command += ["--type", options.type] if options.type else []
        with subprocess.Popen([str(word) for word in command]) as process, watching(watched := Watched(process.pid)):
            status = process.wait()
        size, made = (each.stat().st_size / GB if each.exists() else 0 for each in (source, path))
        print(f"{size:.2f} GB became {made:.2f} GB with {watched.peak / GB:.2f} GB of memory")
        return status


if __name__ == "__main__":
    sys.exit(main())
