"""tools/checkpoints: its names by diffusers' own converters and published files, its numbers by what the files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils as converters
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from tools.checkpoints import FAMILIES, make
from tools.checkpoints.families import Component, saved_tensors, tensor_name
from tools.checkpoints.make import components_of
from tools.checkpoints.names import Shape, flux, sd3
from tools.checkpoints.numbers import decoded, encoded, stored_size, stored_type

Weights = dict[str, torch.Tensor]

CLIP_G, CLIP_H = "conditioner.embedders.1.model.", "cond_stage_model.model."
SD3_CLIP_G = "text_encoders.clip_g.transformer."
DIFFUSION = "model.diffusion_model."
LANGUAGE_MODEL = r"^text_encoders\.\w+\.transformer\.model\."
FLUX_CLIP, FLUX_T5 = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."


def from_gguf(path: Path) -> Weights:
    """A GGUF file's numbers in the shapes that the model has."""
    reader = GGUFReader(path)
    weights = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if (kept := reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")) is not None:
            shape = tuple(int(kept.parts[index][0]) for index in kept.data)
        numbers = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weights[tensor.name] = torch.from_numpy(numbers.reshape(shape).copy())
    return weights


ONLY_BARE = {
    "z-image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    **{
        name: converters.convert_flux2_transformer_checkpoint_to_diffusers
        for name in FAMILIES
        if name.startswith("flux2")
    },
}
"""Converters of diffusers' that break on the prefix that whole files have."""


def converted(family: str, component: Component, module: Any, weights: Weights) -> Weights:
    """A whole file's tensors by the module's names, by diffusers' converters."""
    if family.startswith("wan") and component.name == "diffusion":
        ours = {name.removeprefix(DIFFUSION): each for name, each in weights.items() if name.startswith(DIFFUSION)}
        return converters.convert_wan_transformer_to_diffusers(ours)
    if component.folder == "unet":
        return converters.convert_ldm_unet_checkpoint(weights, module.config)
    if component.name == "vae" and family.startswith("flux2"):
        renamed = {re.sub(r"(en|de)coder\.((post_)?quant_conv)", r"\2", name): w for name, w in weights.items()}
        found = converters.convert_ldm_vae_checkpoint(renamed, module.config)
        return found | {name: weights[f"vae.{name}"] for name in ("bn.running_mean", "bn.running_var")}
    if component.name == "vae":
        return converters.convert_ldm_vae_checkpoint(weights, module.config)
    if component.name == "clip_g" and family.startswith("sd3"):
        return converters.convert_ldm_clip_checkpoint(weights, SD3_CLIP_G)
    if family == "qwen-image":
        return {name: weights[entry] for name, entry in _qwen_image_names(component, module).items()}
    if component.name == "llm":
        return {re.sub(LANGUAGE_MODEL, "", name): weight for name, weight in weights.items()}
    if family in ONLY_BARE and component.name == "diffusion":
        ours = {name.removeprefix(DIFFUSION): w for name, w in weights.items() if name.startswith(DIFFUSION)}
        return ONLY_BARE[family](ours)
    if component.folder == "transformer":
        return converters.convert_sd3_transformer_checkpoint_to_diffusers(weights)
    if component.name == "clip_g":
        return converters.convert_open_clip_checkpoint(module, weights, CLIP_G)
    if family.startswith("sd2"):
        return converters.convert_open_clip_checkpoint(module, weights, CLIP_H)
    if component.name == "clip_l":
        return converters.convert_ldm_clip_checkpoint(weights, FLUX_CLIP)
    return {name.removeprefix(FLUX_T5): weight for name, weight in weights.items() if name.startswith(FLUX_T5)}


def _qwen_image_names(component: Component, module: Any) -> dict[str, str]:
    """Diffusers has no converter, for there is nothing to convert: Qwen-Image has the class's names, and transformers
    reads Qwen2.5-VL's published ones, without the name of the language model."""
    if component.name == "diffusion":
        return {name: DIFFUSION + name for name in parameters(module)}
    prefix = "text_encoders.qwen25_7b.transformer."
    inner = {"model.language_model.": "model.", "model.visual.": "visual."}
    named = {}
    for name in parameters(module):
        start = next((start for start in inner if name.startswith(start)), "")
        named[name] = prefix + inner.get(start, "") + name.removeprefix(start)
    return named


