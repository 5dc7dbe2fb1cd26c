"""Write an SD 1.x checkpoint with random weights: for tests, demos and benchmarks.

    python tools/make_checkpoint.py --size tiny|full [--type f32|f16|bf16] [--format safetensors|gguf|diffusers]
        [--quant Q8_0|Q4_0|Q4_K|…] PATH

``full`` has the shapes of SD 1.5 (860 million weights in the UNet); as f16 safetensors it is, with torch 2.13 on a CPU,
the checkpoint that the parity tests' reference pictures were drawn from (sha256 07c0ce3d…6309e3). ``tiny`` has the same
structure, CLIP's whole vocabulary, and is made in a second. ``--quant`` (for gguf) stores matrices in blocks where
their rows are whole numbers of blocks, as converters do. Other families and forms: tools/checkpoints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

VOCABULARY = 49408
POSITIONS = 77
LATENTS = 4


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of the three parts. ``attends``: levels of the UNet, from the finest, that attend to text."""

    unet: int
    unet_levels: tuple[int, ...]
    unet_layers: int
    attends: int
    vae: int
    vae_levels: tuple[int, ...]
    vae_layers: int
    text: int
    text_layers: int


SIZES = {
    "full": Sizes(320, (1, 2, 4, 4), 2, 3, 128, (1, 2, 4, 4), 2, 768, 12),
    "tiny": Sizes(32, (1, 2, 4), 1, 2, 32, (1, 1, 2, 2), 1, 64, 2),
}


class Entry(NamedTuple):
    """A tensor of the checkpoint: filled with ``value``, or normal numbers over the root of its inputs."""

    name: str
    shape: tuple[int, ...]
    value: float | None = None


def entries(sizes: Sizes) -> Iterator[Entry]:
    """All tensors in the order in which their numbers are drawn."""
    yield from _unet("model.diffusion_model.", sizes)
    yield from _vae("first_stage_model.", sizes)
    yield from _text_encoder("cond_stage_model.transformer.text_model.", sizes)


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (outputs, inputs))
    if bias:
        yield Entry(f"{name}.bias", (outputs,), 0.0)


def _conv(name: str, outputs: int, inputs: int, kernel: int = 3) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (outputs, inputs, kernel, kernel))
    yield Entry(f"{name}.bias", (outputs,), 0.0)


def _norm(name: str, width: int) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (width,), 1.0)
    yield Entry(f"{name}.bias", (width,), 0.0)


