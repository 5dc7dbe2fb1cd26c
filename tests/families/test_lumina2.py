"""Lumina 2: what shapes and names tell, what the model is told about a prompt, and what of other models is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint, Tokenizer, open_checkpoint
from sdrpc.errors import CheckpointError, InvalidValue
from sdrpc.families.base import Found, Prompt, find
from sdrpc.families.components.gemma2 import GEMMA2
from sdrpc.families.lumina2 import SYSTEM, TRANSFORMER, conditions
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.registry import FAMILIES
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight
from tests.families.stands_for_gemma import Encoder
from tools.checkpoints import FAMILIES as CHECKPOINTS
from tools.checkpoints import Made, make
from tools.checkpoints.tokenizers import gemma_entries


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("lumina2", tmp_path_factory.mktemp("lumina2"), form="parts")


def opened(files: dict[str, Path], **others: Path) -> Any:
    files = files | others
    return open_model(ModelFiles(diffusion_model=files["diffusion"], vae=files["vae"], llm=files["llm"]))


def full(name: str, component: Any) -> Found:
    """A component of full size in its own file, as names and shapes."""
    part = next(c for c in CHECKPOINTS["lumina2"].of_size("full") if c.name == name)
    shapes = part.shapes()
    weights = {e.name: Weight(e.name, F16, e.shape(shapes), lambda *_: ()) for e in part.alone(shapes)}
    found = find(component, Checkpoint(Path("m"), weights, tokenizers={"": Tokenizer(entries=gemma_entries)}))
    assert found is not None
    return found


def test_the_published_model_is_told_by_its_shapes() -> None:
    found = full("diffusion", TRANSFORMER)
    seen = {each.name: find(each.diffusion, found.checkpoint) for each in FAMILIES}
    assert [each.name for each in FAMILIES if (one := seen[each.name]) and each.recognizes(one)] == ["lumina2"]
    config = TRANSFORMER.configure(found, {})
    assert (config["num_attention_heads"], config["num_kv_heads"], config["num_layers"]) == (24, 8, 26)
    with torch.device("meta"):
        module, _ = TRANSFORMER.build(config)
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == found.shapes
    theirs = convert_lumina2_to_diffusers({w.name: torch.empty(w.shape, device="meta") for w in _weights(found)})
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == found.shapes
    gemma = GEMMA2.configure(full("llm", GEMMA2), {})
    assert (gemma["num_attention_heads"], gemma["num_key_value_heads"], gemma["head_dim"]) == (8, 4, 256)


def _weights(found: Found) -> list[Weight]:
    return list(found.checkpoint.tensors.values())


def test_prompts_stand_behind_a_system_prompt_and_negative_ones_alone() -> None:
    encode = Encoder(25).tokenizer("llm").encode
    for negative, before in ((False, f"<bos>{SYSTEM} <Prompt Start> "), (True, "<bos>")):
        told = conditions(Encoder(25), Prompt("a cat", 64, 64, -1, 3.5, negative))
        length = int(told["seen"].sum())
        assert told["context"].shape[1] == told["seen"].shape[1] == length + -length % 64
        assert told["context"][0, :length, 0].tolist() == encode(f"{before}a cat", add_special_tokens=False).ids
        assert not told["context"][0, length:].any()
    with pytest.raises(InvalidValue, match="tokens with its template; Lumina 2 reads 256"):
        conditions(Encoder(25), Prompt("q" * 256, 64, 64, -1, 3.5))


def test_a_vocabulary_is_none_of_a_models_numbers(made: Made) -> None:
    model = opened(made.files)
    assert model["llm"].tokenizer.encode("a cat").ids == Encoder(25).tokenizer("llm").encode("a cat").ids
    assert "spiece_model" not in open_checkpoint(made.files["llm"]).skipped


def test_without_a_vocabulary_it_is_said_where_one_is(made: Made, tmp_path: Path) -> None:
    tensors = load_file(made.files["llm"])
    save_file({name: t for name, t in tensors.items() if name != "spiece_model"}, tmp_path / "gemma.safetensors")
    with pytest.raises(CheckpointError, match=r"brings no vocabulary.*ComfyUI's gemma_2_2b.*tokenizer\.json"):
        opened(made.files, llm=tmp_path / "gemma.safetensors")
    damaged = tensors | {"spiece_model": tensors["spiece_model"][:-3]}
    save_file(damaged, tmp_path / "gemma.safetensors")
    model = opened(made.files, llm=tmp_path / "gemma.safetensors")
    with pytest.raises(CheckpointError, match="its tokenizer can't be read"):
        _ = model["llm"].tokenizer


def test_parts_that_do_not_belong_are_refused(made: Made, tmp_path: Path) -> None:
    tensors = load_file(made.files["diffusion"])
    for name, shape, reason in (
        ("cap_embedder.0.weight", (48,), "llm gives 64 channels, but diffusion takes 48"),
        ("layers.0.attention.k_norm.weight", (7,), "heads of 7"),
        ("x_embedder.weight", (96, 32), "vae gives 16 channels, but diffusion takes 8"),
        ("layers.0.attention.qkv.weight", (97, 96), r"\[97, 96\] can't be split"),
        ("layers.0.attention.qkv.weight", (96,), "is no matrix"),
    ):
        other = tensors | {name: torch.zeros(shape)}
        if "k_norm" in name:
            other["layers.0.attention.q_norm.weight"] = torch.zeros(shape)
        save_file(other, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=reason):
            opened(made.files, diffusion=tmp_path / "other.safetensors")