def parameters(module: Any) -> Weights:
    return {name: tensor.detach() for name, tensor in saved_tensors(module).items()}


def assert_same(found: Weights, module: Any) -> None:
    """``found`` has every tensor of the module, each with its numbers."""
    named = {tensor_name(name): weight for name, weight in found.items()}
    for name, parameter in parameters(module).items():
        assert torch.equal(named[name].float(), parameter), name


SIMILAR = (
    "flux2-klein-9b", "wan2.2-a14b", "wan2.2-5b", "wan2.2-i2v", "qwen-image-edit",
    "krea2", "wan2.1-i2v", "wan2.1-flf2v", "pixart-sigma", "pixart-alpha", "lumina2", "ltx-video", "ltx-video-13b",
    "ltx2", "ltx2-i2v", "ltx2.3", "sana", "sana-1.5",
)  # fmt: skip
"""As small as others, in the same names; or names are compared in tests/families/test_krea2.py, test_ltx.py,
test_ltx2.py, test_lumina2.py, test_pixart.py, test_sana.py and test_wan.py."""

WRITTEN = [
    *((family, "safetensors", "BF16") for family in FAMILIES if family not in SIMILAR),
    # the vocabularies of language models and of UMT5 take long to quantize, and Q5_1 takes longer than random Q4_K
    *(
        (family, "gguf", kind)
        for family in FAMILIES
        if family not in (*ONLY_BARE, *SIMILAR, "wan", "qwen-image")
        for kind in ("Q4_K", *(["Q5_1"] if family in ("sd1", "flux1-dev") else []))
    ),
]


@pytest.mark.parametrize(("family", "form", "type"), WRITTEN)
def test_diffusers_converters_find_the_same_numbers(family: str, form: str, type: str, tmp_path: Path) -> None:
    made = make(family, tmp_path, form=form, type=type)
    path = made.files["model"]
    weights = from_gguf(path) if form == "gguf" else load_file(path)
    for filed in made.filed:
        component = filed.component
        if family.startswith(("wan", "qwen-image")) and component.name == "vae":
            continue  # its converter knows one depth: tests/families/test_wan.py
        if (
            not family.startswith(("flux1", "chroma")) or component.name != "diffusion"
        ):  # FLUX's converter knows one width: below
            module = made.component(component.name)
            assert_same(converted(family, component, module, dict(weights)), module)


def _flux() -> Any:
    """At the published width, which the converter takes for granted, with a block of each kind."""
    return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def _chroma() -> Any:
    return diffusers.ChromaTransformer2DModel(num_layers=1, num_single_layers=1, approximator_layers=2)


TAKEN_APART = {
    "flux1": (_flux, flux, converters.convert_flux_transformer_checkpoint_to_diffusers),
    "chroma": (_chroma, flux, converters.convert_chroma_transformer_checkpoint_to_diffusers),
    **{
        name: (family.of_size("full")[0].build, sd3, converters.convert_sd3_transformer_checkpoint_to_diffusers)
        for name, family in FAMILIES.items()
        if name.startswith("sd3")
    },
}


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")  # diffusers' warning of its own import
@pytest.mark.parametrize("family", TAKEN_APART)
def test_transformers_are_what_diffusers_converters_take_apart(family: str) -> None:
    build, naming, convert = TAKEN_APART[family]
    with torch.device("meta"):
        module = build()
    shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(module).items()}
    numbered = {
        name: ((torch.arange(shape[0]) + 11 * number) % 251).to(torch.uint8)
        for number, (name, shape) in enumerate(shapes.items())
    }

    def tensor(name: str) -> torch.Tensor:
        shape = shapes[name]
        return numbered[name].reshape(-1, *(1 for _ in shape[1:])).expand(shape)

    original = {entry.name: entry.layout.join([tensor(name) for name in entry.sources]) for entry in naming(shapes)}
    found = convert(original)
    assert found.keys() == shapes.keys()
    for name, weight in found.items():
        assert torch.equal(weight, tensor(name)), name


