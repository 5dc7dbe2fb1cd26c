"""Qwen-Image: what shapes and names tell, what the model is told about a prompt, and how guidance is tempered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.errors import CheckpointError, InvalidValue
from sdrpc.families.base import F32, Config, Found, Prompt, find
from sdrpc.families.components import qwen25
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.qwen_image import HIDDEN, TEMPLATE, TRANSFORMER, conditions, recognizes, tempered
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight
from sdrpc.prompts import qwen_tokenizer
from tools.checkpoints import FAMILIES, Made, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("qwen-image", tmp_path_factory.mktemp("qwen-image"), form="parts")


def opened(files: dict[str, Path], **others: Path) -> Any:
    files = files | others
    return open_model(ModelFiles(diffusion_model=files["diffusion"], vae=files["vae"], llm=files["llm"]))


def full(name: str) -> Checkpoint:
    """A component of full size in its own file: names and shapes."""
    component = next(c for c in FAMILIES["qwen-image"].of_size("full") if c.name == name)
    shapes = component.shapes()
    entries = {entry.name: entry.shape(shapes) for entry in component.alone(shapes)}
    return Checkpoint(Path("m"), {name: Weight(name, F16, shape, lambda *_: ()) for name, shape in entries.items()})


def found_in(component: Any, checkpoint: Checkpoint) -> Found:
    found = find(component, checkpoint)
    assert found is not None
    return found


def test_the_published_model_is_told_by_its_shapes() -> None:
    found = found_in(TRANSFORMER, full("diffusion"))
    assert recognizes(found)
    config = TRANSFORMER.configure(found, {})
    assert config == {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56], "zero_cond_t": False,
    }  # fmt: skip
    marked = {**full("diffusion").tensors, "__index_timestep_zero__": Weight("z", F16, (1,), lambda *_: ())}
    assert TRANSFORMER.configure(found_in(TRANSFORMER, Checkpoint(Path("m"), marked)), {})["zero_cond_t"] is True


@pytest.mark.parametrize("gguf", [False, True])
def test_qwen25_is_told_by_its_shapes_in_both_kinds_of_names(gguf: bool) -> None:
    checkpoint = full("llm")
    if gguf:
        checkpoint = in_llama_cpps_names(checkpoint)
    found = found_in(qwen25.QWEN25, checkpoint)
    config = qwen25.QWEN25.configure(found, {})
    assert config == {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    with torch.device("meta"):
        module, _ = qwen25.build(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert {name: found.shapes[name] for name in wanted} == wanted


def in_llama_cpps_names(checkpoint: Checkpoint) -> Checkpoint:
    inner = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    tensors = {}
    for name, weight in checkpoint.tensors.items():
        if name.startswith("visual."):
            continue
        for theirs, llama in inner.items():
            name = name.replace(theirs, llama)
        tensors[name] = weight
    said = {"general.architecture": "qwen2vl", "qwen2vl.block_count": "28", "qwen2vl.rope.freq_base": "1000000"}
    return Checkpoint(Path("m.gguf"), tensors, metadata=said)


class Encoder:
    """Stands for Qwen2.5-VL: hidden states that are the tokens' numbers."""

    pictures: tuple[F32, ...] = ()

    def __call__(self, component: str, inputs: Any, **options: Any) -> tuple[F32, ...]:
        assert component == "llm"
        return (np.repeat(inputs["ids"][..., None], 4, axis=2).astype(np.float32),)

    def config(self, component: str) -> Config:
        return {"num_hidden_layers": 28, "vocab_size": 152064}

    def tokenizer(self, component: str) -> None:
        return None

    def has(self, component: str) -> bool:
        raise AssertionError


def asked(text: str) -> Prompt:
    return Prompt(text, 64, 64, -1, 3.5)


@pytest.mark.parametrize("text", ["", "a lovely cat", "一只可爱的猫"])
def test_the_template_before_a_text_is_left_out(text: str) -> None:
    context = conditions(Encoder(), asked(text))["context"]
    whole = qwen_tokenizer().encode(TEMPLATE.before + text + TEMPLATE.after, add_special_tokens=False).ids
    assert qwen_tokenizer().encode(TEMPLATE.before, add_special_tokens=False).ids == whole[:HIDDEN]
    assert context[0, :, 0].tolist() == whole[HIDDEN:]


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(InvalidValue, match="has 1106 tokens with the end of its template; Qwen-Image reads 1024"):
        conditions(Encoder(), asked("cat " * 1100))


def test_guidance_is_tempered_as_by_diffusers_pipeline() -> None:
    rng = torch.Generator().manual_seed(3)
    negative, positive = torch.randn(2, 1, 16, 6, 10, generator=rng).double()
    guided = negative + 4 * (positive - negative)
    from diffusers import QwenImagePipeline as Pipeline

    tokens = [Pipeline._pack_latents(each, 1, 16, 6, 10) for each in (guided, positive)]
    norms = [torch.norm(each, dim=-1, keepdim=True) for each in tokens]
    wanted = Pipeline._unpack_latents(tokens[0] * (norms[1] / norms[0]), 48, 80, 8)[:, :, 0]
    found = tempered(guided.float().numpy(), positive.float().numpy())
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert np.isfinite(tempered(np.zeros((1, 16, 2, 2), np.float32), np.ones((1, 16, 2, 2), np.float32))).all()


def test_parts_of_other_models_are_refused(made: Made, tmp_path: Path) -> None:
    qwen3 = make("z-image", tmp_path / "z", form="parts").files["llm"]
    with pytest.raises(CheckpointError, match=r"has no Qwen2\.5-VL text encoder, which Qwen-Image needs"):
        opened(made.files, llm=qwen3)
    narrow = {"txt_in.weight": torch.zeros(96, 64), "txt_norm.weight": torch.zeros(64)}
    save_file(load_file(made.files["diffusion"]) | narrow, tmp_path / "o.safetensors")
    with pytest.raises(CheckpointError, match="llm gives 128 channels, but diffusion takes 64"):
        opened(made.files, diffusion=tmp_path / "o.safetensors")


def test_another_member_of_the_family_is_refused_by_name(made: Made, tmp_path: Path) -> None:
    layered = {"time_text_embed.addition_t_embedding.weight": torch.zeros(2)}
    save_file(load_file(made.files["diffusion"]) | layered, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="this is Qwen-Image-Layered; it is not supported"):
        opened(made.files, diffusion=tmp_path / "other.safetensors")


def test_what_a_request_means(made: Made) -> None:
    model = opened(made.files)
    assert (model.family.name, model.size, model.frames, model.latent_channels) == ("qwen-image", (1328, 1328), 0, 16)
    said = model.defaults
    assert (said.sampler, said.cfg_scale, said.prediction, said.flow_shift) == ("euler", 4.0, "sd3_flow", 3.0)
