"""Stable Diffusion 3: what shapes tell, what the model is told about a prompt, what may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint
from sdrpc.errors import CheckpointError, InvalidValue, MissingComponent
from sdrpc.families.base import F32, Config, Found, Prompt, find
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.sd3 import SD3, conditions
from sdrpc.ggml.types import F16
from sdrpc.ggml.weight import Weight
from sdrpc.lowering.capture import without_weights
from tools.checkpoints import FAMILIES, make
from tools.checkpoints.families import saved_tensors

SIZES = {"clip_l": 3, "clip_g": 4, "t5xxl": 12}
WIDTH = 12
LAYERS = 5


class Encoders:
    """Stands for text encoders: hidden states that depend on the token, the encoder and the layer alone."""

    def __init__(self, *components: str) -> None:
        self.components = components

    def __call__(self, component: str, inputs: Mapping[str, NDArray[Any]], **options: Any) -> tuple[F32, ...]:
        hidden = states(component, inputs["ids"][0], options.get("skip", 1))[None]
        pooled = {"pooled": hidden[:, 0] + 1, "projected": hidden[:, 0] + 2}
        return tuple(pooled.get(name, hidden) for name in options.get("outputs", ["hidden"]))

    def config(self, component: str) -> Config:
        return {
            "clip_l": {"max_position_embeddings": 77, "num_hidden_layers": LAYERS},
            "clip_g": {"num_hidden_layers": LAYERS},
            "diffusion": {"joint_attention_dim": WIDTH, "pos_embed_max_size": 8, "patch_size": 2},
            "vae": {"block_out_channels": [1, 1, 1, 1]},
        }[component]

    def tokenizer(self, component: str) -> None:
        return None

    def has(self, component: str) -> bool:
        return component in self.components


def states(component: str, ids: NDArray[np.int32], skip: int = 1) -> F32:
    channels = np.arange(1, 1 + SIZES[component])
    return np.sin(ids[:, None] * 0.1 * channels + skip).astype(np.float32) + 2


def asked(text: str, **changes: Any) -> Prompt:
    return Prompt(text, 128, 64, -1, 3.5)._replace(**changes)


EVERY = tuple(SIZES)


def test_encoders_side_by_side_and_behind_each_other() -> None:
    told = conditions(Encoders(*EVERY), asked("cat"))
    context = told["context"]
    assert context.shape == (1, 154, WIDTH)
    start, cat, end = 49406, 2368, 49407
    first = np.array([start, cat, end] + [end] * 74, np.int32)
    second = np.array([start, cat, end] + [0] * 74, np.int32)
    np.testing.assert_allclose(context[0, :77, :3], states("clip_l", first, 2), rtol=1e-6)
    np.testing.assert_allclose(context[0, :77, 3:7], states("clip_g", second, 2), rtol=1e-6)
    assert not context[0, :77, 7:].any()
    third = np.array([1712, 1] + [0] * 75, np.int32)
    np.testing.assert_allclose(context[0, 77:], states("t5xxl", third), rtol=1e-6)
    pooled = np.concatenate([states("clip_l", first, 2)[0] + 1, states("clip_g", second, 2)[0] + 2])
    np.testing.assert_allclose(told["pooled"], pooled[None], rtol=1e-6)


def test_without_t5_its_tokens_are_zeros() -> None:
    whole = conditions(Encoders(*EVERY), asked("a (lovely:1.3) cat"))
    without = conditions(Encoders("clip_l", "clip_g"), asked("a (lovely:1.3) cat"))
    assert np.array_equal(without["context"][:, :77], whole["context"][:, :77])
    assert without["context"].shape == whole["context"].shape
    assert not without["context"][:, 77:].any()
    assert np.array_equal(without["pooled"], whole["pooled"])


def test_weights_count_and_the_layer_counts() -> None:
    plain, heavy, skipped = (
        conditions(Encoders(*EVERY), prompt)["context"]
        for prompt in (asked("a cat"), asked("a (cat:1.5)"), asked("a cat", clip_skip=3))
    )
    assert (np.abs(heavy - plain)[0, [2, 77]] > 0.01).any()
    assert np.array_equal(skipped[:, 77:], plain[:, 77:]), "T5 has no clip_skip"
    assert (np.abs(skipped - plain)[0, :77, :7] > 0.01).any(axis=0).all()


@pytest.mark.parametrize(("words", "chunks"), [(70, 1), (76, 2), (160, 3)])
def test_long_prompts_have_a_pair_of_parts_for_each_chunk(words: int, chunks: int) -> None:
    """A cat is one token to CLIP (75 in a chunk) and to T5 (76); with 76 of them CLIP alone needs a second chunk."""
    context = conditions(Encoders(*EVERY), asked(" ".join(["cat"] * words)))["context"]
    texts = -(-words // 76)
    assert context.shape[1] == 77 * (chunks + texts)
    is_clip = [not context[0, 77 * n : 77 * n + 77, 7:].any() for n in range(chunks + texts)]
    assert is_clip == [n % 2 == 0 for n in range(2 * texts)] + [True] * (chunks - texts)


@pytest.mark.parametrize(("side", "allowed"), [(128, True), (144, False)])
@pytest.mark.parametrize("field", ["width", "height"])
def test_pictures_larger_than_the_table_of_positions(field: str, side: int, allowed: bool) -> None:
    prompt = asked("cat", **{field: side})
    if allowed:
        assert conditions(Encoders(*EVERY), prompt)
        return
    with pytest.raises(InvalidValue, match=f"{field}.*128 pixels"):
        conditions(Encoders(*EVERY), prompt)


def no_bytes(*_: Any) -> Any:
    pytest.fail("names and shapes are enough")


def full_size(family: str) -> Found:
    """The diffusion model of the published size."""
    diffusion = FAMILIES[family].of_size("full")[0]
    shapes = diffusion.shapes()
    entries = {entry.name: Weight(entry.name, F16, entry.shape(shapes), no_bytes) for entry in diffusion.whole(shapes)}
    found = find(SD3.diffusion, Checkpoint(Path("sd3.safetensors"), entries))
    assert found is not None
    return found


@pytest.mark.parametrize("family", ["sd3", "sd3.5-medium", "sd3.5-large"])
def test_published_sizes_are_told_by_shapes(family: str) -> None:
    found = full_size(family)
    assert SD3.recognizes(found)
    with torch.device("meta"):
        theirs = FAMILIES[family].of_size("full")[0].build()
    config = SD3.diffusion.configure(found, {})
    assert {name: theirs.config[name] for name in config} == config | {
        "dual_attention_layers": tuple(config["dual_attention_layers"])
    }
    with without_weights():
        ours, _ = SD3.diffusion.build(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in saved_tensors(theirs).items()}
    assert {name: tuple(tensor.shape) for name, tensor in saved_tensors(ours).items()} == wanted
    assert found.take(wanted).keys() == wanted.keys()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = dict(make("sd3", tmp_path_factory.mktemp("sd3"), form="parts").files)
    return files | {"diffusion_model": files.pop("diffusion")}


def test_t5_alone_may_be_left_out(parts: dict[str, Path]) -> None:
    assert "t5xxl" in open_model(ModelFiles(**parts)).components
    without = {name: path for name, path in parts.items() if name != "t5xxl"}
    assert list(open_model(ModelFiles(**without)).components) == ["clip_l", "clip_g", "diffusion", "vae"]
    for name in ("clip_l", "clip_g", "vae"):
        with pytest.raises(MissingComponent):
            open_model(ModelFiles(**{other: path for other, path in parts.items() if other != name}))


def test_a_file_that_was_named_for_t5_has_to_have_it(parts: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no T5-XXL"):
        open_model(ModelFiles(**parts | {"t5xxl": parts["vae"]}))


def test_parts_of_other_models_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    """FLUX.1's tiny T5 is narrower."""
    other = make("flux1-schnell", tmp_path, form="parts").files["t5xxl"]
    with pytest.raises(CheckpointError, match="t5xxl gives 64 channels, but diffusion takes 256"):
        open_model(ModelFiles(**parts | {"t5xxl": other}))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pos_embed", (1, 575, 128), "not a square"),
        ("pos_embed", (1, 576, 100), "not a square"),
        ("context_embedder.weight", (64, 256), "text has a width of 64"),
        ("x_embedder.proj.weight", (128, 16, 2), "dimensions"),
        ("final_layer.linear.weight", (32, 128), "diffusion gives 8 channels, but vae takes 16"),
        ("y_embedder.mlp.0.weight", (128, 100), "gives 192 channels of pooled text, but diffusion takes 100"),
    ],
)
def test_tensors_of_other_shapes_are_refused(
    name: str, shape: tuple[int, ...], message: str, parts: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(parts["diffusion_model"])
    assert name in tensors
    save_file(tensors | {name: torch.zeros(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_model(ModelFiles(**parts | {"diffusion_model": tmp_path / "a.safetensors"}))
