r"""Draw with a diffusers pipeline whose parts compute on devices of the network.

    python examples/diffusers_pipeline.py path/to/sdxl --rpc desktop:50052 "a lovely cat"
    python examples/diffusers_pipeline.py path/to/FLUX.1-dev --rpc desktop:50052 \
        --on transformer=RPC0,vae=RPC0 "a lovely cat"

Any pipeline that diffusers loads from a folder: Stable Diffusion 1.x to 3.5, XL, FLUX … Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import sdrpc
from sdrpc.errors import SdrpcError

REST = "all"
"""Stands for every part of the pipeline that has no device of its own."""


def main(arguments: Sequence[str] | None = None) -> None:
    given = options().parse_args(arguments)
    try:
        with ExitStack() as opened:
            devices = sdrpc.devices(rpc=given.rpc.split(","), rpc_key=given.rpc_key)
            for device in devices.values():
                opened.callback(device.close)
            where = {part: devices[name] for part, name in placed(given.on).items()}
            # the type that weights are sent in; a server computes in its own precision
            pipe = load(given.pipeline, getattr(torch, given.dtype))
            move(pipe, where)
            pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
            size = {name: value for name in ("height", "width") if (value := getattr(given, name)) is not None}
            generator = torch.Generator().manual_seed(given.seed)
            image = pipe(given.prompt, num_inference_steps=given.steps, generator=generator, **size).images[0]
            image.save(given.output)
            print(given.output)
    except (SdrpcError, OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")


def load(folder: Path, dtype: torch.dtype) -> Any:
    pipe: Any = DiffusionPipeline
    return pipe.from_pretrained(folder, dtype=dtype, local_files_only=True)


def move(pipe: Any, where: Mapping[str, sdrpc.Device]) -> None:
    """Let devices compute the parts of ``pipe`` that are named."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if strangers := where.keys() - parts.keys() - {REST}:
        raise ValueError(f"the pipeline has no {', '.join(sorted(strangers))}; it has {', '.join(parts)}")
    for name, part in parts.items():
        device = where.get(name, where.get(REST))
        if device is not None:
            setattr(pipe, name, sdrpc.offload(part, device))


def placed(text: str) -> dict[str, str]:
    """``transformer=RPC0,vae=CPU`` as part → device; ``RPC0`` alone is for all parts."""
    entries = [entry.rpartition("=") for entry in text.split(",")]
    return {name.strip() or REST: device.strip() for name, _, device in entries}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pipeline", type=Path, help="folder of a diffusers pipeline")
    parser.add_argument("prompt")
    parser.add_argument("--rpc", required=True, metavar="HOST:PORT,…", help="servers, whose devices are RPC0, RPC1 …")
    parser.add_argument("--rpc-key", default=(), metavar="KEY", help="the key that rpc-server printed, the first time")
    parser.add_argument("--on", default="RPC0", metavar="PART=DEVICE,…", help="where parts compute; others stay here")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("output.png"))
    return parser


if __name__ == "__main__":
    main()
