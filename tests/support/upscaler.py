"""A small network that enlarges pictures, its file, and what it does in process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sdrpc.diffusion import upscaling
from sdrpc.diffusion.pictures import Pixels


def esrgan(scale: int = 2) -> Any:
    """A small network of ESRGAN's kind, which enlarges what it sees and adds something."""
    upscaling._spandrel()
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(1)
    return ESRGAN(num_filters=8, num_blocks=1, scale=scale).eval()


def save(network: Any, path: Path) -> None:
    """Its file, of the kind that the suffix means."""
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if path.suffix == ".pth":
        torch.save({"params_ema": state}, path)
    else:
        save_file(state, path)


def in_process(network: Any, image: Pixels) -> Pixels:
    """Pixels (h, w, 3) as torch enlarges them, in one piece."""
    with torch.no_grad():
        larger = network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255)[0]
    return (larger.clamp(0, 1) * 255 + 0.5).byte().permute(1, 2, 0).numpy()
