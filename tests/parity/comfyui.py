"""A program within ComfyUI: its own networks, loaded and used by its own nodes, here and on an rpc-server.

    python -m tests.parity.comfyui HOST:PORT FOLDER   # what differs, as JSON

``FOLDER`` is for model files. They are made with ComfyUI's own classes, with random weights; SD 3's transformer is
small enough for that in the shape that ComfyUI tells it by, the others are given smaller shapes.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.comfyui import PATHS

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
ABSENT = ("torchvision", "torchaudio")
"""Packages that ComfyUI imports for other networks, and whose builds belong to one build of torch."""

CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2,
        "projection_dim": 64}  # fmt: skip
VAE = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
       "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
CONTEXT, POOLED = 64, 64


class Absent(ModuleType):
    """A module with everything in it, none of which does anything."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


class Finder:
    """Finds :data:`ABSENT`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        found = name.partition(".")[0] in ABSENT
        return ModuleSpec(name, self, is_package=True) if found else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def started() -> None:
    """ComfyUI's modules can be imported, as on a machine without a GPU."""
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
    sys.path[:0] = map(str, PATHS)
    sys.argv[1:] = ["--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()


def pack() -> ModuleType:
    """The node pack, as ComfyUI loads it."""
    spec = importlib.util.spec_from_file_location("sdrpc_comfyui", PACK / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def drawn_weights(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.05)


def diffusion_model(folder: Path) -> str:
    """The file of an SD 3 transformer, in ComfyUI's folder for them."""
    import folder_paths
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    context = {"target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": 128}}
    network = OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=2, adm_in_channels=POOLED, context_embedder_config=context,
        num_patches=64, pos_embed_max_size=8, pos_embed_scaling_factor=None, operations=nn, dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    drawn_weights(network)
    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "sd3.safetensors")
    return "sd3.safetensors"


def text_encoder() -> Any:
    import comfy.sd
    from comfy import sd1_clip

    class Target:
        clip, tokenizer, params = sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer, dict[str, Any]()

    clip = comfy.sd.CLIP(Target, model_options={"clip_l_model_config": CLIP})
    drawn_weights(clip.cond_stage_model)
    return clip


def autoencoder() -> Any:
    import comfy.sd

    vae = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": VAE, "embed_dim": 4}})
    drawn_weights(vae.first_stage_model)
    return vae


def lora(model: Any) -> dict[str, tuple[str, tuple[Tensor, ...]]]:
    """What ComfyUI's LoRA nodes add to a model: a difference of one weight."""
    name = "diffusion_model.joint_blocks.0.x_block.attn.proj.weight"
    shape = model.get_model_object(name).shape
    return {name: ("diff", (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 0.1,))}


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest, relative to the largest number."""
    assert [tensor.shape for tensor in ours] == [tensor.shape for tensor in theirs]
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]).max())


def main(server: str, folder: Path) -> Mapping[str, float]:
    """What was computed → how much it differs on the server from what ComfyUI computes by itself; and how many
    megabytes of each part's weights went there."""
    started()
    import nodes

    torch.manual_seed(0)
    where = {"servers": server, "key": "", "model_on": "RPC0", "clip_on": "RPC0", "vae_on": "RPC0"}
    place = pack().NODE_CLASS_MAPPINGS
    device = sys.modules["sdrpc_comfyui.nodes"].connected(server, "")["RPC0"]
    name = diffusion_model(folder)
    conditions = [[[torch.randn(1, 5, CONTEXT), {"pooled_output": torch.randn(1, POOLED)}]] for _ in range(2)]
    latents = {"samples": torch.zeros(1, 16, 8, 8)}

    def sampled(model: Any) -> Tensor:
        drawn: Tensor = nodes.KSampler().sample(model, 3, 3, 4.0, "euler", "simple", *conditions, latents)[0]["samples"]
        return drawn

    (model,) = nodes.UNETLoader().load_unet(name, "default")
    (placed,) = place["SdrpcUNET"]().load(unet_name=name, weight_dtype="default", on="RPC0", servers=server, key="")
    with_lora, placed_with_lora = model.clone(), placed.clone()
    with_lora.add_patches(lora(model))
    placed_with_lora.add_patches(lora(model))
    found = {
        "diffusion": difference([sampled(placed)], [sampled(model)]),
        "lora": difference([sampled(placed_with_lora)], [sampled(with_lora)]),
        "without the lora": difference([sampled(placed)], [sampled(model)]),
        "what the lora changes": difference([sampled(with_lora)], [sampled(model)]),
    }
    sent = [device.sent]
    clip, vae = text_encoder(), autoencoder()
    _, placed_clip, placed_vae = place["SdrpcPlace"]().place(**where, clip=clip, vae=vae)

    def encoded(clip: Any) -> list[Tensor]:
        text, options = nodes.CLIPTextEncode().encode(clip, "a (lovely:1.3) cat")[0][0]
        return [text, options["pooled_output"]]

    latent, picture = torch.randn(1, 4, 4, 4), torch.rand(1, 32, 32, 3)

    def through(vae: Any) -> list[Tensor]:
        torch.manual_seed(1)  # an encoded picture is drawn from a distribution
        decoded = nodes.VAEDecode().decode(vae, {"samples": latent})[0]
        return [decoded, nodes.VAEEncode().encode(vae, picture)[0]["samples"]]

    found["clip"] = difference(encoded(placed_clip), encoded(clip))
    sent.append(device.sent)
    found["vae"] = difference(through(placed_vae), through(vae))
    sent.append(device.sent)
    parts = zip(("diffusion", "clip", "vae"), sent, [0, *sent], strict=False)
    return found | {f"megabytes of {part}": (after - before) / 1e6 for part, after, before in parts}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