def _unet(prefix: str, sizes: Sizes) -> Iterator[Entry]:
    base, levels, layers = sizes.unet, list(enumerate(sizes.unet_levels)), sizes.unet_layers
    embedding = 4 * base

    def resnet(name: str, inputs: int, outputs: int) -> Iterator[Entry]:
        yield from _norm(f"{name}.in_layers.0", inputs)
        yield from _conv(f"{name}.in_layers.2", outputs, inputs)
        yield from _linear(f"{name}.emb_layers.1", outputs, embedding)
        yield from _norm(f"{name}.out_layers.0", outputs)
        yield from _conv(f"{name}.out_layers.3", outputs, outputs)
        if inputs != outputs:
            yield from _conv(f"{name}.skip_connection", outputs, inputs, 1)

    def attention(name: str, width: int) -> Iterator[Entry]:
        yield from _norm(f"{name}.norm", width)
        yield from _conv(f"{name}.proj_in", width, width, 1)
        block = f"{name}.transformer_blocks.0"
        for inner, source in (("attn1", width), ("attn2", sizes.text)):
            yield from _linear(f"{block}.{inner}.to_q", width, width, bias=False)
            yield from _linear(f"{block}.{inner}.to_k", width, source, bias=False)
            yield from _linear(f"{block}.{inner}.to_v", width, source, bias=False)
            yield from _linear(f"{block}.{inner}.to_out.0", width, width)
        yield from _linear(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _linear(f"{block}.ff.net.2", width, 4 * width)
        for number in (1, 2, 3):
            yield from _norm(f"{block}.norm{number}", width)
        yield from _conv(f"{name}.proj_out", width, width, 1)

    yield from _linear(f"{prefix}time_embed.0", embedding, base)
    yield from _linear(f"{prefix}time_embed.2", embedding, embedding)
    yield from _conv(f"{prefix}input_blocks.0.0", base, LATENTS)
    skips, width, block = [base], base, 1
    for level, factor in levels:
        for _ in range(layers):
            yield from resnet(f"{prefix}input_blocks.{block}.0", width, base * factor)
            width = base * factor
            if level < sizes.attends:
                yield from attention(f"{prefix}input_blocks.{block}.1", width)
            skips.append(width)
            block += 1
        if level < len(levels) - 1:
            yield from _conv(f"{prefix}input_blocks.{block}.0.op", width, width)
            skips.append(width)
            block += 1
    yield from resnet(f"{prefix}middle_block.0", width, width)
    yield from attention(f"{prefix}middle_block.1", width)
    yield from resnet(f"{prefix}middle_block.2", width, width)
    block = 0
    for level, factor in reversed(levels):
        for layer in range(layers + 1):
            yield from resnet(f"{prefix}output_blocks.{block}.0", width + skips.pop(), base * factor)
            width = base * factor
            if level < sizes.attends:
                yield from attention(f"{prefix}output_blocks.{block}.1", width)
            if level > 0 and layer == layers:
                yield from _conv(f"{prefix}output_blocks.{block}.{1 + (level < sizes.attends)}.conv", width, width)
            block += 1
    yield from _norm(f"{prefix}out.0", base)
    yield from _conv(f"{prefix}out.2", LATENTS, base)


def _vae(prefix: str, sizes: Sizes) -> Iterator[Entry]:
    base, levels, layers = sizes.vae, list(enumerate(sizes.vae_levels)), sizes.vae_layers
    widest = base * sizes.vae_levels[-1]

    def resnet(name: str, inputs: int, outputs: int) -> Iterator[Entry]:
        yield from _norm(f"{name}.norm1", inputs)
        yield from _conv(f"{name}.conv1", outputs, inputs)
        yield from _norm(f"{name}.norm2", outputs)
        yield from _conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            yield from _conv(f"{name}.nin_shortcut", outputs, inputs, 1)

    def middle(name: str, width: int) -> Iterator[Entry]:
        yield from resnet(f"{name}.mid.block_1", width, width)
        yield from _norm(f"{name}.mid.attn_1.norm", width)
        for inner in ("q", "k", "v", "proj_out"):
            yield from _conv(f"{name}.mid.attn_1.{inner}", width, width, 1)
        yield from resnet(f"{name}.mid.block_2", width, width)

    encoder, decoder = f"{prefix}encoder", f"{prefix}decoder"
    yield from _conv(f"{encoder}.conv_in", base, 3)
    width = base
    for level, factor in levels:
        for layer in range(layers):
            yield from resnet(f"{encoder}.down.{level}.block.{layer}", width, base * factor)
            width = base * factor
        if level < len(levels) - 1:
            yield from _conv(f"{encoder}.down.{level}.downsample.conv", width, width)
    yield from middle(encoder, width)
    yield from _norm(f"{encoder}.norm_out", width)
    yield from _conv(f"{encoder}.conv_out", 2 * LATENTS, width)
    yield from _conv(f"{decoder}.conv_in", widest, LATENTS)
    width = widest
    yield from middle(decoder, width)
    for level, factor in reversed(levels):
        for layer in range(layers + 1):
            yield from resnet(f"{decoder}.up.{level}.block.{layer}", width, base * factor)
            width = base * factor
        if level > 0:
            yield from _conv(f"{decoder}.up.{level}.upsample.conv", width, width)
    yield from _norm(f"{decoder}.norm_out", width)
    yield from _conv(f"{decoder}.conv_out", 3, width)
    yield from _conv(f"{prefix}quant_conv", 2 * LATENTS, 2 * LATENTS, 1)
    yield from _conv(f"{prefix}post_quant_conv", LATENTS, LATENTS, 1)


def _text_encoder(prefix: str, sizes: Sizes) -> Iterator[Entry]:
    width = sizes.text
    yield Entry(f"{prefix}embeddings.token_embedding.weight", (VOCABULARY, width))
    yield Entry(f"{prefix}embeddings.position_embedding.weight", (POSITIONS, width))
    for layer in range(sizes.text_layers):
        name = f"{prefix}encoder.layers.{layer}"
        for inner in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{inner}", width, width)
        yield from _norm(f"{name}.layer_norm1", width)
        yield from _norm(f"{name}.layer_norm2", width)
        yield from _linear(f"{name}.mlp.fc1", 4 * width, width)
        yield from _linear(f"{name}.mlp.fc2", width, 4 * width)
    yield from _norm(f"{prefix}final_layer_norm", width)


def tensors(size: str, dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by their original (LDM) names."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape, value in entries(SIZES[size]):
        if value is not None:
            made[name] = torch.full(shape, value, dtype=dtype)
        else:
            scale = 1.0 / prod(shape[1:]) ** 0.5
            made[name] = (torch.randn(*shape, generator=generator) * scale).to(dtype)
    # a buffer that real files carry and no module needs
    positions = torch.arange(POSITIONS).unsqueeze(0)
    made["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
    return made


def write_safetensors(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """A single file, as models are shared."""
    from safetensors.torch import save_file

    save_file(weights, path, metadata)


def write_gguf(path: Path, weights: dict[str, torch.Tensor], quant: str | None) -> None:
    """A GGUF file with the original names; matrices in blocks of type ``quant`` where their rows allow it."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "sd1")
    for name, weight in weights.items():
        if not weight.is_floating_point():
            continue
        kind = _gguf_type(weight, quant)
        data = _encoded(weight.float().numpy(), kind)
        writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_type(weight: torch.Tensor, quant: str | None) -> str:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    own = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[weight.dtype]
    if quant is None or weight.dim() != 2:
        return own
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[quant]]
    return quant if weight.shape[-1] % block == 0 else own


def _encoded(values: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants

    if kind == "Q4_K":
        return _random_q4_k(values)
    encoded: np.ndarray = quants.quantize(values, GGMLQuantizationType[kind])
    return encoded


def _random_q4_k(values: np.ndarray) -> np.ndarray:
    """Random blocks of about the same spread: the gguf library reads this type but does not write it.

    A block of 256 is a scale d and a minimum (F16), eight pairs of six-bit factors (all 15 here) and 256 numbers q of
    four bits; a value is 15 · (d · q - minimum), here with the minimum 7.5 · d.
    """
    blocks = values.size // 256
    random = np.random.default_rng(blocks)
    scale = float(values.std()) / (15 * 4.61)
    made = np.zeros((blocks, 144), np.uint8)
    made[:, :4] = np.frombuffer(np.array([scale, 7.5 * scale], "<f2").tobytes(), np.uint8)
    made[:, 4:12], made[:, 12:16] = 15, 0xFF
    made[:, 16:] = random.integers(0, 256, (blocks, 128), np.uint8)
    return made.reshape(*values.shape[:-1], -1)


def write_diffusers(folder: Path, weights: dict[str, torch.Tensor], size: str = "tiny") -> None:
    """A diffusers directory of tensors in ``size``: a folder for each part with its config.json and safetensors."""
    from safetensors.torch import save_file

    from tools.checkpoints.families import sd1_components
    from tools.checkpoints.make import directory_names, write_configuration

    sizes = SIZES[size]
    components = sd1_components(
        tuple(sizes.unet * factor for factor in sizes.unet_levels),
        sizes.attends,
        sizes.unet_layers,
        (tuple(sizes.vae * factor for factor in sizes.vae_levels), sizes.vae_layers),
        (sizes.text, sizes.text_layers),
    )
    for component in components:
        shapes = component.shapes()
        found: dict[str, torch.Tensor] = {}
        for entry in component.whole(shapes):
            parts = entry.layout.split(weights[entry.name], [shapes[source] for source in entry.sources])
            found |= zip(entry.sources, parts, strict=True)
        renamed = {entry.name: found[entry.sources[0]].contiguous() for entry in directory_names(component)(shapes)}
        _, _, stem = write_configuration(component, folder / component.folder)
        save_file(renamed, folder / component.folder / f"{stem}.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an SD 1.x checkpoint with random weights.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--type", choices=DTYPES, default="f16")
    parser.add_argument("--format", choices=("safetensors", "gguf", "diffusers"), default="safetensors")
    parser.add_argument("--quant", help="type of matrices in a gguf file: Q8_0, Q4_0, Q4_K …")
    options = parser.parse_args()
    if options.quant and options.format != "gguf":
        parser.error("--quant needs --format gguf")
    weights = tensors(options.size, DTYPES[options.type])
    if options.format == "gguf":
        write_gguf(options.path, weights, options.quant)
    elif options.format == "diffusers":
        write_diffusers(options.path, weights, options.size)
    else:
        write_safetensors(options.path, weights)
    print(
        f"{options.path}: {len(weights)} tensors, {sum(w.numel() for w in weights.values()) / 1e6:.1f} million numbers"
    )


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # where tools.checkpoints is
    main()
