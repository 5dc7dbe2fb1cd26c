"""Checkpoints as GGUF files: what is converted how, tensor by tensor, and what goes along."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import BF16, dequantize, quantize
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint, open_checkpoint
from sdrpc.checkpoints.expressions import cast
from sdrpc.checkpoints.numbers import BLOCKS, unpacked
from sdrpc.diffusion.convert import HOLDS, encoded, write_model
from sdrpc.errors import CheckpointError, UsageError
from sdrpc.families.base import find
from sdrpc.families.configs import METADATA_KEY
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.registry import FAMILIES
from sdrpc.families.weight_types import AS_STORED, WRITABLE, WeightTypes, names_of, weight_types
from sdrpc.ggml.types import F32, TYPES
from sdrpc.ggml.weight import View, Weight
from tools.checkpoints import make

ERROR = {
    "F32": 0, "F16": 0, "BF16": 1 / 256, "Q8_0": 1 / 200, "Q5_1": 1 / 25, "Q5_0": 1 / 15, "Q4_1": 1 / 12, "Q4_0": 1 / 7,
}  # fmt: skip
"""The largest error of a value of F16 over the largest of its block: half a step, and a little for the scale's F16."""


def numbers(weight: Weight) -> np.ndarray:
    """A tensor's values, F32, [rows, row]."""
    raw = np.frombuffer(weight.data(), np.uint8)  # in one piece: gguf goes through rows sixteen at a time
    return dequantize(raw, GGMLQuantizationType[weight.type.name]).reshape(-1, weight.shape[-1])


