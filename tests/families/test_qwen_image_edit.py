"""Qwen-Image-Edit: what Qwen2.5-VL sees of pictures, where that stands among words, and in which files its part is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from sdrpc.checkpoints.expressions import whole_array
from sdrpc.diffusion.drawable import settings_of
from sdrpc.diffusion.pictures import from_pixels
from sdrpc.diffusion.request import Request
from sdrpc.errors import CheckpointError, InvalidValue, MissingComponent
from sdrpc.families.base import F32, Config, Prompt
from sdrpc.families.components.qwen25_vision import BEHIND, IMAGE, Seen, build, positions, processed_size
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.families.qwen_image import EDITING, HIDDEN_EDITING, ZERO_TIMESTEP, conditions, drawn_size, seen_size
from sdrpc.prompts import qwen_tokenizer
from tools.checkpoints import Made, make
from tools.checkpoints.tokenizers import QwenProcessor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("qwen-image-edit", tmp_path_factory.mktemp("edit"), form="parts")


def opened(files: dict[str, Path], **others: Path) -> Any:
    files = files | others
    files["diffusion_model"] = files.pop("diffusion")
    return open_model(ModelFiles(**files))


@pytest.mark.parametrize("shape", [(512, 512), (1920, 1080), (3, 4000), (4000, 3), (17, 1), (672, 224)])
def test_sizes_are_those_of_diffusers_and_transformers(shape: tuple[int, int]) -> None:
    width, height = shape
    assert drawn_size(*shape) == tuple(max(32, side) for side in calculate_dimensions(1024**2, width / height))
    seen = tuple(max(32, side) for side in calculate_dimensions(384**2, width / height))
    rows, columns = smart_resize(*seen[::-1], 28, 56 * 56, 28 * 28 * 1280) if max(seen) < 200 * min(seen) else (0, 0)
    assert not rows or seen_size(*shape) == (columns, rows)
    assert processed_size(20, 20) == (56, 56)


def test_what_is_seen_is_that_of_transformers() -> None:
    """With blocks that attend within windows, and one that attends to the whole picture."""
    config = VISION_CONFIG | {"depth": 2, "fullatt_block_indexes": [1]}
    module, call = build(config)
    pixels = np.random.default_rng(1).integers(0, 256, (112, 168, 3)).astype(np.uint8)
    told = QwenProcessor()([IMAGE], [Image.fromarray(pixels)])
    with torch.no_grad():
        (found,) = call(module.eval(), torch.from_numpy(from_pixels(pixels)))
        wanted = module(told["pixel_values"], told["image_grid_thw"]).pooler_output
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)


VISION_CONFIG: dict[str, Any] = {
    "depth": 1, "hidden_size": 80, "intermediate_size": 48, "num_heads": 1, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112, "out_hidden_size": 128,
    "fullatt_block_indexes": [],
}  # fmt: skip


def test_positions_are_those_of_transformers() -> None:
    ids = np.array([[5, 6, 7, 7, 7, 7, 7, 7, 8, 9, 7, 7, 7, 7, 1, 2, 3]])
    seen = [Seen(np.zeros((count, 4), np.float32), *shape) for count, shape in ((6, (2, 3)), (4, (4, 1)))]
    with torch.device("meta"):
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=SMALL, vision_config={"depth": 1}))
    kinds = torch.from_numpy((ids == 7).astype(np.int32))
    grids = torch.tensor([[1, 2 * each.rows, 2 * each.columns] for each in seen])
    wanted, _ = model.get_rope_index(torch.from_numpy(ids), image_grid_thw=grids, mm_token_type_ids=kinds)
    assert positions(17, np.flatnonzero(ids[0] == 7), seen).tolist() == wanted.tolist()


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 1, "vocab_size": 9}


class Encoder:
    """Stands for Qwen2.5-VL: hidden states that are the tokens' numbers, and those of pictures' tokens."""

    pictures: tuple[F32, ...] = (np.zeros((1, 3, 56, 84), np.float32), np.zeros((1, 3, 56, 56), np.float32))

    def __call__(self, component: str, inputs: Any, **options: Any) -> tuple[F32, ...]:
        if component == "llm_vision":
            _, _, height, width = inputs["picture"].shape
            count = height // 28 * width // 28
            return (np.arange(4 * count, dtype=np.float32).reshape(1, count, 4) - 1000,)
        assert inputs["positions"].shape == (3, *inputs["ids"].shape)
        return (inputs["ids"][..., None] * inputs["kept"] + inputs["added"],)

    def config(self, component: str) -> Config:
        return {"num_hidden_layers": 28, "vocab_size": 152064, "patch_size": 14}

    def tokenizer(self, component: str) -> None:
        return None

    def has(self, component: str) -> bool:
        raise AssertionError


def test_pictures_stand_before_the_text() -> None:
    """Also where the text itself names such tokens."""
    context = conditions(Encoder(), Prompt(f"a cat {IMAGE}", 64, 64, -1, 3.5))["context"][0]
    text = f"Picture 1: <|vision_start|>{IMAGE * 6}{BEHIND}Picture 2: <|vision_start|>{IMAGE * 4}{BEHIND}a cat {IMAGE}"
    whole = qwen_tokenizer().encode(EDITING.before + text + EDITING.after, add_special_tokens=False).ids
    before = qwen_tokenizer().encode(EDITING.before, add_special_tokens=False).ids
    assert whole[:HIDDEN_EDITING] == before
    assert len(context) == len(whole) - HIDDEN_EDITING
    pad = qwen_tokenizer().token_to_id(IMAGE)
    here = np.flatnonzero(np.array(whole[HIDDEN_EDITING:]) == pad)
    assert (context[here[:10], 0] < 0).all()
    assert context[here[10], 0] == pad
    others = np.delete(np.arange(len(context)), here[:10])
    assert context[others, 1].tolist() == np.delete(whole[HIDDEN_EDITING:], here[:10]).tolist()


def in_llama_cpps_names(file: Path) -> dict[str, torch.Tensor]:
    """What its converter makes of the part that sees: queries, keys and values apart, patches frame by frame."""
    inner = {
        "merger.ln_q.": "v.post_ln.", "merger.mlp.": "mm.", "blocks.": "v.blk.", "attn.proj.": "attn_out.",
        "mlp.gate_proj.": "ffn_gate.", "mlp.up_proj.": "ffn_up.", "mlp.down_proj.": "ffn_down.", "norm1.": "ln1.",
        "norm2.": "ln2.",
    }  # fmt: skip
    found = {}
    for name, tensor in load_file(file).items():
        if not name.startswith("visual."):
            continue
        name = name.removeprefix("visual.")
        if name == "patch_embed.proj.weight":
            found |= {"v.patch_embd.weight": tensor[:, :, 0], "v.patch_embd.weight.1": tensor[:, :, 1]}
            continue
        for theirs, llama in inner.items():
            name = name.replace(theirs, llama)
        apart = {
            name.replace("attn.qkv", f"attn_{letter}"): part
            for letter, part in zip("qkv", tensor.chunk(3), strict=True)
        }
        found |= apart if "attn.qkv" in name else {name: tensor}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def test_llama_cpps_file_of_the_part_that_sees_is_read_as_the_same(made: Made, tmp_path: Path) -> None:
    save_file(in_llama_cpps_names(made.files["llm"]), tmp_path / "mmproj.safetensors")
    usual, other = opened(made.files), opened(made.files, llm_vision=tmp_path / "mmproj.safetensors")
    assert other["llm_vision"].config == usual["llm_vision"].config == VISION_CONFIG
    for name, weight in usual["llm_vision"].found.tensors.items():
        np.testing.assert_array_equal(whole_array(other["llm_vision"].found.tensors[name]), whole_array(weight))


def test_a_directory_has_the_part_that_sees_in_its_text_encoder(tmp_path: Path) -> None:
    folder = make("qwen-image-edit", tmp_path / "edit", form="sharded").files["model"]
    model = open_model(ModelFiles(folder))
    assert model["llm_vision"].config == VISION_CONFIG | {"fullatt_block_indexes": [7, 15, 23, 31]}
    assert model["diffusion"].config["zero_cond_t"] is True
    assert "merger.mlp.0.bias" in model["llm_vision"].found.tensors


def test_2511_is_told_by_its_marker_or_by_the_user(made: Made, tmp_path: Path) -> None:
    tensors = load_file(made.files["diffusion"])
    plain = tmp_path / "plain.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if name != ZERO_TIMESTEP}, plain)
    for file, said, wanted in ((made.files["diffusion"], False, True), (plain, False, False), (plain, True, True)):
        files = ModelFiles(
            diffusion_model=file, vae=made.files["vae"], llm=made.files["llm"], qwen_image_zero_cond_t=said
        )
        assert open_model(files)["diffusion"].config["zero_cond_t"] is wanted


def test_of_other_families_it_is_refused(tiny: Path) -> None:
    with pytest.raises(InvalidValue, match="is for Qwen-Image-Edit 2511; this is Stable Diffusion 1"):
        open_model(ModelFiles(tiny, qwen_image_zero_cond_t=True))


def test_a_request_with_pictures(made: Made, tmp_path: Path) -> None:
    """It has the last one's shape, and needs the part that sees: not every file of the language model has it."""
    shown = Request("a cat", ref_images=(np.zeros((10, 10, 3), np.uint8), np.zeros((300, 100, 3), np.uint8)))
    model = opened(made.files)
    settings = settings_of(model, shown)
    assert (settings.width, settings.height) == drawn_size(100, 300) == (576, 1760)
    assert settings_of(model, Request("a cat")).width == 1328
    blind = {n: tensor for n, tensor in load_file(made.files["llm"]).items() if not n.startswith("visual.")}
    save_file(blind, tmp_path / "blind.safetensors")
    without = opened(made.files, llm=tmp_path / "blind.safetensors")
    assert "llm_vision" not in without.components
    with pytest.raises(MissingComponent, match=r"no vision part of Qwen2\.5-VL, which Qwen-Image sees pictures with"):
        settings_of(without, shown)
    assert settings_of(without, Request("a cat")).width == 1328


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("merger.mlp.2.weight", (64, 320), "llm_vision gives 64 channels, but llm takes 128"),
        ("merger.mlp.2.weight", (128, 300), r"its width of 80 and patches of 3×14×14 are not Qwen2\.5-VL's"),
        ("patch_embed.proj.weight", (80, 3, 2, 5, 5), r"patches of 3×5×5 are not Qwen2\.5-VL's"),
        ("patch_embed.proj.weight", (80, 3), "is \\[80, 3\\], not of 5 dimensions"),
    ],
)
def test_a_part_that_sees_otherwise_is_refused(
    name: str, shape: tuple[int, ...], reason: str, made: Made, tmp_path: Path
) -> None:
    tensors = load_file(made.files["llm"]) | {f"visual.{name}": torch.zeros(shape)}
    save_file(tensors, tmp_path / "vision.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        opened(made.files, llm_vision=tmp_path / "vision.safetensors")
