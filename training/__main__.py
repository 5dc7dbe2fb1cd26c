"""`python -m training`: draw scenes, train the VAE, then text encoder and UNet, and write the model's file.

Run it again to go on where it was stopped; each stage that is done is kept in the folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import autoencoder, bank, captions, diffusion, model, scenes

SHOWN = 64


def main() -> int:
    """0 when the model is written, 3 when the time was up before."""
    options = _options()
    device = torch.device(options.device)
    until = time.monotonic() + options.seconds
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    fast = options.compile

    plan = replace(autoencoder.PLAN, steps=options.vae_steps)
    if not autoencoder.fit(folder, device, options.seed, until, plan, fast):
        return _unfinished()
    vae = autoencoder.finished(folder, device)
    print(f"VAE: {autoencoder.psnr(vae, device):.2f} dB", flush=True)
    if time.monotonic() > until:
        return _unfinished()

    sampled = scenes.sample(np.random.default_rng((options.seed, 4)), options.scenes)
    learnt = bank.build(vae, sampled, device, options.seed)
    plan = replace(diffusion.PLAN, steps=options.steps)
    done = diffusion.fit(folder, learnt, device, options.seed, until, plan, fast)
    text_encoder, unet = diffusion.finished(folder, device)
    _preview(folder / "preview.png", diffusion.preview(text_encoder, unet, vae, _prompts(), device))
    weights = model.tensors(text_encoder, unet, vae)
    about = {"license": "MIT", "seed": str(options.seed)}
    model.write(folder / "demo.safetensors", weights, autoencoder.colours(vae, device), about)
    return 0 if done else _unfinished()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/training"), help="where its state and result are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that long; run again to go on")
    parser.add_argument("--vae-steps", type=int, default=autoencoder.PLAN.steps)
    parser.add_argument("--scenes", type=int, default=diffusion.SCENES)
    parser.add_argument("--steps", type=int, default=diffusion.PLAN.steps)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def _unfinished() -> int:
    print("time is up: run the same command again to go on")
    return 3


def _prompts() -> list[str]:
    from random import Random

    random = Random(1)
    shown = scenes.sample(np.random.default_rng((0, 5)), SHOWN)
    return [captions.describe(shown[i], random) for i in range(SHOWN)]


def _preview(path: Path, pictures: torch.Tensor) -> None:
    from PIL import Image

    n, channels, height, width = pictures.shape
    rows = pictures.reshape(8, n // 8, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (rows.reshape(8 * height, n // 8 * width, channels) * 255).round().byte().cpu().numpy()
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text("\n".join(_prompts()))


if __name__ == "__main__":
    sys.exit(main())
