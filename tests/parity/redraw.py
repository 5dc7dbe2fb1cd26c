"""Draw the reference pictures of tests/parity/families.py anew, with stable-diffusion.cpp itself on this machine's CPU.

    SDRPC_DEV_CACHE=… python -m tests.parity.redraw [--threads NUMBER] [NAME …]

It comes from the wheel of stable-diffusion-cpp-python that ``python tools/native_ggml.py --all`` builds and keeps. A
model takes up to 8 GB of memory.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from tests.parity.families import REFERENCES, Reference
from tools.native_ggml import PICTURES

PATHS = {"diffusion": "diffusion_model_path"}

LIBRARIES = ("libggml-base.so.0", "libggml-cpu.so.0", "libggml-rpc.so.0", "libggml.so.0")
"""What stable-diffusion.cpp's library needs, each after what it needs itself."""


def stable_diffusion_cpp(folder: Path) -> Any:
    """The wheel's Python package, unpacked into ``folder``. Its library looks for ggml's where only pip puts them."""
    wheel = PICTURES.wheel
    if wheel is None:
        sys.exit("there is no wheel of stable-diffusion-cpp-python: python tools/native_ggml.py --all builds it")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for name in LIBRARIES:
        ctypes.CDLL(str(folder / "lib" / name), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    import stable_diffusion_cpp

    return stable_diffusion_cpp


FAMILY = {
    "diffusion": {
        "input_blocks.0.0.weight": "model.diffusion_model.input_blocks.0.0.weight",
        "middle_block.1.norm.bias": "model.diffusion_model.middle_block.1.norm.bias",
    },
    "clip_g": {"text_model.final_layer_norm.bias": "conditioner.embedders.1.model.ln_final.bias"},
}
"""Tensors that tell stable-diffusion.cpp 0.4.7 that parts are SDXL's, by their component, with a whole file's names."""


def told(files: Mapping[str, Path], folder: Path) -> Path:
    """A file with SDXL's telling tensors in a whole file's names: 0.4.7 can't tell the family by the parts alone."""
    tensors = {}
    for component, names in FAMILY.items():
        with safe_open(files[component], "pt") as file:
            tensors |= {original: file.get_tensor(name) for name, original in names.items()}
    path = folder / "told.safetensors"
    save_file(tensors, path)
    return path


def model_of(package: Any, reference: Reference, threads: int, folder: Path) -> Any:
    """stable-diffusion.cpp with the reference's model."""
    files = reference.model.files()
    paths = {PATHS.get(name, f"{name}_path"): str(path) for name, path in files.items()}
    if "clip_g" in files:
        paths["model_path"] = str(told(files, folder))
    return package.StableDiffusion(**paths, n_threads=threads, rng_type="cuda", sampler_rng_type="cuda")


def redraw(model: Any, reference: Reference) -> None:
    """One picture into tests/data/reference, without the metadata that would name paths of this machine."""
    image = model.generate_image(
        prompt=reference.prompt,
        negative_prompt=reference.negative,
        width=reference.side,
        height=reference.side,
        seed=reference.seed,
        sample_steps=reference.steps,
        cfg_scale=reference.cfg,
        sample_method=reference.sampler,
        scheduler=reference.scheduler,
        **reference.further,
        **{name: str(path) for name, path in reference.begun.items()},
    )[0]
    image.info.clear()
    image.save(reference.picture, optimize=True)
    print(reference.picture, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the reference pictures anew.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    wanted = [one for one in REFERENCES if not options.names or one.name in options.names]
    with tempfile.TemporaryDirectory() as folder:
        package = stable_diffusion_cpp(Path(folder))
        for checkpoint in dict.fromkeys(one.model.name for one in wanted):
            drawn = [one for one in wanted if one.model.name == checkpoint]
            model = model_of(package, drawn[0], options.threads, Path(folder))
            for reference in drawn:
                redraw(model, reference)
            model.close()


if __name__ == "__main__":
    main()
