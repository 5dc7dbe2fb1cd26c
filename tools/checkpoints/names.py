"""From the names of diffusers' and transformers' modules to those of original checkpoints.

This is written against the models' published files and diffusers' own single-file converters
(``diffusers.loaders.single_file_utils``, which go the other way), and knows nothing of sdrpc's key maps: it is what
those are tested with. A naming is a function from the shapes of a module's tensors to :class:`Entry` values, each a
tensor of the original file: its name and how it is put together from the module's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Layout(NamedTuple):
    """How a tensor of the file is made of tensors of the module (``join``), and those of it again (``split``)."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor, Sequence[Shape]], Sequence[Tensor]]


def _halves_swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


SAME = Layout(lambda parts: parts[0], lambda whole, _: [whole])
ROWS = Layout(
    lambda parts: torch.cat(list(parts)), lambda whole, shapes: torch.split(whole, [shape[0] for shape in shapes])
)
"""Below each other: queries, keys and values in one matrix."""
TRANSPOSED = Layout(lambda parts: parts[0].T, lambda whole, _: [whole.T])
SWAPPED = Layout(lambda parts: _halves_swapped(parts[0]), lambda whole, _: [_halves_swapped(whole)])
"""Scale above shift in the module, shift above scale in the file."""


def _interleaved(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, 2, LLAMA_HEAD // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def _in_halves(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, LLAMA_HEAD // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


LLAMA_HEAD = 128
HALVES_INTERLEAVED = Layout(lambda parts: _interleaved(parts[0]), lambda whole, _: [_in_halves(whole)])
"""Rows of the two halves of a head one after the other in the module, in turns in the file."""
ONE_MORE = Layout(lambda parts: parts[0] + 1, lambda whole, _: [whole - 1])
"""A weight that the module adds 1 to has it in the file."""
FLAT = Layout(lambda parts: parts[0].flatten(), lambda whole, shapes: [whole.reshape(shapes[0])])
"""A table in the module, one row in the file."""
ONE_TAP = Layout(lambda parts: parts[0][:, :, None, None], lambda whole, _: [whole[:, :, 0, 0]])
"""A matrix in the module, a convolution of 1 by 1 in the file."""
ROWS_OF_ONE_TAP = Layout(
    lambda parts: ONE_TAP.join([ROWS.join(parts)]),
    lambda whole, shapes: ROWS.split(ONE_TAP.split(whole, shapes)[0], shapes),
)
"""Matrices in the module, one convolution of 1 by 1 in the file."""


class Entry(NamedTuple):
    """A tensor of the original file: its name there and the module's tensors (by name) that it is made of."""

    name: str
    sources: tuple[str, ...]
    layout: Layout = SAME

    def shape(self, shapes: Shapes) -> Shape:
        """Its shape in the file."""
        return tuple(self.layout.join([torch.empty(shapes[name], device="meta") for name in self.sources]).shape)


Naming = Callable[[Shapes], Iterator[Entry]]
Rules = Sequence[tuple[str, str]]
"""Regular expressions of whole names with their replacement; the first that matches counts."""


def prefixed(prefix: str, naming: Naming) -> Naming:
    """The same names below ``prefix``."""

    def named(shapes: Shapes) -> Iterator[Entry]:
        return (entry._replace(name=prefix + entry.name) for entry in naming(shapes))

    return named


def _renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"no rule for the tensor {name}")


def unchanged(shapes: Shapes) -> Iterator[Entry]:
    """The module's own names: T5 in safetensors."""
    return (Entry(name, (name,)) for name in shapes)


_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_unet(shapes: Shapes) -> Iterator[Entry]:
    """Latent diffusion's UNet: SD 1.x, SD 2.x and SDXL.

    Its blocks are counted through all levels: on the way down a level has its layers and a block that halves the
    size, on the way up one layer more, the last of which also doubles the size.
    """
    layers = 1 + max(int(name.split(".")[3]) for name in shapes if name.startswith("down_blocks.0.resnets."))
    for name in shapes:
        yield Entry(_ldm_unet_name(name, layers, shapes), (name,))


def _ldm_unet_name(name: str, layers: int, shapes: Shapes) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{leaf}"
    way, *words = name.split(".")
    if way == "mid_block":
        kind, number, *rest = words
        place = f"middle_block.{2 * int(number) if kind == 'resnets' else 1}"
        return f"{place}.{_within(kind, rest)}"
    level, kind, number, *rest = words
    first = int(level) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{leaf}"
    if kind == "upsamplers":
        behind = 1 + (f"up_blocks.{level}.attentions.0.norm.weight" in shapes)
        return f"output_blocks.{first + layers}.{behind}.conv.{leaf}"
    block = first + int(number)
    place = f"input_blocks.{block + 1}" if way == "down_blocks" else f"output_blocks.{block}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{_within(kind, rest)}"


def _within(kind: str, words: Sequence[str]) -> str:
    return ".".join((_UNET_RESNET[words[0]], *words[1:]) if kind == "resnets" else words)


def ldm_vae(shapes: Shapes) -> Iterator[Entry]:
    """Latent diffusion's autoencoder, of every family here. The decoder's levels are counted from the finest."""
    last = max(int(name.split(".")[2]) for name in shapes if name.startswith("decoder.up_blocks."))
    for name in shapes:
        original = _renamed(name, _VAE_RULES).replace("conv_shortcut", "nin_shortcut")
        original = re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.up.{last - int(found[1])}", original)
        attends = ".attentions.0." in name and len(shapes[name]) == 2
        yield Entry(original, (name,), ONE_TAP if attends else SAME)


