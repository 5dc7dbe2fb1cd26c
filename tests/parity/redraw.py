"""Draw the reference pictures of SDXL and FLUX.1 anew, with stable-diffusion.cpp itself on this machine's CPU.

    SDRPC_DEV_CACHE=… python -m tests.parity.redraw [--python FOLDER] [NAME …]

FOLDER is where the Python package of stable-diffusion-cpp-python is; left out, it is unpacked from the wheel that
``python tools/ggml_wheel.py --all`` keeps. A model takes up to 8 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests.parity.families import REFERENCES, Reference
from tools.ggml_wheel import PROTOCOLS

PATHS = {"diffusion": "diffusion_model_path"}


def unpacked(folder: Path) -> Path:
    """The wheel's Python package and its libraries in ``folder``."""
    wheel = PROTOCOLS["3.6.1"].wheel
    if wheel is None:
        sys.exit("there is no wheel of stable-diffusion-cpp-python: python tools/ggml_wheel.py --all builds it")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def model_of(package: Any, reference: Reference) -> Any:
    """stable-diffusion.cpp with the reference's model."""
    paths = {PATHS.get(name, f"{name}_path"): str(path) for name, path in reference.model.files().items()}
    threads = os.cpu_count() or 1
    return package.StableDiffusion(**paths, n_threads=threads, rng_type="cuda", sampler_rng_type="cuda")


def redraw(model: Any, reference: Reference) -> None:
    """One picture into tests/data/reference, without the metadata that would name paths of this machine."""
    image = model.generate_image(
        prompt=reference.prompt,
        negative_prompt=reference.negative,
        width=256,
        height=256,
        seed=reference.seed,
        sample_steps=reference.steps,
        cfg_scale=reference.cfg,
        sample_method=reference.sampler,
        scheduler=reference.scheduler,
        **reference.further,
    )[0]
    image.info.clear()
    image.save(reference.picture, optimize=True)
    print(reference.picture, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the reference pictures of SDXL and FLUX.1 anew.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--python", type=Path)
    options = parser.parse_args()
    wanted = [one for one in REFERENCES if not options.names or one.name in options.names]
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(options.python or unpacked(Path(folder))))
        import stable_diffusion_cpp

        for checkpoint in dict.fromkeys(one.model.name for one in wanted):
            drawn = [one for one in wanted if one.model.name == checkpoint]
            model = model_of(stable_diffusion_cpp, drawn[0])
            for reference in drawn:
                redraw(model, reference)
            model.close()


if __name__ == "__main__":
    main()
