"""Checkpoints as GGUF files: what is converted how, tensor by tensor, and what goes along."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from sdrpc.checkpoints.checkpoint import Checkpoint, open_checkpoint
from sdrpc.diffusion.convert import CONVERTIBLE, type_named, type_of, write_gguf
from sdrpc.errors import CheckpointError, UsageError
from sdrpc.families.configs import METADATA_KEY
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.ggml.types import F32, TYPES
from sdrpc.ggml.weight import View, Weight

ERROR = {
    "F32": 0, "F16": 0, "BF16": 1 / 256, "Q8_0": 1 / 200, "Q5_1": 1 / 25, "Q5_0": 1 / 15, "Q4_1": 1 / 12, "Q4_0": 1 / 7,
}  # fmt: skip
"""The largest error of a value of F16 over the largest of its block: half a step, and a little for the scale's F16."""


def numbers(weight: Weight) -> np.ndarray:
    """A tensor's values, F32, [rows, row]."""
    raw = np.frombuffer(weight.data(), np.uint8).reshape(-1, weight.type.row_bytes(weight.shape[-1]))
    return dequantize(raw, GGMLQuantizationType[weight.type.name])


def only_text(weights: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that is quickly converted: the text encoder, with fewer words."""
    prefix = "cond_stage_model.transformer.text_model."
    name = f"{prefix}embeddings.token_embedding.weight"
    return {n: w for n, w in weights.items() if n.startswith(prefix)} | {name: weights[name][:128].clone()}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_tensor_by_tensor(name: str, tiny: Path, tmp_path: Path) -> None:
    source, path = open_checkpoint(tiny), tmp_path / "model.gguf"
    assert write_gguf(source, path, TYPES[name]) == []
    made = open_checkpoint(path)
    assert list(made.tensors) == list(source.tensors)
    for before, after in zip(source.tensors.values(), made.tensors.values(), strict=True):
        assert (after.type, after.shape) == (type_of(before, TYPES[name]), before.shape)
        if after.type == before.type:
            assert bytes(after.data()) == bytes(before.data())
            continue
        theirs, ours = numbers(before), numbers(after)
        block = max(after.type.block, 1)
        largest = np.abs(theirs).reshape(-1, block).max(1).repeat(block).reshape(theirs.shape)
        assert (np.abs(ours - theirs) <= ERROR[name] * largest + 1e-7).all()
        assert bytes(after.data()) == quantize(theirs, GGMLQuantizationType[name]).tobytes()
    for tensor in GGUFReader(path).tensors:
        assert bytes(made.tensors[tensor.name].data()) == tensor.data.tobytes()


def test_a_model_is_the_same_one(tiny: Path, tmp_path: Path) -> None:
    write_gguf(open_checkpoint(tiny), tmp_path / "model.gguf")
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
    assert type_of(Weight(name, F32, shape, View(memoryview(b""))), TYPES[wanted]).name == given


def test_whole_numbers_stay() -> None:
    weight = Weight("position_ids", TYPES["I64"], (1, 77), View(memoryview(b"")))
    assert type_of(weight, TYPES["F16"]) == weight.type


def test_a_file_that_is_quantized_already(tiny: Path, tmp_path: Path) -> None:
    write_gguf(open_checkpoint(tiny), tmp_path / "small.gguf", TYPES["Q8_0"])
    small = open_checkpoint(tmp_path / "small.gguf")
    write_gguf(small, tmp_path / "large.gguf", TYPES["F32"])
    large = open_checkpoint(tmp_path / "large.gguf")
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.weight"
    assert large.tensors[name].type == F32
    np.testing.assert_array_equal(numbers(large.tensors[name]), numbers(small.tensors[name]))


def test_what_a_file_says_goes_along(tiny_weights: dict[str, Any], tmp_path: Path) -> None:
    said = {"unet": {"sample_size": 16, "attention_head_dim": 4}, "scaling_factor": 0.5, "more": "than we know"}
    save_file(tiny_weights, tmp_path / "a.safetensors", {METADATA_KEY: json.dumps(said), "format": "pt"})
    write_gguf(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "a.gguf", TYPES["Q8_0"])
    assert json.loads(open_checkpoint(tmp_path / "a.gguf").metadata[METADATA_KEY]) == said
    model = open_model(ModelFiles(tmp_path / "a.gguf"))
    assert (model.size, model.scale, model["diffusion"].config["attention_head_dim"]) == ((128, 128), 0.5, 4)


def test_what_a_directory_says_goes_along(maker: ModuleType, tiny_weights: dict[str, Any], tmp_path: Path) -> None:
    maker.write_diffusers(tmp_path / "model", tiny_weights)
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 32, "attention_head_dim": 2}))
    write_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "a.gguf", TYPES["F16"])
    ours, theirs = open_model(ModelFiles(tmp_path / "a.gguf")), open_model(ModelFiles(tmp_path / "model"))
    assert [c.config for c in ours.components.values()] == [c.config for c in theirs.components.values()]
    assert (ours.size, ours.scale) == ((256, 256), theirs.scale)


def test_only_what_belongs_to_the_model(tiny_weights: dict[str, Any], tmp_path: Path) -> None:
    weights = only_text(tiny_weights)
    save_file(weights | {"model_ema.decay": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert write_gguf(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "a.gguf") == ["model_ema.decay"]
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
        write_gguf(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "a.gguf", TYPES[wanted])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_types_that_the_library_cannot_read(tmp_path: Path) -> None:
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    weight = Weight(name, TYPES["Q8_1"], (1, 32), View(memoryview(bytes(36))))
    with pytest.raises(CheckpointError, match="from Q8_1 into F16"):
        write_gguf(Checkpoint(Path("a.gguf"), {name: weight}), tmp_path / "b.gguf", TYPES["F16"])


def test_types_by_name() -> None:
    assert type_named("q8_0") == type_named("Q8_0") == TYPES["Q8_0"]
    with pytest.raises(UsageError, match=r"type q4_K.*q8_0"):
        type_named("q4_K")


def test_progress_counts_the_bytes_of_tensors(tiny_weights: dict[str, Any], tmp_path: Path) -> None:
    save_file(only_text(tiny_weights), tmp_path / "a.safetensors")
    seen: list[tuple[int, int]] = []
    write_gguf(open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "a.gguf", None, lambda *now: seen.append(now))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(w.nbytes for w in only_text(tiny_weights).values())
