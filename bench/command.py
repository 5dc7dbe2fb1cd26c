"""Real sd-cli processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sdrpc.diffusion.request import Request


class Ended(NamedTuple):
    """What an sd-cli that has ended said of its stages: seconds by name."""

    stages: Mapping[str, float]


class SdCli:
    """sd-cli drawing ``request`` from ``files`` (by the fields of ModelFiles) with further ``options``. ``graphs`` is
    its cache folder."""

    def __init__(self, request: Request, files: Mapping[str, Path], graphs: Path, *options: str) -> None:
        named = [
            text for name, path in files.items() for text in (f"--{name.replace('diffusion_', 'diffusion-')}", path)
        ]
        film = request.video_frames is not None
        kind = ("-M", "vid_gen", "--video-frames", str(request.video_frames)) if film else ()
        output = graphs.parent / ("bench.webp" if film else "bench.png")
        self.process = subprocess.Popen(
            [
                sys.executable, "-c", "from sdrpc.cli.sd_cli import main; main()", *named,
                "-p", request.prompt, "-W", str(request.width), "-H", str(request.height),
                "--steps", str(request.steps), "--cfg-scale", str(request.cfg_scale),
                "--sampling-method", str(request.sampling_method), "-o", str(output), *kind, *options,
            ],
            env=os.environ | {"SDRPC_CACHE": str(graphs)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait(self) -> Ended:
        """Wait for its end. Raises :class:`SystemExit` with its last words when it failed."""
        _, said = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(f"sd-cli failed: {said[-2000:]}")
        return Ended({stage: float(seconds) for stage, seconds in re.findall(r"(\w+) (\d+\.\d+)s(?=,|$)", said, re.M)})
