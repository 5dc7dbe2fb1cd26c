"""`python -m training.lora`: train the LoRA that makes the small model draw outlines, and write its file.

It changes the UNet alone and has no word of its own: the same captions are learnt with other pictures of them, the
same scenes drawn as outlines. Each rate of learning is tried for its share of the time; what is written is the mean of
weights that draws most prompts right, by :mod:`outlines`, of all that were looked at.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdrpc import models

from . import bank, diffusion, model, scenes
from .detect import Pixels
from .judge import judge
from .loop import Gradients, Plan, Run
from .outlines import LINE, outlines
from .prompts import Prompt, held_out_prompts, spread

PLAN = Plan(steps=4000, batch=256, rate=0, warm_up=100, decay=0.995, report=500)
RATES = (2e-3, 6e-4)
"""Highest rates of learning, one after the other."""

SCENES = 60_000
LARGE = 0.13
"""Radii from which on a shape has room for a hole: medium and large ones."""

RANK = 8
LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj", "conv",
)  # fmt: skip
"""The ends of the names of layers that are changed: all attention, all convolutions but the first and the last."""

JUDGED = 96
"""How many prompts are drawn at each look."""

ABOUT = {
    "license": "MIT", "modelspec.title": "outline", "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.description": "The demo model's shapes as outlines. Strength 0.9; no word is needed.",
    "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora", "ss_network_dim": str(RANK),
    "ss_network_alpha": str(RANK), "ss_network_args": f'{{"conv_dim": "{RANK}", "conv_alpha": "{RANK}"}}',
}  # fmt: skip
"""The file's metadata, in the words of kohya's scripts and of the "modelspec" of Stability AI."""

PREFIX = "lora_unet_"


def main() -> int:
    """0 when a file was written, 3 when the time was up before."""
    options = _options()
    device = torch.device(options.device)
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    text_encoder, _, vae = (module.to(device) for module in model.stored(options.model))
    learnt = bank.build(vae, roomy(options.scenes, options.seed), device, options.seed, options.processes, LINE)
    asked = spread(judged(), options.prompts)
    best = -1
    for number, rate in enumerate(options.rates, 1):
        unet = adapted(options.model, options.seed).to(device)
        plan = replace(PLAN, steps=options.steps, batch=options.batch, rate=rate, report=options.report)
        run = Run(nn.ModuleDict({"unet": unet}), plan, device, options.seed)
        gradients = Gradients(run, diffusion.Loss(text_encoder, unet).to(device))
        empty = torch.from_numpy(bank.padded(iter([[]]))).to(device)
        until = began + options.seconds * number / len(options.rates)
        while not run.done and time.monotonic() < until:
            inputs = diffusion.batch(learnt, plan.batch, empty, run.generator())
            error = gradients(*inputs)[0].detach()  # while autograd's graph of a step lives, CUDA's can't be recorded
            run.update()
            if run.done or run.step % plan.report == 0:
                right = score(_drawn(text_encoder, run.mean["unet"], vae, asked, device), asked)
                print(
                    f"rate {rate:g}, step {run.step}/{plan.steps}: error {float(error):.4f}, right {right}, "
                    f"{time.monotonic() - began:.0f} s", flush=True,
                )  # fmt: skip
                if right.right >= best:
                    best = right.right
                    write(options.out, run.mean["unet"], {"seed": str(options.seed), "steps": str(run.step)})
    return 0 if best >= 0 else 3


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.lora", description=__doc__)
    parser.add_argument("--model", type=Path, default=models.SHIPPED["demo"], help="the model's file")
    parser.add_argument("--out", type=Path, default=Path("build/training/outline.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that long")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, default=PLAN.steps, help="at each rate")
    parser.add_argument("--batch", type=int, default=PLAN.batch)
    parser.add_argument("--report", type=int, default=PLAN.report, help="look at pictures after so many steps")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--prompts", type=int, default=JUDGED)
    parser.add_argument("--processes", type=int, help="that write captions; all cores if not given")
    return parser.parse_args()


def roomy(count: int, seed: int) -> scenes.Scenes:
    """``count`` scenes for training in which every shape has room for a hole."""
    sampled = scenes.sample(np.random.default_rng((seed, 6)), 8 * count)
    wide = ((sampled.radii >= LARGE) | (sampled.kinds < 0)).all(1)
    return sampled.chosen(np.flatnonzero(wide)[:count])


def judged() -> list[Prompt]:
    """Held-out prompts of one shape with room for a hole. A ring is none: its outline is two circles, a filled one."""
    return [
        prompt for prompt in held_out_prompts()
        if len(prompt.says.shapes) == 1 and prompt.says.shapes[0].kind != "ring"
        and prompt.says.shapes[0].size != "small"
    ]  # fmt: skip


def adapted(path: Path, seed: int) -> nn.Module:
    """The model's UNet with a LoRA that does nothing yet; its factors alone are trained."""
    from peft import LoraConfig

    _, unet, _ = model.stored(path)
    torch.manual_seed(seed)
    changed: Any = unet
    changed.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS)))
    return unet


@dataclass(frozen=True)
class Counted:
    """Of so many pictures, how many were outlines, and how many were and showed all that their prompts say."""

    pictures: int
    hollow: int
    right: int

    def __str__(self) -> str:
        return f"{self.right} of {self.pictures} ({self.hollow} are outlines)"


def score(pictures: list[Pixels], prompts: list[Prompt]) -> Counted:
    """How many of the pictures are outlines of what the prompts say."""
    seen = [outlines(picture) for picture in pictures]
    right = [each.hollow and judge(each.sight, p.says).right for each, p in zip(seen, prompts, strict=True)]
    return Counted(len(pictures), sum(each.hollow for each in seen), sum(right))


def _drawn(text_encoder: nn.Module, unet: nn.Module, vae: nn.Module, prompts: list[Prompt],
           device: torch.device) -> list[Pixels]:  # fmt: skip
    unet.eval()
    drawn = diffusion.preview(text_encoder, unet, vae, [prompt.text for prompt in prompts], device)
    return list((drawn * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def tensors(unet: nn.Module) -> dict[str, Tensor]:
    """A UNet's LoRA by the names that kohya's scripts give, f16."""
    from peft.tuners.lora import LoraLayer

    made = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer):
            called = PREFIX + name.replace(".", "_")
            factors: Any = layer
            made[f"{called}.lora_down.weight"] = factors.lora_A["default"].weight
            made[f"{called}.lora_up.weight"] = factors.lora_B["default"].weight
            made[f"{called}.alpha"] = torch.tensor(float(layer.lora_alpha["default"]))
    return {name: weight.detach().to("cpu", torch.float16).contiguous() for name, weight in made.items()}


def write(path: Path, unet: nn.Module, about: dict[str, str]) -> None:
    """The LoRA's file, never half written."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors(unet), partial, {**ABOUT, **about})
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
