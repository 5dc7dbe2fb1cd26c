"""Checkpoints with random weights, in the original names, made from diffusers' and transformers' own classes.

They are what sdrpc's reading, mapping and drawing of real files is tested with, so nothing here uses sdrpc.

    made = make("sdxl", folder, form="gguf", type="Q8_0")
    made.files        # {"model": …/sdxl.gguf}, or a file for each component: {"diffusion": …, "clip_l": …}
    made.pipeline()   # diffusers' pipeline with exactly the numbers that the files hold, as float32

Forms: ``safetensors`` and ``gguf`` are whole models in one file; ``parts`` has a safetensors file for each component;
``gguf-parts`` has the diffusion model as ComfyUI's converter writes it, T5 as llama.cpp's does, and the rest as in
``parts``; ``diffusers`` is a directory, ``sharded`` one whose components are in several files.
"""

from __future__ import annotations

from .families import FAMILIES
from .make import FORMS, Made, make

__all__ = ["FAMILIES", "FORMS", "Made", "make"]
