"""Z-Image: where its texts end, what it is told, and which files make one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from sdrpc.errors import CheckpointError, InvalidValue, MissingComponent
from sdrpc.families import zimage
from sdrpc.families.base import F32, Config, Prompt
from sdrpc.families.components.llm import LENGTHS
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.prompts import llm_tokens, qwen_tokenizer
from tools.checkpoints import Made, make

WIDTH = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("z-image", tmp_path_factory.mktemp("zimage"), form="parts", type="BF16")


def files(made: Made, **changes: Path) -> ModelFiles:
    paths = {"diffusion_model" if name == "diffusion" else name: path for name, path in made.files.items()}
    return ModelFiles(**{**paths, **changes})


class Encoder:
    """Stands for Qwen3: hidden states that depend on token and place alone."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, component: str, inputs: dict[str, NDArray[Any]], **options: Any) -> tuple[F32, ...]:
        assert (component, options) == ("llm", {"states": [35]})
        self.lengths.append(inputs["ids"].shape[1])
        return (hidden(inputs["ids"]),)

    def config(self, component: str) -> Config:
        return {"num_hidden_layers": 36, "vocab_size": 151936}

    def tokenizer(self, component: str) -> None:
        return None

    def has(self, component: str) -> bool:
        return True


def hidden(ids: NDArray[np.int32]) -> F32:
    places = ids[..., None] + np.arange(ids.shape[1])[:, None]
    return np.sin(places * np.arange(1, 1 + WIDTH)).astype(np.float32) + 2


def asked(text: str) -> Prompt:
    return Prompt(text, 64, 64, -1, 3.5)


@pytest.mark.parametrize("words", [1, 22, 24, 25, 26, 60, 500])
def test_texts_are_filled_up(words: int) -> None:
    encoder = Encoder()
    told = zimage.conditions(encoder, asked("cat " * words))
    ids = llm_tokens("cat " * words, zimage.TEMPLATE, qwen_tokenizer()).ids
    length = ids.shape[1]
    assert encoder.lengths == [-(-length // LENGTHS) * LENGTHS]
    assert told["context"].shape[1] == told["padding"].shape[1] == -(-length // 32) * 32
    assert np.array_equal(told["context"][:, :length], hidden(ids))
    assert not told["context"][:, length:].any()
    assert np.array_equal(told["padding"][0], np.arange(told["padding"].shape[1]) >= length)


def test_a_text_beyond_the_positions_is_refused() -> None:
    with pytest.raises(InvalidValue, match="has positions for 1504") as caught:
        zimage.conditions(Encoder(), asked("cat " * 1500))
    assert caught.value.field == "prompt"


def test_texts_of_different_lengths_in_one_batch_are_what_the_module_makes_of_them(made: Made) -> None:
    config = open_model(files(made))["diffusion"].config
    theirs = made.component("diffusion")
    ours, call = zimage.build(config)
    ours.load_state_dict(theirs.state_dict())
    rng = torch.Generator().manual_seed(5)
    latents, context = torch.randn(2, 16, 6, 10, generator=rng), torch.randn(2, 64, 64, generator=rng)
    lengths = (33, 60)
    padding = (torch.arange(64)[None] >= torch.tensor(lengths)[:, None]).float()
    with torch.no_grad():
        (mine,) = call(ours.eval(), latents, torch.tensor([700.0]), context, padding)
        texts = [text[:length] for text, length in zip(context, lengths, strict=True)]
        wanted = theirs(list(latents[:, :, None]), torch.full((2,), 0.3), texts, return_dict=False)[0]
    wanted = -torch.stack(wanted)[:, :, 0]
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_what_a_request_means(made: Made, tmp_path: Path) -> None:
    turbo = open_model(files(made)).defaults
    assert (turbo.steps, turbo.cfg_scale, turbo.flow_shift, turbo.sampler) == (8, 1.0, 3.0, "euler")
    folder = make("z-image", tmp_path, form="diffusers", type="BF16").files["model"]
    assert open_model(ModelFiles(folder)).defaults == turbo
    said = folder / "scheduler" / "scheduler_config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"shift": 6.0}))
    base = open_model(ModelFiles(folder)).defaults
    assert (base.steps, base.cfg_scale, base.flow_shift) == (50, 5.0, 6.0)


def test_its_text_encoder_is_qwen3_of_its_width(made: Made, tmp_path: Path) -> None:
    with pytest.raises(MissingComponent, match="no Qwen3 text encoder, which Z-Image needs"):
        open_model(ModelFiles(diffusion_model=made.files["diffusion"], vae=made.files["vae"]))
    with pytest.raises(CheckpointError, match="has no Qwen3 text encoder, which Z-Image needs; what it has: VAE"):
        open_model(files(made, llm=made.files["vae"]))
    weights = load_file(made.files["llm"])
    wide = {name: weight.repeat(1, 2) if weight.ndim == 2 else weight for name, weight in weights.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="llm gives 128 channels, but diffusion takes 64"):
        open_model(files(made, llm=tmp_path / "wide.safetensors"))
    weights["model.layers.0.self_attn.q_proj.weight"] = weights["model.layers.0.self_attn.q_proj.weight"][:100]
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="has 100 queries and 64 keys, which are no heads of 32"):
        open_model(files(made, llm=tmp_path / "odd.safetensors"))


def gguf(made: Made, path: Path, architecture: str, **said: float | str) -> Path:
    """The text encoder as a GGUF file of llama.cpp's that says this of itself."""
    writer = GGUFWriter(path, architecture)
    writer.add_uint32(f"{architecture}.block_count", 3)
    for key, value in said.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_float32(name, value)
    entries = next(filed for filed in made.filed if filed.component.name == "llm")
    shapes = entries.component.shapes()
    from tools.checkpoints.names import llama_cpp_qwen3

    for entry in llama_cpp_qwen3(shapes):
        writer.add_tensor(entry.name, np.zeros(entry.shape(shapes), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGUFReader(path).tensors
    return path


def test_what_a_gguf_file_says_of_its_positions_counts(made: Made, tmp_path: Path) -> None:
    """Qwen3-4B-Instruct-2507 differs in this number alone from Qwen3-4B."""
    path = gguf(made, tmp_path / "a.gguf", "qwen3", rope__freq_base=5e6, attention__layer_norm_rms_epsilon=1e-6)
    config = open_model(files(made, llm=path))["llm"].config
    assert (config["rope_theta"], config["rms_norm_eps"]) == (5e6, 1e-6)


@pytest.mark.parametrize(
    ("architecture", "said", "reason"),
    [
        ("qwen3vl", {}, "is a model of architecture 'qwen3vl', not a Qwen3 text encoder"),
        ("qwen3", {"rope__freq_base": "many"}, "'many' in the metadata is no number"),
        ("qwen3", {"rope__freq_base": float("nan")}, "'nan' in the metadata is no number"),
        ("qwen3", {"rope__freq_base": -1.0}, "rope_theta of the Qwen3 text encoder can't be -1.0"),
    ],
)
def test_a_gguf_file_that_is_refused(
    architecture: str, said: dict[str, Any], reason: str, made: Made, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_model(files(made, llm=gguf(made, tmp_path / "a.gguf", architecture, **said)))