TENSORS = {
    # sd_xl_base_1.0.safetensors; v1-5-pruned-emaonly without its schedule; flux1-dev, ae, clip_l (without what
    # draws nothing) and t5xxl together
    "sdxl": {"diffusion": 1680, "vae": 248, "clip_l": 196, "clip_g": 389},
    "sd1": {"diffusion": 686, "vae": 248, "clip_l": 196},
    "flux1-dev": {"diffusion": 780, "vae": 244, "clip_l": 196, "t5xxl": 219},
    "flux1-schnell": {"diffusion": 776, "vae": 244, "clip_l": 196, "t5xxl": 219},
    "chroma": {"diffusion": 643, "vae": 244, "t5xxl": 219},
    "z-image": {"diffusion": 453, "vae": 244, "llm": 398},
}


@pytest.mark.parametrize("family", TENSORS)
def test_full_sizes_have_as_many_tensors_as_the_published_files(family: str) -> None:
    counts = {c.name: len(list(c.whole(c.shapes()))) for c in FAMILIES[family].of_size("full")}
    assert counts == TENSORS[family]


def test_full_sd1_has_the_names_and_shapes_written_by_hand(maker: Any) -> None:
    by_hand = {entry.name: entry.shape for entry in maker.entries(maker.SIZES["full"])}
    made: dict[str, Shape] = {}
    for component in FAMILIES["sd1"].of_size("full"):
        shapes = component.shapes()
        made |= {entry.name: entry.shape(shapes) for entry in component.whole(shapes)}
    assert made == by_hand


@pytest.mark.parametrize("type", ["F32", "F8_E4M3", "F8_E5M2"])
def test_parts_hold_the_numbers(type: str, tmp_path: Path) -> None:
    made = make("flux1-dev", tmp_path, form="parts", type=type)
    assert_same(load_file(made.files["clip_l"]), made.component("clip_l"))
    assert_same(load_file(made.files["t5xxl"]), made.component("t5xxl"))
    stored = load_file(made.files["t5xxl"])["encoder.block.1.layer.0.SelfAttention.q.weight"]
    assert stored.dtype == {"F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[type]


def test_kernels_in_rows_of_256(tmp_path: Path) -> None:
    made = make("sdxl", tmp_path, form="gguf-parts", type="Q6_K")
    path = made.files["diffusion"]
    reader = GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["input_blocks.1.0.in_layers.2.weight"] == "Q6_K"
    assert types["input_blocks.1.0.in_layers.2.bias"] == "F32"
    assert reader.get_field("general.architecture").contents() == "sdxl"
    weights = {f"{DIFFUSION}{name}": weight for name, weight in from_gguf(path).items()}
    module = made.component("diffusion")
    assert_same(converters.convert_ldm_unet_checkpoint(weights, module.config), module)


def test_t5_as_llama_cpp_names_it(tmp_path: Path) -> None:
    made = make("flux1-schnell", tmp_path, form="gguf-parts", type="Q8_0")
    weights = from_gguf(made.files["t5xxl"])
    module = parameters(made.component("t5xxl"))
    pairs = {
        "token_embd.weight": "shared.weight",
        "enc.blk.1.attn_q.weight": "encoder.block.1.layer.0.SelfAttention.q.weight",
        "enc.blk.1.attn_o.weight": "encoder.block.1.layer.0.SelfAttention.o.weight",
        "enc.blk.0.attn_rel_b.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "enc.blk.0.attn_norm.weight": "encoder.block.0.layer.0.layer_norm.weight",
        "enc.blk.0.ffn_gate.weight": "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
        "enc.blk.0.ffn_up.weight": "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
        "enc.blk.0.ffn_down.weight": "encoder.block.0.layer.1.DenseReluDense.wo.weight",
        "enc.blk.0.ffn_norm.weight": "encoder.block.0.layer.1.layer_norm.weight",
        "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    }
    assert len(weights) == len(module)
    for original, name in pairs.items():
        assert torch.equal(weights[original], module[name]), original


DIRECTORIES = [
    (family, folder, source)
    for family, folder, source in (
        ("sd1", "unet", diffusers.UNet2DConditionModel),
        ("sd2", "text_encoder", transformers.CLIPTextModel),
        ("sdxl", "text_encoder_2", transformers.CLIPTextModelWithProjection),
        ("sdxl", "vae", diffusers.AutoencoderKL),
        ("flux1-dev", "transformer", diffusers.FluxTransformer2DModel),
        ("flux1-dev", "text_encoder_2", transformers.T5EncoderModel),
        ("sd3.5-medium", "transformer", diffusers.SD3Transformer2DModel),
        ("sd3", "text_encoder", transformers.CLIPTextModelWithProjection),
    )
]


@pytest.mark.parametrize("form", ["diffusers", "sharded"])
@pytest.mark.parametrize(("family", "folder", "source"), DIRECTORIES)
def test_the_libraries_open_their_directories(family: str, folder: str, source: Any, form: str, tmp_path: Path) -> None:
    made = make(family, tmp_path, form=form, type="F32")
    name = next(filed.component.name for filed in made.filed if filed.component.folder == folder)
    opened = source.from_pretrained(tmp_path / folder, low_cpu_mem_usage=False)
    assert_same(parameters(opened), made.component(name))
    shards = list((tmp_path / folder).glob("*.safetensors"))
    assert len(shards) == (2 if form == "sharded" else 1)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index[folder][1] == source.__name__


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")  # diffusers' warning of its own import
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "flux1-dev", "sd3", "sd3-without-t5", "chroma"])
def test_whole_directories_open(family: str, tmp_path: Path) -> None:
    made = make(family, tmp_path, form="diffusers")
    without = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3-without-t5" else {}
    opened = FAMILIES[family].pipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False, **without)
    mine = made.pipeline()
    prompt = "A lovely cat, 3 of them!"
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(mine, name, None) is not None:
            both = [getattr(one, name)(prompt, padding="max_length", max_length=20) for one in (opened, mine)]
            assert both[0].input_ids == both[1].input_ids
    assert type(opened.scheduler) is type(mine.scheduler)
    for name, value in mine.scheduler.config.items():
        assert name.startswith("_") or opened.scheduler.config[name] == value, name