_VAE_RULES: Rules = (
    (r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.(.*)", r"\1.\3.\2.\3sample.\4"),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(.*)", r"encoder.down.\1.block.\2"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(.*)", r"decoder.up.\1.block.\2"),
    (r"(.*)\.mid_block\.resnets\.0\.(.*)", r"\1.mid.block_1.\2"),
    (r"(.*)\.mid_block\.resnets\.1\.(.*)", r"\1.mid.block_2.\2"),
    (r"(.*)\.mid_block\.attentions\.0\.group_norm\.(.*)", r"\1.mid.attn_1.norm.\2"),
    (r"(.*)\.mid_block\.attentions\.0\.to_out\.0\.(.*)", r"\1.mid.attn_1.proj_out.\2"),
    (r"(.*)\.mid_block\.attentions\.0\.to_([qkv])\.(.*)", r"\1.mid.attn_1.\2.\3"),
    (r"(.*)\.conv_norm_out\.(.*)", r"\1.norm_out.\2"),
    (r"(encoder|decoder)\.conv_(in|out)\.(.*)|(post_)?quant_conv\.(.*)", r"\g<0>"),
)


def clip(shapes: Shapes) -> Iterator[Entry]:
    """CLIP's text encoder as transformers names it; the projection stands beside the text model."""
    for name in shapes:
        yield Entry(name if name.startswith("text_projection") else f"text_model.{name}", (name,))


def open_clip(shapes: Shapes) -> Iterator[Entry]:
    """OpenCLIP's text encoder: queries, keys and values in one matrix, the projection transposed."""
    for name in shapes:
        if name == "text_projection.weight":
            yield Entry("text_projection", (name,), TRANSPOSED)
        elif ".q_proj." in name:
            sources = tuple(name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv")
            yield Entry(_renamed(name, _OPEN_CLIP_RULES), sources, ROWS)
        elif not re.search(r"\.[kv]_proj\.", name):
            yield Entry(_renamed(name, _OPEN_CLIP_RULES), (name,))


_OPEN_CLIP_BLOCK = r"encoder\.layers\.(\d+)"
_OPEN_CLIP_RULES: Rules = (
    (r"embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"final_layer_norm\.(.*)", r"ln_final.\1"),
    (_OPEN_CLIP_BLOCK + r"\.self_attn\.q_proj\.(.*)", r"transformer.resblocks.\1.attn.in_proj_\2"),
    (_OPEN_CLIP_BLOCK + r"\.self_attn\.out_proj\.(.*)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (_OPEN_CLIP_BLOCK + r"\.layer_norm([12])\.(.*)", r"transformer.resblocks.\1.ln_\2.\3"),
    (_OPEN_CLIP_BLOCK + r"\.mlp\.fc1\.(.*)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (_OPEN_CLIP_BLOCK + r"\.mlp\.fc2\.(.*)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
)


def llama_cpp_t5(shapes: Shapes) -> Iterator[Entry]:
    """T5's encoder as llama.cpp's converter names it in GGUF files, by the gguf library's own table."""
    return _llama_cpp(shapes, "T5ENCODER", "encoder.block.")


def llama_cpp_qwen3(shapes: Shapes) -> Iterator[Entry]:
    """Qwen3 as llama.cpp's converter names it."""
    return _llama_cpp(shapes, "QWEN3", "layers.", "model.")


def llama_cpp_mistral(shapes: Shapes) -> Iterator[Entry]:
    """Mistral as llama.cpp's converter names it, whose architecture is llama's: queries and keys are permuted."""
    for entry in _llama_cpp(shapes, "LLAMA", "layers.", "model."):
        permuted = re.search(r"\.attn_[qk]\.weight", entry.name) is not None
        yield entry._replace(layout=HALVES_INTERLEAVED) if permuted else entry


def llama_cpp_gemma2(shapes: Shapes) -> Iterator[Entry]:
    """Gemma 2 as llama.cpp's converter names it, which adds 1 to the weights of norms."""
    return _llama_cpp_gemma(shapes, "GEMMA2")


def llama_cpp_gemma3(shapes: Shapes) -> Iterator[Entry]:
    """Gemma 3, likewise."""
    return _llama_cpp_gemma(shapes, "GEMMA3")


def _llama_cpp_gemma(shapes: Shapes, architecture: str) -> Iterator[Entry]:
    for entry in _llama_cpp(shapes, architecture, "layers.", "model."):
        yield entry._replace(layout=ONE_MORE) if entry.name.endswith("norm.weight") else entry


def _llama_cpp(shapes: Shapes, architecture: str, block: str, prefix: str = "") -> Iterator[Entry]:
    """The gguf library's names of an architecture. ``block``: the beginning of names of numbered blocks; ``prefix``:
    what the library's table has before the class's names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    blocks = 1 + max(int(name[len(block) :].split(".")[0]) for name in shapes if name.startswith(block))
    names = get_tensor_name_map(MODEL_ARCH[architecture], blocks)
    for name in shapes:
        original = names.get_name(prefix + name, try_suffixes=(".weight", ".bias"))
        if original is None:
            raise ValueError(f"the gguf library has no name for {name}")
        yield Entry(original, (name,))


_FLUX_RULES: Rules = (
    (r"x_embedder\.(.*)", r"img_in.\1"),
    (r"context_embedder\.(.*)", r"txt_in.\1"),
    (r"time_text_embed\.timestep_embedder\.linear_1\.(.*)", r"time_in.in_layer.\1"),
    (r"time_text_embed\.timestep_embedder\.linear_2\.(.*)", r"time_in.out_layer.\1"),
    (r"time_text_embed\.guidance_embedder\.linear_1\.(.*)", r"guidance_in.in_layer.\1"),
    (r"time_text_embed\.guidance_embedder\.linear_2\.(.*)", r"guidance_in.out_layer.\1"),
    (r"time_text_embed\.text_embedder\.linear_1\.(.*)", r"vector_in.in_layer.\1"),
    (r"time_text_embed\.text_embedder\.linear_2\.(.*)", r"vector_in.out_layer.\1"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.(.*)", r"double_blocks.\1.img_mod.lin.\2"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear\.(.*)", r"double_blocks.\1.txt_mod.lin.\2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_q\.(.*)", r"double_blocks.\1.img_attn.qkv.\2"),
    (r"transformer_blocks\.(\d+)\.attn\.add_q_proj\.(.*)", r"double_blocks.\1.txt_attn.qkv.\2"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0\.(.*)", r"double_blocks.\1.img_attn.proj.\2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out\.(.*)", r"double_blocks.\1.txt_attn.proj.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.(.*)", r"double_blocks.\1.img_mlp.0.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.(.*)", r"double_blocks.\1.img_mlp.2.\2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.(.*)", r"double_blocks.\1.txt_mlp.0.\2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2\.(.*)", r"double_blocks.\1.txt_mlp.2.\2"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear\.(.*)", r"single_blocks.\1.modulation.lin.\2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_q\.(.*)", r"single_blocks.\1.linear1.\2"),
    (r"single_transformer_blocks\.(\d+)\.proj_out\.(.*)", r"single_blocks.\1.linear2.\2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"norm_out\.linear\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
    (r"distilled_guidance_layer\.(in_proj|out_proj)\.(.*)", r"\g<0>"),
    (r"distilled_guidance_layer\.layers\.(\d+)\.linear_1\.(.*)", r"distilled_guidance_layer.layers.\1.in_layer.\2"),
    (r"distilled_guidance_layer\.layers\.(\d+)\.linear_2\.(.*)", r"distilled_guidance_layer.layers.\1.out_layer.\2"),
    (r"distilled_guidance_layer\.norms\.(\d+)\.weight", r"distilled_guidance_layer.norms.\1.scale"),
    (r"proj_out\.(.*)", r"final_layer.linear.\1"),
)
_FLUX_FUSED = r"\.(to_k|to_v|add_k_proj|add_v_proj|proj_mlp)\."


def flux(shapes: Shapes) -> Iterator[Entry]:
    """The transformers of FLUX.1 and Chroma: queries, keys and values in one matrix, in single blocks the first of the
    feed-forward layers as well."""
    for name in shapes:
        if re.search(_FLUX_FUSED, name):
            continue
        original = _renamed(name, _FLUX_RULES)
        if name.startswith("norm_out."):
            yield Entry(original, (name,), SWAPPED)
        elif ".to_q." in name:
            sources = [name.replace("to_q", other) for other in ("to_q", "to_k", "to_v")]
            if name.startswith("single_"):
                sources.append(name.replace("attn.to_q", "proj_mlp"))
            yield Entry(original, tuple(sources), ROWS)
        elif ".add_q_proj." in name:
            sources = [name.replace("add_q", f"add_{letter}") for letter in "qkv"]
            yield Entry(original, tuple(sources), ROWS)
        else:
            yield Entry(original, (name,))


_FLUX2_RULES: Rules = (
    (r"time_guidance_embed\.timestep_embedder\.linear_1\.(.*)", r"time_in.in_layer.\1"),
    (r"time_guidance_embed\.timestep_embedder\.linear_2\.(.*)", r"time_in.out_layer.\1"),
    (r"time_guidance_embed\.guidance_embedder\.linear_1\.(.*)", r"guidance_in.in_layer.\1"),
    (r"time_guidance_embed\.guidance_embedder\.linear_2\.(.*)", r"guidance_in.out_layer.\1"),
    (
        r"(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation)\.linear\.(.*)",
        r"\1.lin.\2",
    ),
    (r"transformer_blocks\.(\d+)\.ff\.linear_in\.(.*)", r"double_blocks.\1.img_mlp.0.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_out\.(.*)", r"double_blocks.\1.img_mlp.2.\2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_in\.(.*)", r"double_blocks.\1.txt_mlp.0.\2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out\.(.*)", r"double_blocks.\1.txt_mlp.2.\2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.(.*)", r"single_blocks.\1.linear1.\2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out\.(.*)", r"single_blocks.\1.linear2.\2"),
    *_FLUX_RULES,
)


def flux2(shapes: Shapes) -> Iterator[Entry]:
    """FLUX.2's transformer: queries, keys and values of double blocks in one matrix, as FLUX.1's."""
    for name in shapes:
        if re.search(_FLUX_FUSED, name):
            continue
        original = _renamed(name, _FLUX2_RULES)
        if name.startswith("norm_out."):
            yield Entry(original, (name,), SWAPPED)
        elif ".to_q." in name:
            yield Entry(original, tuple(name.replace("to_q", other) for other in ("to_q", "to_k", "to_v")), ROWS)
        elif ".add_q_proj." in name:
            yield Entry(original, tuple(name.replace("add_q", f"add_{letter}") for letter in "qkv"), ROWS)
        else:
            yield Entry(original, (name,))


def flux2_vae(shapes: Shapes) -> Iterator[Entry]:
    """FLUX.2's autoencoder: its outer convolutions are within encoder and decoder."""
    normalized = {name: shape for name, shape in shapes.items() if name.startswith("bn.")}
    for entry in ldm_vae({name: shape for name, shape in shapes.items() if name not in normalized}):
        name = re.sub(r"^post_quant_conv\.", "decoder.post_quant_conv.", entry.name)
        yield entry._replace(name=re.sub(r"^quant_conv\.", "encoder.quant_conv.", name))
    yield from (Entry(name, (name,)) for name in normalized)


_Z_IMAGE_RULES: Rules = (
    (r"all_x_embedder\.2-1\.(.*)", r"x_embedder.\1"),
    (r"all_final_layer\.2-1\.(.*)", r"final_layer.\1"),
    (r"(.*)\.attention\.to_q\.weight", r"\1.attention.qkv.weight"),
    (r"(.*)\.attention\.to_out\.0\.weight", r"\1.attention.out.weight"),
    (r"(.*)\.attention\.norm_([qk])\.weight", r"\1.attention.\2_norm.weight"),
    (r".*", r"\g<0>"),
)


def z_image(shapes: Shapes) -> Iterator[Entry]:
    """Z-Image's transformer: queries, keys and values in one matrix."""
    for name in shapes:
        if ".to_q." in name:
            sources = tuple(name.replace("to_q", other) for other in ("to_q", "to_k", "to_v"))
            yield Entry(_renamed(name, _Z_IMAGE_RULES), sources, ROWS)
        elif ".to_k." not in name and ".to_v." not in name:
            yield Entry(_renamed(name, _Z_IMAGE_RULES), (name,))


_LUMINA2_RULES: Rules = (
    (r"time_caption_embed\.timestep_embedder\.linear_1\.(.*)", r"t_embedder.mlp.0.\1"),
    (r"time_caption_embed\.timestep_embedder\.linear_2\.(.*)", r"t_embedder.mlp.2.\1"),
    (r"time_caption_embed\.caption_embedder\.(.*)", r"cap_embedder.\1"),
    (r"norm_out\.linear_1\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
    (r"norm_out\.linear_2\.(.*)", r"final_layer.linear.\1"),
    (r"(.*)\.attn\.to_q\.weight", r"\1.attention.qkv.weight"),
    (r"(.*)\.attn\.to_out\.0\.weight", r"\1.attention.out.weight"),
    (r"(.*)\.attn\.norm_([qk])\.weight", r"\1.attention.\2_norm.weight"),
    (r"(.*)\.norm1\.linear\.(.*)", r"\1.adaLN_modulation.1.\2"),
    (r"(.*)\.norm1(?:\.norm)?\.weight", r"\1.attention_norm1.weight"),
    (r"(.*)\.norm2\.weight", r"\1.attention_norm2.weight"),
    (r"(.*)\.feed_forward\.linear_([123])\.weight", r"\1.feed_forward.w\2.weight"),
    (r".*", r"\g<0>"),
)


def lumina2(shapes: Shapes) -> Iterator[Entry]:
    """Lumina 2's transformer: queries, keys and values in one matrix."""
    for name in shapes:
        if ".to_q." in name:
            sources = tuple(name.replace("to_q", other) for other in ("to_q", "to_k", "to_v"))
            yield Entry(_renamed(name, _LUMINA2_RULES), sources, ROWS)
        elif ".to_k." not in name and ".to_v." not in name:
            yield Entry(_renamed(name, _LUMINA2_RULES), (name,))


_WAN_RULES: Rules = (
    (r"condition_embedder\.time_embedder\.linear_1\.(.*)", r"time_embedding.0.\1"),
    (r"condition_embedder\.time_embedder\.linear_2\.(.*)", r"time_embedding.2.\1"),
    (r"condition_embedder\.text_embedder\.linear_1\.(.*)", r"text_embedding.0.\1"),
    (r"condition_embedder\.text_embedder\.linear_2\.(.*)", r"text_embedding.2.\1"),
    (r"condition_embedder\.time_proj\.(.*)", r"time_projection.1.\1"),
    (r"condition_embedder\.image_embedder\.norm1\.(.*)", r"img_emb.proj.0.\1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.(.*)", r"img_emb.proj.1.\1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2\.(.*)", r"img_emb.proj.3.\1"),
    (r"condition_embedder\.image_embedder\.norm2\.(.*)", r"img_emb.proj.4.\1"),
    (r"condition_embedder\.image_embedder\.pos_embed", r"img_emb.emb_pos"),
    (r"blocks\.(\d+)\.attn2\.add_([kv])_proj\.(.*)", r"blocks.\1.cross_attn.\2_img.\3"),
    (r"blocks\.(\d+)\.attn2\.norm_added_k\.weight", r"blocks.\1.cross_attn.norm_k_img.weight"),
    (r"blocks\.(\d+)\.attn1\.to_([qkv])\.(.*)", r"blocks.\1.self_attn.\2.\3"),
    (r"blocks\.(\d+)\.attn2\.to_([qkv])\.(.*)", r"blocks.\1.cross_attn.\2.\3"),
    (r"blocks\.(\d+)\.attn1\.to_out\.0\.(.*)", r"blocks.\1.self_attn.o.\2"),
    (r"blocks\.(\d+)\.attn2\.to_out\.0\.(.*)", r"blocks.\1.cross_attn.o.\2"),
    (r"blocks\.(\d+)\.attn1\.norm_([qk])\.weight", r"blocks.\1.self_attn.norm_\2.weight"),
    (r"blocks\.(\d+)\.attn2\.norm_([qk])\.weight", r"blocks.\1.cross_attn.norm_\2.weight"),
    (r"blocks\.(\d+)\.norm2\.(.*)", r"blocks.\1.norm3.\2"),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj\.(.*)", r"blocks.\1.ffn.0.\2"),
    (r"blocks\.(\d+)\.ffn\.net\.2\.(.*)", r"blocks.\1.ffn.2.\2"),
    (r"blocks\.(\d+)\.scale_shift_table", r"blocks.\1.modulation"),
    (r"patch_embedding\.(.*)", r"\g<0>"),
    (r"proj_out\.(.*)", r"head.head.\1"),
    (r"scale_shift_table", r"head.modulation"),
)


_KREA2_RULES: Rules = (
    (r"img_in\.(.*)", r"first.\1"), (r"time_embed\.linear_1\.(.*)", r"tmlp.0.\1"),
    (r"time_embed\.linear_2\.(.*)", r"tmlp.2.\1"), (r"time_mod_proj\.(.*)", r"tproj.1.\1"),
    (r"txt_in\.norm\.weight", "txtmlp.0.scale"), (r"txt_in\.linear_1\.(.*)", r"txtmlp.1.\1"),
    (r"txt_in\.linear_2\.(.*)", r"txtmlp.3.\1"), (r"text_fusion\.projector\.weight", "txtfusion.projector.weight"),
    (r"final_layer\.linear\.(.*)", r"last.linear.\1"), (r"final_layer\.norm\.weight", "last.norm.scale"),
    (r"final_layer\.scale_shift_table", "last.modulation.lin"),
)  # fmt: skip
_KREA2_PARTS: Rules = (
    (r"^transformer_blocks\.", "blocks."), (r"^text_fusion\.", "txtfusion."), (r"\.attn\.to_([qkv])\.", r".attn.w\1."),
    (r"\.attn\.to_out\.0\.", ".attn.wo."), (r"\.attn\.to_gate\.", ".attn.gate."), (r"\.ff\.", ".mlp."),
    (r"\.attn\.norm_([qk])\.weight", r".attn.qknorm.\1norm.scale"), (r"\.norm1\.weight", ".prenorm.scale"),
    (r"\.norm2\.weight", ".postnorm.scale"), (r"\.scale_shift_table", ".mod.lin"),
)  # fmt: skip
"""Of blocks, applied one after the other."""


def krea2(shapes: Shapes) -> Iterator[Entry]:
    """Krea 2's transformer in the names of its own code; a block's six vectors are one."""
    for name in shapes:
        original = name
        if "_blocks." not in name:
            yield Entry(_renamed(name, _KREA2_RULES), (name,))
            continue
        for pattern, replacement in _KREA2_PARTS:
            original = re.sub(pattern, replacement, original)
        yield Entry(original, (name,), FLAT if original.endswith(".mod.lin") else SAME)


_PIXART_RULES: Rules = (
    (r"pos_embed\.proj\.(.*)", r"x_embedder.proj.\1"),
    (r"caption_projection\.y_embedding", "y_embedder.y_embedding"),
    (r"caption_projection\.linear_([12])\.(.*)", r"y_embedder.y_proj.fc\1.\2"),
    (r"adaln_single\.linear\.(.*)", r"t_block.1.\1"),
    (r"adaln_single\.emb\.timestep_embedder\.linear_1\.(.*)", r"t_embedder.mlp.0.\1"),
    (r"adaln_single\.emb\.timestep_embedder\.linear_2\.(.*)", r"t_embedder.mlp.2.\1"),
    (r"adaln_single\.emb\.resolution_embedder\.linear_1\.(.*)", r"csize_embedder.mlp.0.\1"),
    (r"adaln_single\.emb\.resolution_embedder\.linear_2\.(.*)", r"csize_embedder.mlp.2.\1"),
    (r"adaln_single\.emb\.aspect_ratio_embedder\.linear_1\.(.*)", r"ar_embedder.mlp.0.\1"),
    (r"adaln_single\.emb\.aspect_ratio_embedder\.linear_2\.(.*)", r"ar_embedder.mlp.2.\1"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_q\.(.*)", r"blocks.\1.attn.qkv.\2"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.(.*)", r"blocks.\1.attn.proj.\2"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_q\.(.*)", r"blocks.\1.cross_attn.q_linear.\2"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_k\.(.*)", r"blocks.\1.cross_attn.kv_linear.\2"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0\.(.*)", r"blocks.\1.cross_attn.proj.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"transformer_blocks\.(\d+)\.scale_shift_table", r"blocks.\1.scale_shift_table"),
    (r"proj_out\.(.*)", r"final_layer.linear.\1"),
    (r"scale_shift_table", r"final_layer.scale_shift_table"),
)


_SANA_RULES: Rules = (
    (r"patch_embed\.proj\.(.*)", r"x_embedder.proj.\1"),
    (r"caption_projection\.y_embedding", "y_embedder.y_embedding"),
    (r"caption_projection\.linear_([12])\.(.*)", r"y_embedder.y_proj.fc\1.\2"),
    (r"caption_norm\.weight", "attention_y_norm.weight"),
    (r"time_embed\.linear\.(.*)", r"t_block.1.\1"),
    (r"time_embed\.emb\.timestep_embedder\.linear_1\.(.*)", r"t_embedder.mlp.0.\1"),
    (r"time_embed\.emb\.timestep_embedder\.linear_2\.(.*)", r"t_embedder.mlp.2.\1"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_q\.(.*)", r"blocks.\1.attn.qkv.\2"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.(.*)", r"blocks.\1.attn.proj.\2"),
    (r"transformer_blocks\.(\d+)\.attn1\.norm_([qk])\.(.*)", r"blocks.\1.attn.\2_norm.\3"),
    (r"transformer_blocks\.(\d+)\.attn2\.norm_([qk])\.(.*)", r"blocks.\1.cross_attn.\2_norm.\3"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_q\.(.*)", r"blocks.\1.cross_attn.q_linear.\2"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_k\.(.*)", r"blocks.\1.cross_attn.kv_linear.\2"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0\.(.*)", r"blocks.\1.cross_attn.proj.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.conv_(\w+)\.(.*)", r"blocks.\1.mlp.\2_conv.conv.\3"),
    (r"transformer_blocks\.(\d+)\.scale_shift_table", r"blocks.\1.scale_shift_table"),
    (r"proj_out\.(.*)", r"final_layer.linear.\1"),
    (r"scale_shift_table", r"final_layer.scale_shift_table"),
)


def _from_three_and_two(shapes: Shapes, rules: Rules) -> Iterator[Entry]:
    """Queries, keys and values of a picture in one matrix, keys and values of its text in one."""
    for name in shapes:
        if re.search(r"\.attn1\.to_[kv]\.|\.attn2\.to_v\.", name):
            continue
        sources: tuple[str, ...] = (name,)
        if ".attn1.to_q." in name:
            sources = tuple(name.replace("to_q", f"to_{letter}") for letter in "qkv")
        elif ".attn2.to_k." in name:
            sources = (name, name.replace("to_k", "to_v"))
        yield Entry(_renamed(name, rules), sources, ROWS if len(sources) > 1 else SAME)


def pixart(shapes: Shapes) -> Iterator[Entry]:
    """PixArt's transformer."""
    return _from_three_and_two(shapes, _PIXART_RULES)


def sana(shapes: Shapes) -> Iterator[Entry]:
    """Sana's transformer."""
    return _from_three_and_two(shapes, _SANA_RULES)


_DC_ENDS: Rules = (
    (r"encoder\.conv_in\.(.*)", r"encoder.project_in.conv.\1"),
    (r"encoder\.conv_out\.(.*)", r"encoder.project_out.main.op_list.0.conv.\1"),
    (r"decoder\.conv_in\.(.*)", r"decoder.project_in.main.conv.\1"),
    (r"decoder\.norm_out\.(.*)", r"decoder.project_out.op_list.0.\1"),
    (r"decoder\.conv_out\.(.*)", r"decoder.project_out.op_list.2.conv.\1"),
    (r"encoder\.down_blocks\.(\d+)\.(\d+)\.(.*)", r"encoder.stages.\1.op_list.\2.\3"),
    (r"decoder\.up_blocks\.(\d+)\.(\d+)\.(.*)", r"decoder.stages.\1.op_list.\2.\3"),
)
_DC_PARTS: Rules = (
    (r"(.*)\.attn\.to_q\.weight", r"\1.context_module.main.qkv.conv.weight"),
    (r"(.*)\.attn\.to_out\.weight", r"\1.context_module.main.proj.conv.weight"),
    (r"(.*)\.attn\.norm_out\.(.*)", r"\1.context_module.main.proj.norm.\2"),
    (r"(.*)\.attn\.to_qkv_multiscale\.0\.proj_in\.weight", r"\1.context_module.main.aggreg.0.0.weight"),
    (r"(.*)\.attn\.to_qkv_multiscale\.0\.proj_out\.weight", r"\1.context_module.main.aggreg.0.1.weight"),
    (r"(.*)\.conv_out\.conv_(\w+)\.(.*)", r"\1.local_module.main.\2_conv.conv.\3"),
    (r"(.*)\.conv_out\.norm\.(.*)", r"\1.local_module.main.point_conv.norm.\2"),
    (r"(.*op_list\.\d+)\.conv([12])\.(.*)", r"\1.main.conv\2.conv.\3"),
    (r"(.*op_list\.\d+)\.norm\.(.*)", r"\1.main.conv2.norm.\2"),
    (r"(encoder\.stages.*op_list\.\d+)\.conv\.(.*)", r"\1.main.conv.\2"),
    (r"(decoder\.stages.*op_list\.\d+)\.conv\.(.*)", r"\1.main.conv.conv.\2"),
    (r".*", r"\g<0>"),
)


def dc_vae(shapes: Shapes) -> Iterator[Entry]:
    """Sana's autoencoder as EfficientViT has it: what are matrices in the class are convolutions, queries, keys and
    values in one."""
    for name in shapes:
        original = _renamed(_renamed(name, _DC_ENDS), _DC_PARTS)
        if ".attn.to_q." in name:
            yield Entry(original, tuple(name.replace("to_q", f"to_{letter}") for letter in "qkv"), ROWS_OF_ONE_TAP)
        elif not re.search(r"\.attn\.to_[kv]\.", name):
            yield Entry(original, (name,), ONE_TAP if name.endswith(".attn.to_out.weight") else SAME)


def clip_vision(shapes: Shapes) -> Iterator[Entry]:
    """CLIP's vision part as transformers names it in files."""
    return (Entry(f"vision_model.{name}", (name,)) for name in shapes)


def wan(shapes: Shapes) -> Iterator[Entry]:
    """Wan's transformer, in the names of its own code."""
    return (Entry(_renamed(name, _WAN_RULES), (name,)) for name in shapes)


_LTX_RULES: Rules = (
    (r"proj_in\.(.*)", r"patchify_proj.\1"),
    (r"time_embed\.(.*)", r"adaln_single.\1"),
    (r"(transformer_blocks\.\d+\.attn[12])\.norm_([qk])\.weight", r"\1.\2_norm.weight"),
    (r"(transformer_blocks|caption_projection|proj_out)\.(.*)", r"\g<0>"),
    (r"scale_shift_table", r"\g<0>"),
)


def ltx(shapes: Shapes) -> Iterator[Entry]:
    """LTX-Video's transformer, in the names of its own code."""
    return (Entry(_renamed(name, _LTX_RULES), (name,)) for name in shapes)


_LTX2_RULES: Rules = (
    (r"(audio_)?proj_in\.(.*)", r"\1patchify_proj.\2"),
    (r"((?:audio_)?(?:prompt_)?)(?:time_embed|adaln)\.(.*)", r"\1adaln_single.\2"),
    (r"av_cross_attn_(video|audio)_scale_shift\.(.*)", r"av_ca_\1_scale_shift_adaln_single.\2"),
    (r"av_cross_attn_(video|audio)_(a2v|v2a)_gate\.(.*)", r"av_ca_\2_gate_adaln_single.\3"),
    (r"(transformer_blocks\.\d+)\.(video|audio)_a2v_cross_attn_scale_shift_table", r"\1.scale_shift_table_a2v_ca_\2"),
    (r"(transformer_blocks\.\d+\.\w+)\.norm_([qk])\.weight", r"\1.\2_norm.weight"),
    (r"(transformer_blocks|(?:audio_)?caption_projection|(?:audio_)?proj_out)\.(.*)", r"\g<0>"),
    (r"(audio_)?scale_shift_table", r"\g<0>"),
)


def ltx2(shapes: Shapes) -> Iterator[Entry]:
    """LTX-2's transformer, in the names of its own code."""
    return (Entry(_renamed(name, _LTX2_RULES), (name,)) for name in shapes)


_LTX2_CONNECTOR_RULES: Rules = (
    (r"text_proj_in\.weight", "text_embedding_projection.aggregate_embed.weight"),
    (r"(\w+)_text_proj_in\.(.*)", r"text_embedding_projection.\1_aggregate_embed.\2"),
    (r"(\w+)_connector\.transformer_blocks\.(\d+)\.attn1\.norm_([qk])\.weight",
     r"model.diffusion_model.\1_embeddings_connector.transformer_1d_blocks.\2.attn1.\3_norm.weight"),
    (r"(\w+)_connector\.transformer_blocks\.(.*)",
     r"model.diffusion_model.\1_embeddings_connector.transformer_1d_blocks.\2"),
    (r"(\w+)_connector\.(.*)", r"model.diffusion_model.\1_embeddings_connector.\2"),
)  # fmt: skip


def ltx2_connectors(shapes: Shapes) -> Iterator[Entry]:
    """LTX-2's connectors, most of whose tensors stand with the diffusion model's."""
    return (Entry(_renamed(name, _LTX2_CONNECTOR_RULES), (name,)) for name in shapes)


def ltx2_audio_vae(shapes: Shapes) -> Iterator[Entry]:
    """LTX-2's audio VAE, in the names of its own code."""
    rules: Rules = (
        ("latents_mean", "per_channel_statistics.mean-of-means"),
        ("latents_std", "per_channel_statistics.std-of-means"),
        ("(encoder|decoder).*", r"\g<0>"),
    )  # fmt: skip
    return (Entry(_renamed(name, rules), (name,)) for name in shapes)


def ltx2_vocoder(shapes: Shapes) -> Iterator[Entry]:
    """LTX-2's vocoder, likewise."""
    for name in shapes:
        theirs = name
        for ours, original in _VOCODER_NAMES:
            theirs = theirs.replace(ours, original)
        yield Entry(theirs, (name,))


_VOCODER_NAMES = (
    ("upsamplers.", "ups."), ("resnets.", "resblocks."), ("conv_in.", "conv_pre."), ("conv_out.", "conv_post."),
    ("act_out.", "act_post."), ("downsample.", "downsample.lowpass."),
)  # fmt: skip


_LTX_VAE_BLOCKS = {
    "old": {
        "encoder": {"0": 0, "0.downsamplers.0": 1, "0.conv_out": 2, "1": 3, "1.downsamplers.0": 4, "1.conv_out": 5,
                    "2": 6, "2.downsamplers.0": 7, "3": 8, "mid": 9},
        "decoder": {"mid": 0, "0": 1, "1.upsamplers.0": 2, "1": 3, "2.conv_in": 4, "2.upsamplers.0": 5, "2": 6,
                    "3.conv_in": 7, "3.upsamplers.0": 8, "3": 9},
    },
    "new": {
        "encoder": {"0": 0, "0.downsamplers.0": 1, "1": 2, "1.downsamplers.0": 3, "2": 4, "2.downsamplers.0": 5, "3": 6,
                    "3.downsamplers.0": 7, "mid": 8},
        "decoder": {"mid": 0, "0.upsamplers.0": 1, "0": 2, "1.upsamplers.0": 3, "1": 4, "2.upsamplers.0": 5, "2": 6,
                    "3.upsamplers.0": 7, "3": 8},
    },
}  # fmt: skip
"""Which block of the file is which of the class, in version 0.9.0 and from 0.9.5 on."""

_LTX_VAE_PARTS: Rules = (
    (r"\.resnets\.", ".res_blocks."), (r"\.norm3\.", ".norm3.norm."), (r"\.conv_shortcut\.conv\.", ".conv_shortcut."),
    (r"^decoder\.time_embedder\.", "decoder.last_time_embedder."),
    (r"^decoder\.scale_shift_table", "decoder.last_scale_shift_table"),
    (r"^latents_mean$", "per_channel_statistics.mean-of-means"),
    (r"^latents_std$", "per_channel_statistics.std-of-means"),
)  # fmt: skip


def ltx_vae(shapes: Shapes) -> Iterator[Entry]:
    """LTX-Video's autoencoder, whose file numbers blocks through."""
    blocks = _LTX_VAE_BLOCKS["new" if "decoder.up_blocks.0.upsamplers.0.conv.conv.weight" in shapes else "old"]

    def block(match: re.Match[str]) -> str:
        side, level, part = match.groups()
        number = blocks[side]["mid" if level == "mid_block" else f"{level.split('.')[1]}{part or ''}"]
        return f"{side}.{'down' if side == 'encoder' else 'up'}_blocks.{number}."

    for name in shapes:
        pattern = r"^(encoder|decoder)\.(mid_block|\w+_blocks\.\d+)(\.(?:down|up)samplers\.0|\.conv_(?:in|out))?\."
        original = re.sub(pattern, block, name)
        for part, replacement in _LTX_VAE_PARTS:
            original = re.sub(part, replacement, original)
        yield Entry(original, (name,))


def qwen25(shapes: Shapes) -> Iterator[Entry]:
    """Qwen2.5-VL as its authors publish it: the class has the language model below a name of its own."""
    for name in shapes:
        yield Entry(name.replace("model.language_model.", "model.").replace("model.visual.", "visual."), (name,))


_FILM_PARTS: Rules = (
    (r"\.norm1\.", ".residual.0."), (r"\.conv1\.", ".residual.2."), (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."), (r"\.conv_shortcut\.", ".shortcut."),
    (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."), (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."), (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."), (r"\.mid_block\.resnets\.1\.", ".middle.2."),
)  # fmt: skip
"""Applied one after the other."""


def film_vae(shapes: Shapes) -> Iterator[Entry]:
    """Wan's autoencoder. In 2.2 levels have blocks, the last of which changes the size; 2.1 counts the blocks of all
    levels together."""
    layers = 1 + max(int(name.split(".")[4]) for name in shapes if name.startswith("decoder.up_blocks.0.resnets."))
    nested = any(".upsampler." in name for name in shapes)
    for name in shapes:
        original = name
        for pattern, replacement in _FILM_PARTS:
            original = re.sub(pattern, replacement, original)
        yield Entry((_nested if nested else _flat)(original, layers), (name,))


def _nested(name: str, layers: int) -> str:
    """``layers``: in a level on the way up, one more than on the way down."""
    name = re.sub(r"\.(up|down)_blocks\.(\d+)\.resnets\.", r".\1samples.\2.\1samples.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.upsampler\.", rf".upsamples.\1.upsamples.{layers}.", name)
    return re.sub(r"\.down_blocks\.(\d+)\.downsampler\.", rf".downsamples.\1.downsamples.{layers - 1}.", name)


def _flat(name: str, layers: int) -> str:
    def block(match: re.Match[str]) -> str:
        level, kind, number = match.groups()
        return f".upsamples.{int(level) * (layers + 1) + (int(number) if kind == 'resnets' else layers)}."

    name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", block, name)
    return name.replace(".down_blocks.", ".downsamples.")


_SD3_RULES: Rules = (
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"pos_embed\.proj\.(.*)", r"x_embedder.proj.\1"),
    (r"context_embedder\.(.*)", r"\g<0>"),
    (r"time_text_embed\.timestep_embedder\.linear_1\.(.*)", r"t_embedder.mlp.0.\1"),
    (r"time_text_embed\.timestep_embedder\.linear_2\.(.*)", r"t_embedder.mlp.2.\1"),
    (r"time_text_embed\.text_embedder\.linear_1\.(.*)", r"y_embedder.mlp.0.\1"),
    (r"time_text_embed\.text_embedder\.linear_2\.(.*)", r"y_embedder.mlp.2.\1"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.(.*)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear\.(.*)", r"joint_blocks.\1.context_block.adaLN_modulation.1.\2"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_q\.(.*)", r"joint_blocks.\1.x_block.\2.qkv.\3"),
    (r"transformer_blocks\.(\d+)\.attn\.add_q_proj\.(.*)", r"joint_blocks.\1.context_block.attn.qkv.\2"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.norm_([qk])\.weight", r"joint_blocks.\1.x_block.\2.ln_\3.weight"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.weight", r"joint_blocks.\1.context_block.attn.ln_\2.weight"),
    (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0\.(.*)", r"joint_blocks.\1.x_block.\2.proj.\3"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out\.(.*)", r"joint_blocks.\1.context_block.attn.proj.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.(.*)", r"joint_blocks.\1.x_block.mlp.fc1.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.(.*)", r"joint_blocks.\1.x_block.mlp.fc2.\2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.(.*)", r"joint_blocks.\1.context_block.mlp.fc1.\2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2\.(.*)", r"joint_blocks.\1.context_block.mlp.fc2.\2"),
    (r"norm_out\.linear\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
    (r"proj_out\.(.*)", r"final_layer.linear.\1"),
)


def sd3(shapes: Shapes) -> Iterator[Entry]:
    """SD 3's transformer: queries, keys and values in one matrix. Where a norm gets two vectors (the last layer's, and
    that of the text in the last block, which gives no text) the file has shift above scale."""
    last = max(int(name.split(".")[1]) for name in shapes if name.startswith("transformer_blocks."))
    for name in shapes:
        if re.search(r"\.(to_[kv]|add_[kv]_proj)\.", name):
            continue
        original = _renamed(name, _SD3_RULES)
        if name.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context.")):
            yield Entry(original, (name,), SWAPPED)
        elif ".to_q." in name:
            yield Entry(original, tuple(name.replace("to_q", f"to_{letter}") for letter in "qkv"), ROWS)
        elif ".add_q_proj." in name:
            yield Entry(original, tuple(name.replace("add_q", f"add_{letter}") for letter in "qkv"), ROWS)
        else:
            yield Entry(original, (name,))
