"""Krea 2: what shapes and names tell, what the model is told about a prompt, and what of other models is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.errors import CheckpointError, InvalidValue
from sdrpc.families.base import F32, Config, Found, Prompt, find
from sdrpc.families.components.qwen3_vl import QWEN3_VL
from sdrpc.families.krea2 import STATES, TRANSFORMER, conditions, recognizes
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight
from sdrpc.prompts import qwen_tokenizer
from tools.checkpoints import FAMILIES, Made, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("krea2", tmp_path_factory.mktemp("krea2"), form="parts")


def opened(files: dict[str, Path], **others: Path) -> Any:
    files = files | others
    return open_model(ModelFiles(diffusion_model=files["diffusion"], vae=files["vae"], llm=files["llm"]))


def full(name: str, component: Any) -> Found:
    """A component of full size in its own file, as names and shapes."""
    part = next(c for c in FAMILIES["krea2"].of_size("full") if c.name == name)
    shapes = part.shapes()
    entries = {entry.name: entry.shape(shapes) for entry in part.alone(shapes)}
    weights = {entry: Weight(entry, F16, shape, lambda *_: ()) for entry, shape in entries.items()}
    found = find(component, Checkpoint(Path("m"), weights))
    assert found is not None
    return found


def test_the_published_model_is_told_by_its_shapes() -> None:
    found = full("diffusion", TRANSFORMER)
    assert recognizes(found)
    config = TRANSFORMER.configure(found, {})
    with torch.device("meta"):
        module, _ = TRANSFORMER.build(config)
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == found.shapes
    assert {key: module.config[key] for key in config} == config | {"axes_dims_rope": [32, 48, 48]}
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["num_layers"]) == (48, 12, 28)


def test_names_become_those_of_diffusers_own_conversion(made: Made) -> None:
    theirs = convert_krea2_transformer_checkpoint_to_diffusers(load_file(made.files["diffusion"]))
    found = find(TRANSFORMER, opened(made.files)["diffusion"].found.checkpoint)
    assert found is not None
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == found.shapes


def test_what_reads_the_text_has_its_own_base_of_positions() -> None:
    config = QWEN3_VL.configure(full("llm", QWEN3_VL), {})
    assert (config["rope_theta"], config["hidden_size"], config["num_hidden_layers"]) == (5e6, 2560, 36)
    told = {"text_config": {"rope_theta": 1000000, "rms_norm_eps": 1e-5}}
    assert QWEN3_VL.configure(full("llm", QWEN3_VL), told)["rope_theta"] == 1e6


class Encoder:
    """Stands for Qwen3-VL: hidden states that are the tokens' numbers."""

    pictures: tuple[F32, ...] = ()

    def __call__(self, component: str, inputs: Any, **options: Any) -> tuple[F32, ...]:
        assert options == {"states": list(STATES)}
        return (np.repeat(inputs["ids"][..., None], 4, axis=2).astype(np.float32),)

    def config(self, component: str) -> Config:
        return {"vocab_size": 151936}

    def tokenizer(self, component: str) -> None:
        return None

    def has(self, component: str) -> bool:
        raise AssertionError


def test_the_template_before_a_text_is_left_out() -> None:
    told = conditions(Encoder(), Prompt("a lovely cat", 64, 64, -1, 3.5))["context"][0, :, 0].tolist()
    after = "a lovely cat<|im_end|>\n<|im_start|>assistant\n"
    assert told == qwen_tokenizer().encode(after, add_special_tokens=False).ids
    with pytest.raises(InvalidValue, match="has 605 tokens with the end of its template; Krea 2 reads 512"):
        conditions(Encoder(), Prompt("cat" + " cat" * 599, 64, 64, -1, 3.5))


def test_parts_that_do_not_belong_are_refused(made: Made, tmp_path: Path) -> None:
    tensors = load_file(made.files["diffusion"])
    for name, shape, reason in (
        ("txtfusion.projector.weight", (1, 7), "diffusion gives 7 layers of text, but llm takes 12"),
        ("blocks.0.attn.qknorm.qnorm.scale", (31,), "with heads of 31 and 32 make no sense"),
        ("blocks.0.mlp.gate.weight", (96,), "is \\[96\\], not of 2 dimensions"),
    ):
        save_file(tensors | {name: torch.zeros(shape)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=reason):
            opened(made.files, diffusion=tmp_path / "other.safetensors")


def test_turbo_is_meant_unless_a_directory_says_otherwise(made: Made) -> None:
    model = opened(made.files)
    said = model.defaults
    assert (model.size, said.steps, said.cfg_scale, said.flow_shift) == ((1024, 1024), 8, 1.0, 1.15)
