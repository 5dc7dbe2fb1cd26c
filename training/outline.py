"""`python -m training.outline`: train the LoRA that ships beside the small model, which gives shapes a black outline.

The model's own scenes are drawn with a line around each shape, and what is added to the UNet's weights learns the
difference. A GPU does it in a minute or two; ``--device cpu`` takes its time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdrpc.families.model import ModelFiles, open_model
from sdrpc.models import named
from sdrpc.prompts import clip_tokenizer

from . import autoencoder, bank, captions, diffusion, model, scenes

WIDTH = 0.022
"""Of the line, in sides of the picture: not quite three pixels."""
RANK = 8
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out")
SCENES, STEPS, BATCH, RATE, WARM_UP = 16384, 1500, 64, 2e-3, 50
REPORT = 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.outline", description=__doc__)
    parser.add_argument("--output", type=Path, default=named("demo").with_name("outline.safetensors"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    text_encoder, unet, vae = (module.to(options.device) for module in shipped())
    latents, tokens = learnt(vae, options.seed, options.device)
    write(options.output, fit(text_encoder, unet, latents, tokens, options.steps, options.seed), options.seed)


def shipped() -> tuple[nn.Module, Any, nn.Module]:
    """The text encoder, UNet and VAE of the model that ships."""
    opened = open_model(ModelFiles(named("demo")))
    modules = {"clip_l": model.text_encoder(), "diffusion": model.unet(), "vae": model.vae()}
    for name, module in modules.items():
        found = opened[name].found.tensors
        prefix = "text_model." if name == "clip_l" else ""
        state = {}
        for key, parameter in module.state_dict().items():
            if (stored := found.get(prefix + key)) is not None:
                data = np.frombuffer(stored.data(), np.float16).astype(np.float32)
                state[key] = torch.from_numpy(data).reshape(parameter.shape)
        module.load_state_dict(state, strict=False)
        module.eval().requires_grad_(False)
    return modules["clip_l"], modules["diffusion"], modules["vae"]


@torch.no_grad()
def learnt(vae: nn.Module, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Latents [n, 4, 16, 16] of scenes with outlines, and a caption of each as tokens [n, 77]."""
    sampled = scenes.sample(np.random.default_rng((seed, 6)), SCENES)
    random = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    latents = []
    for start in range(0, SCENES, 64):
        part = sampled.part(start, start + 64)
        jitter = torch.rand((len(part), scenes.MOST + 1, 3), generator=generator) * 2 - 1
        latents.append(autoencoder.encode(vae, scenes.draw(part, model.SIDE, device, jitter, WIDTH) * 2 - 1))
    written = [captions.describe(sampled[i], random) for i in range(SCENES)]
    encoded = clip_tokenizer().encode_batch(written, add_special_tokens=False)
    return torch.cat(latents), torch.from_numpy(bank.padded(each.ids for each in encoded)).to(device)


def fit(
    text_encoder: nn.Module, unet: Any, latents: Tensor, tokens: Tensor, steps: int, seed: int
) -> dict[str, Tensor]:
    """What is added to the UNet, by the names of its layers."""
    from peft import LoraConfig, get_peft_model_state_dict

    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(LAYERS)))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses = diffusion.Loss(text_encoder, unet).to(latents.device)
    empty = torch.from_numpy(bank.padded(iter([[]]))).to(latents.device)
    learnt = bank.Bank(latents, tokens[:, None].expand(-1, bank.CAPTIONS, -1))
    generator = torch.Generator(latents.device).manual_seed(seed)
    began, total = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 - step / steps)
        loss, plain = losses(*diffusion.batch(learnt, BATCH, empty, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += float(plain)
        if (step + 1) % REPORT == 0:
            print(f"{step + 1}/{steps}  {total / REPORT:.4f}  {time.monotonic() - began:.0f} s", flush=True)
            total = 0.0
    state: dict[str, Tensor] = get_peft_model_state_dict(unet)
    return state


def write(path: Path, state: dict[str, Tensor], seed: int) -> None:
    """As diffusers' files of LoRAs are, f16."""
    from safetensors.torch import save_file

    tensors = {f"unet.{name}": tensor.detach().cpu().half().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, {"license": "MIT", "seed": str(seed), "base": "demo"})


if __name__ == "__main__":
    main()