def only_text(weights: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that is quickly converted: the text encoder, with fewer words."""
    prefix = "cond_stage_model.transformer.text_model."
    name = f"{prefix}embeddings.token_embedding.weight"
    return {n: w for n, w in weights.items() if n.startswith(prefix)} | {name: weights[name][:128].clone()}


@pytest.mark.parametrize("name", WRITABLE)
def test_tensor_by_tensor(name: str, tiny: Path, tmp_path: Path) -> None:
    source, path = open_checkpoint(tiny), tmp_path / "model.gguf"
    assert write_model(source, path, weight_types(name)) == []
    made = open_checkpoint(path)
    assert list(made.tensors) == list(source.tensors)
    for before, after in zip(source.tensors.values(), made.tensors.values(), strict=True):
        assert (after.type, after.shape) == (WeightTypes(TYPES[name]).of(before), before.shape)
        if after.type == before.type:
            assert bytes(after.data()) == bytes(before.data())
            continue
        theirs, ours = numbers(before), numbers(after)
        block = max(after.type.block, 1)
        largest = np.abs(theirs).reshape(-1, block).max(1).repeat(block).reshape(theirs.shape)
        assert (np.abs(ours - theirs) <= ERROR[name] * largest + 1e-7).all()
        assert bytes(after.data()) == quantize(theirs.reshape(-1), GGMLQuantizationType[name]).tobytes()
    for tensor in GGUFReader(path).tensors:
        assert bytes(made.tensors[tensor.name].data()) == tensor.data.tobytes()


@pytest.mark.parametrize("more", [0, 1])
def test_many_numbers_are_made_at_once(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """gguf has a loop in Python over groups of rows."""
    groups: list[int] = []
    made = BF16.quantize_blocks
    monkeypatch.setattr(BF16, "quantize_blocks", lambda blocks: groups.append(blocks.size) or made(blocks))
    values = np.linspace(-1, 1, 64 * BLOCKS + more, dtype="<f4")
    weight = Weight("x", F32, values.shape, View(memoryview(values.tobytes())))
    found = b"".join(bytes(piece) for piece in encoded(weight, TYPES["BF16"]))
    assert found == torch.from_numpy(values).bfloat16().view(torch.uint8).numpy().tobytes()
    assert min(groups) >= 16 * BLOCKS


def test_a_model_is_the_same_one(tiny: Path, tmp_path: Path) -> None:
    write_model(open_checkpoint(tiny), tmp_path / "model.gguf")
    ours, theirs = open_model(ModelFiles(tmp_path / "model.gguf")), open_model(ModelFiles(tiny))
    for name, component in theirs.components.items():
        assert ours[name].config == component.config
        for key, weight in component.found.tensors.items():
            assert bytes(ours[name].found.tensors[key].data()) == bytes(weight.data())


@pytest.mark.parametrize(
    ("name", "shape", "wanted", "given"),
    [
        ("attn1.to_k.weight", (64, 64), "Q8_0", "Q8_0"),
        ("attn1.to_k.weight", (64, 40), "Q8_0", "F32"),
        ("in_layers.2.weight", (64, 64, 3, 3), "Q8_0", "F32"),
        ("in_layers.2.weight", (64, 64, 3, 3), "F16", "F16"),
        ("embeddings.token_embedding.weight", (512, 64), "Q4_0", "F32"),
        ("embeddings.token_embedding.weight", (512, 64), "F16", "F16"),
        ("model.diffusion_model.time_embed.0.weight", (64, 64), "Q4_0", "F32"),
        ("norm1.weight", (64,), "Q8_0", "F32"),
        ("norm1.bias", (64,), "F16", "F32"),
        ("alpha", (), "F16", "F32"),
    ],
)
def test_which_tensors_get_the_type(name: str, shape: tuple[int, ...], wanted: str, given: str) -> None:
    assert WeightTypes(TYPES[wanted]).of(Weight(name, F32, shape, View(memoryview(b"")))).name == given


def test_whole_numbers_stay() -> None:
    weight = Weight("position_ids", TYPES["I64"], (1, 77), View(memoryview(b"")))
    assert WeightTypes(TYPES["F16"]).of(weight) == weight.type


def test_a_file_that_is_quantized_already(tiny: Path, tmp_path: Path) -> None:
    write_model(open_checkpoint(tiny), tmp_path / "small.gguf", weight_types("Q8_0"))
    small = open_checkpoint(tmp_path / "small.gguf")
    write_model(small, tmp_path / "large.gguf", weight_types("F32"))
    large = open_checkpoint(tmp_path / "large.gguf")
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.weight"
    assert large.tensors[name].type == F32
    np.testing.assert_array_equal(numbers(large.tensors[name]), numbers(small.tensors[name]))


def test_what_a_file_says_goes_along(tiny_weights: dict[str, Any], tmp_path: Path) -> None:
    said = {"unet": {"sample_size": 16, "attention_head_dim": 4}, "scaling_factor": 0.5, "more": "than we know"}
    save_file(tiny_weights, tmp_path / "a.safetensors", {METADATA_KEY: json.dumps(said), "format": "pt"})
    write_model(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "a.gguf", weight_types("Q8_0"))
    assert json.loads(open_checkpoint(tmp_path / "a.gguf").metadata[METADATA_KEY]) == said
    model = open_model(ModelFiles(tmp_path / "a.gguf"))
    assert (model.size, model.scale, model["diffusion"].config["attention_head_dim"]) == ((128, 128), 0.5, 4)


def test_what_a_directory_says_goes_along(maker: ModuleType, tiny_weights: dict[str, Any], tmp_path: Path) -> None:
    maker.write_diffusers(tmp_path / "model", tiny_weights)
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 32, "attention_head_dim": 2}))
    write_model(open_checkpoint(tmp_path / "model"), tmp_path / "a.gguf", weight_types("F16"))
    ours, theirs = open_model(ModelFiles(tmp_path / "a.gguf")), open_model(ModelFiles(tmp_path / "model"))
    assert [c.config for c in ours.components.values()] == [c.config for c in theirs.components.values()]
    assert (ours.size, ours.scale) == ((256, 256), theirs.scale)


def test_only_what_belongs_to_the_model(tiny_weights: dict[str, Any], tmp_path: Path) -> None:
    weights = only_text(tiny_weights)
    save_file(weights | {"model_ema.decay": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert write_model(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "a.gguf") == ["model_ema.decay"]
    assert open_checkpoint(tmp_path / "a.gguf").tensors.keys() == weights.keys()


def changed(weights: dict[str, Any], value: float) -> dict[str, Any]:
    name = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    weight = weights[name].float()
    weight[3, 5] = value
    return weights | {name: weight}


@pytest.mark.parametrize(
    ("weights", "wanted", "reason"),
    [
        (lambda text: changed(text, 1e6), "F16", r"fc1\.weight.*from F32 into F16"),
        (lambda text: changed(text, float("nan")), "Q8_0", r"fc1\.weight.*from F32 into Q8_0"),
        (lambda text: changed(text, float("inf")), "Q4_0", r"fc1\.weight.*from F32 into Q4_0"),
        (lambda text: text | {"x": torch.zeros(4, dtype=torch.uint8)}, "F16", "'x'.*U8"),
        (lambda _: {"x": torch.zeros(4)}, "F16", "no component"),
    ],
    ids=["large", "nan", "inf", "bytes", "nothing"],
)
def test_what_cannot_be_converted(
    weights: Any, wanted: str, reason: str, tiny_weights: dict[str, Any], tmp_path: Path
) -> None:
    save_file(weights(only_text(tiny_weights)), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        write_model(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "a.gguf", weight_types(wanted))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_types_that_the_library_cannot_read(tmp_path: Path) -> None:
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    weight = Weight(name, TYPES["Q8_1"], (1, 32), View(memoryview(bytes(36))))
    with pytest.raises(CheckpointError, match="Q8_1 can't be unpacked"):
        write_model(Checkpoint(Path("a.gguf"), {name: weight}), tmp_path / "b.gguf", weight_types("F16"))


def test_types_by_name() -> None:
    assert weight_types("q8_0") == weight_types("Q8_0") == WeightTypes(TYPES["Q8_0"])
    with pytest.raises(UsageError, match=r"type q4_K.*q8_0"):
        weight_types("q4_K")


def test_progress_counts_the_bytes_of_tensors(tiny_weights: dict[str, Any], tmp_path: Path) -> None:
    save_file(only_text(tiny_weights), tmp_path / "a.safetensors")
    seen: list[tuple[int, int]] = []
    write_model(
        open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "a.gguf", AS_STORED, lambda *now: seen.append(now)
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(w.nbytes for w in only_text(tiny_weights).values())


@pytest.mark.parametrize(
    ("family", "form", "kind", "part", "suffix"),
    [
        ("wan", "safetensors", "F16", "model", ".gguf"),
        ("ltx-video", "parts", "F16", "vae", ".gguf"),
        ("z-image", "safetensors", "comfy-nvfp4", "model", ".safetensors"),
        ("flux1-dev", "gguf-parts", "mixed", "t5xxl", ".gguf"),
    ],
)
def test_other_families_and_parts_of_them(
    family: str, form: str, kind: str, part: str, suffix: str, tmp_path: Path
) -> None:
    """What is read of the new file are the same numbers under the same names: as stored, or in F16."""
    source = open_checkpoint(make(family, tmp_path / "made", form=form, type=kind).files[part])
    write_model(source, tmp_path / f"a{suffix}")
    made = open_checkpoint(tmp_path / f"a{suffix}")
    taken = [find(component, source) for family in FAMILIES for component in family.components]
    assert made.tensors.keys() <= source.tensors.keys()
    assert len(made.tensors) >= max(len({w.name for w in found.tensors.values()}) for found in taken if found)
    for name, after in made.tensors.items():
        before = source.tensors[name]
        held = before.type if before.type.name in HOLDS[suffix] else unpacked(before.type)
        assert (after.type, after.shape) == (held, before.shape)
        assert after.data() == cast(before, held).data()


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
@pytest.mark.parametrize(
    ("family", "form", "part"),
    [
        ("lumina2", "gguf-parts", "llm"),
        ("lumina2", "parts", "llm"),
        ("lumina2", "safetensors", "model"),
        ("lumina2", "diffusers", "model"),
        ("pixart-alpha", "safetensors", "model"),
        ("pixart-sigma", "diffusers", "model"),
        ("sana", "diffusers", "model"),
        ("sana-1.5", "parts", "vae"),
    ],
)
def test_what_a_picture_is_made_of(family: str, form: str, part: str, suffix: str, tmp_path: Path) -> None:
    """The model of the new file is the old one's: its arguments, its weights under their names, and its tokens."""
    files = make(family, tmp_path / "made", form=form).files
    files = {"diffusion_model" if name == "diffusion" else name: path for name, path in files.items()}
    before = open_model(ModelFiles(**files))
    write_model(open_checkpoint(files[part]), tmp_path / f"a{suffix}")
    after = open_model(ModelFiles(**files | {part: tmp_path / f"a{suffix}"}))
    assert (after.family, after.defaults, after.scale) == (before.family, before.defaults, before.scale)
    for name, component in before.components.items():
        assert after[name].config == component.config
        assert after[name].found.tensors.keys() == component.found.tensors.keys()
        for key, weight in component.found.tensors.items():
            assert (after[name].found.tensors[key].shape, bytes(after[name].found.tensors[key].data())) == (
                weight.shape,
                bytes(weight.data()),
            )
    if family == "lumina2":
        theirs, ours = before["llm"].tokenizer, after["llm"].tokenizer
        assert theirs is not None
        assert ours is not None
        assert ours.get_vocab() == theirs.get_vocab()
        text = "<bos>A  lovely cat\n\nin 3 styles, \U0001f408"
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids


def test_a_vocabulary_keeps_its_form(tmp_path: Path) -> None:
    """As others read it: entries of GGUF with their types, ComfyUI's tensors with their names."""
    stored = make("lumina2", tmp_path / "gguf", form="gguf-parts").files["llm"]
    write_model(open_checkpoint(stored), tmp_path / "a.gguf")
    theirs, ours = GGUFReader(stored).fields, GGUFReader(tmp_path / "a.gguf").fields
    keys = [key for key in theirs if key.startswith("tokenizer.")]
    assert "tokenizer.ggml.add_space_prefix" in keys
    for key in keys:
        assert (ours[key].types, ours[key].contents()) == (theirs[key].types, theirs[key].contents())
    whole = make("lumina2", tmp_path / "whole").files["model"]
    write_model(open_checkpoint(whole), tmp_path / "a.safetensors")
    name = "text_encoders.gemma2_2b.spiece_model"
    assert load_file(tmp_path / "a.safetensors")[name].equal(load_file(whole)[name])


def test_a_vocabulary_that_is_only_kept(tmp_path: Path) -> None:
    """Mistral's in ComfyUI's files: sdrpc has its own, other programs have not."""
    whole = make("lumina2", tmp_path / "whole").files["model"]
    tensors = load_file(whole)
    tensors |= {"text_encoders.x.tekken_model": torch.arange(9, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert write_model(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "b.safetensors") == []
    made = load_file(tmp_path / "b.safetensors")
    assert made["text_encoders.x.tekken_model"].equal(tensors["text_encoders.x.tekken_model"])


@pytest.mark.parametrize("text", [b"{", b"\xff", b"{}", b"[" * 100_000])
def test_a_vocabulary_that_is_none(text: bytes, tmp_path: Path) -> None:
    files = make("lumina2", tmp_path / "made", form="parts").files
    tensors = load_file(files["llm"])
    del tensors["spiece_model"]
    save_file(tensors | {"tokenizer_json": torch.tensor(list(text), dtype=torch.uint8)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: its tokenizer can't be read"):
        write_model(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_rules_go_before_the_type() -> None:
    types = weight_types("q8_0", r"^vae\.=f16,embedding=q4_0,k\.weight=f32")
    weight = Weight("first_stage_model.conv_in.weight", F32, (8, 64), View(memoryview(b"")))
    assert types.of(weight).name == "Q8_0"
    assert types.of(weight, *names_of(weight, "vae", ("first_stage_model.",))).name == "F16"
    assert types.of(replace(weight, name="token_embedding.weight")).name == "Q4_0"
    assert types.of(replace(weight, name="to_k.weight"), "vae.to_k.weight").name == "F16"
    assert types.of(replace(weight, name="to_k.weight")).name == "F32"
    assert types.of(replace(weight, shape=(64,))).name == "F32"


def test_a_model_that_is_made_into_another_type_while_it_is_read(tiny: Path) -> None:
    """What is sent is what convert would have written."""
    plain, small = open_model(ModelFiles(tiny)), open_model(ModelFiles(tiny, types=weight_types("q8_0", "vae=bf16")))
    kinds = {
        name: {weight.type.name for weight in component.found.tensors.values()}
        for name, component in small.components.items()
    }
    assert kinds == {"clip_l": {"F16", "I64", "Q8_0"}, "diffusion": {"F16", "Q8_0"}, "vae": {"F16", "BF16"}}
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    before, after = plain["diffusion"].found.tensors[name], small["diffusion"].found.tensors[name]
    assert bytes(after.data()) == quantize(numbers(before), GGMLQuantizationType.Q8_0).tobytes()