BLOCKS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", *BLOCKS])
def test_numbers_in_every_format(type: str) -> None:
    values = torch.randn(24, 512, generator=torch.Generator().manual_seed(1)) * 0.05
    stored = encoded(values, type, "a")
    numbers = decoded(stored)
    assert stored.data.nbytes == stored_size(type, (24, 512))
    assert stored_type(type, (24, 512)) == type
    assert numbers.shape == values.shape
    assert torch.isfinite(numbers).all()
    assert float(numbers.std()) == pytest.approx(0.05, rel=0.15)
    assert abs(float(numbers.mean())) < 0.01
    assert np.array_equal(encoded(values, type, "a").data, stored.data)


def test_components_of_their_own_size() -> None:
    counts = {
        c.name: len(list(c.whole(c.shapes())))
        for c in components_of(FAMILIES["flux1-dev"], "reduced", {"t5xxl": "full"})
    }
    assert counts["t5xxl"] == TENSORS["flux1-dev"]["t5xxl"]
    assert counts["clip_l"] == TENSORS["flux1-dev"]["clip_l"]
    assert counts["diffusion"] < 120


def test_components_of_their_own_type(tmp_path: Path) -> None:
    made = make("flux1-schnell", tmp_path, form="gguf-parts", types={"t5xxl": "Q4_0"})
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(made.files["t5xxl"]).tensors}
    assert types["enc.blk.0.attn_q.weight"] == "Q4_0"
    assert types["enc.blk.0.attn_rel_b.weight"] == "F16"
    assert types["enc.blk.0.attn_norm.weight"] == "F32"
    assert {tensor.tensor_type.name for tensor in GGUFReader(made.files["diffusion"]).tensors} == {"F16"}


def test_what_does_not_exist_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family sd9: there are sd1"):
        make("sd9", tmp_path)
    with pytest.raises(ValueError, match="form zip: there are safetensors"):
        make("sd1", tmp_path, form="zip")
    with pytest.raises(ValueError, match="size reduced: sdxl has full, tiny"):
        make("sdxl", tmp_path, size="reduced")
    with pytest.raises(ValueError, match="does not know sd2"):
        make("sd2", tmp_path, form="gguf-parts")
