"""Which of a model's parameters a LoRA file changes, in whatever names; what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.deltas import Delta, LowRank, Product, merged, numbers
from sdrpc.checkpoints.expressions import cast
from sdrpc.errors import CheckpointError
from sdrpc.families.components import unet
from sdrpc.families.lora import Lora, open_lora
from sdrpc.families.model import Model, ModelFiles, open_model
from sdrpc.ggml.types import F32
from tools.checkpoints import make, names
from tools.checkpoints.families import SD1, SD2, SDXL

RANK = 2
Shape = tuple[int, int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A model of each kind, from files with the original names and from a directory of diffusers."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        f"{family} {form}": make(family, folder / f"{family}-{form}", form=form)
        for family, form in (("sd1", "safetensors"), ("sdxl", "diffusers"), ("flux1-schnell", "diffusers"),
                             ("sd3-without-t5", "safetensors"))
    }  # fmt: skip
    return {name: open_model(ModelFiles(each.files["model"])) for name, each in made.items()}


def written(folder: Path, layers: Mapping[str, Shape], form: str = "lora_down.weight lora_up.weight") -> Path:
    """A LoRA of these layers, (rows, columns) each."""
    down, up = form.split()
    tensors = {}
    for number, (name, (rows, columns)) in enumerate(layers.items()):
        generator = torch.Generator().manual_seed(number)
        tensors[f"{name}.{down}"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"{name}.{up}"] = torch.randn(rows, RANK, generator=generator)
    path = folder / "lora.safetensors"
    save_file(tensors, path)
    return path


def shapes(model: Model, component: str, parameters: Iterable[str]) -> dict[str, Shape]:
    found = model[component].found.tensors
    return {name: (found[name].shape[0], int(np.prod(found[name].shape[1:]))) for name in parameters}


def only(changes: Sequence[Delta]) -> Product:
    """The product that is all that a LoRA adds to a weight."""
    (change,) = changes
    assert isinstance(change, Product)
    return change


def changed(lora: Lora) -> dict[str, list[str]]:
    return {component: sorted(changes) for component, changes in lora.components.items()}


QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
LDM_QUERY = {"sd1": "input_blocks.3.1", "sdxl": "input_blocks.4.1"}
OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"

SPELLED = {
    "sd1 safetensors": {
        "unet." + QUERY, "base_model.model." + QUERY, "base_model.model.unet." + QUERY, QUERY,
        "lora_unet_" + QUERY.replace(".", "_"), "lycoris_" + QUERY.replace(".", "_"),
        "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    },
    "sdxl diffusers": {
        "unet." + QUERY, "lora_unet_" + QUERY.replace(".", "_"),
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SPELLED)
def test_every_spelling_of_a_unet_s_layer(models: dict[str, Model], kind: str, tmp_path: Path) -> None:
    model = models[kind]
    (shape,) = shapes(model, "diffusion", [f"{QUERY}.weight"]).values()
    for spelling in sorted(SPELLED[kind]):
        lora = open_lora(written(tmp_path, {spelling: shape}), model)
        assert changed(lora) == {"diffusion": [f"{QUERY}.weight"]}, spelling
        assert not lora.unknown


def test_names_of_the_old_code_are_all_found_backwards() -> None:
    for family in (SD1, SD2, SDXL):
        for size in family.components:
            component = next(c for c in family.of_size(size) if c.name == "diffusion")
            entries = names.ldm_unet(component.shapes())
            assert unet.ldm_names(component.shapes()) == {entry.name: entry.sources for entry in entries}


def test_both_text_encoders_of_sdxl(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["sdxl diffusers"]
    (one,), (two,) = (shapes(model, c, [f"{TEXT}.weight"]).values() for c in ("clip_l", "clip_g"))
    flat = TEXT.replace(".", "_")
    bare = TEXT.removeprefix("text_model.")  # as newer versions of transformers call it
    for first, second, layer in (
        ("lora_te1_", "lora_te2_", flat), ("text_encoder.", "text_encoder_2.", TEXT),
        ("text_encoder.", "text_encoder_2.", bare),
        ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.", TEXT),
    ):  # fmt: skip
        lora = open_lora(written(tmp_path, {first + layer: one, second + layer: two}), model)
        assert changed(lora) == {"clip_l": [f"{TEXT}.weight"], "clip_g": [f"{TEXT}.weight"]}


def test_a_layer_of_diffusers_old_names(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["sd1 safetensors"]
    (shape,) = shapes(model, "diffusion", [f"{OUT}.0.weight"]).values()
    path = written(tmp_path, {f"unet.{OUT}": shape})
    assert changed(open_lora(path, model)) == {"diffusion": [f"{OUT}.0.weight"]}


FUSED = {
    "flux1-schnell diffusers": {
        "double_blocks.1.img_attn.qkv": [f"transformer_blocks.1.attn.to_{letter}" for letter in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{letter}_proj" for letter in "qkv"],
        "single_blocks.1.linear1": [
            *(f"single_transformer_blocks.1.attn.to_{letter}" for letter in "qkv"),
            "single_transformer_blocks.1.proj_mlp",
        ],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    },
    "sd3-without-t5 safetensors": {
        "joint_blocks.1.x_block.attn.qkv": [f"transformer_blocks.1.attn.to_{letter}" for letter in "qkv"],
        "joint_blocks.0.x_block.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    },
}


@pytest.mark.parametrize("beginning", ["lora_unet_", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("kind", FUSED)
def test_a_fused_matrix_is_cut_as_the_model_s_is(
    models: dict[str, Model], kind: str, beginning: str, tmp_path: Path
) -> None:
    """Queries, keys and values share what is multiplied first."""
    model = models[kind]
    layers, flat = {}, beginning.endswith("_")
    for original, parts in FUSED[kind].items():
        sizes = shapes(model, "diffusion", [f"{part}.weight" for part in parts]).values()
        name = beginning + (original.replace(".", "_") if flat else original)
        layers[name] = sum(rows for rows, _ in sizes), next(iter(sizes))[1]
    lora = open_lora(written(tmp_path, layers, "lora_A.weight lora_B.weight"), model)
    assert not lora.unknown
    changes = lora.components["diffusion"]
    assert sorted(changes) == sorted(f"{part}.weight" for parts in FUSED[kind].values() for part in parts)
    for number, parts in enumerate(FUSED[kind].values()):
        rows, columns = list(layers.values())[number]
        generator = torch.Generator().manual_seed(number)
        down, up = torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)
        cut = [only(changes[f"{part}.weight"]) for part in parts]
        assert len({id(change.down) for change in cut if isinstance(change, LowRank)}) == 1
        got = np.concatenate([change.rows(0, change.weights[-1].shape[0]) for change in cut])
        np.testing.assert_allclose(got, (up @ down).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_shift_and_scale_are_exchanged_where_the_model_s_are(
    models: dict[str, Model], last: bool, tmp_path: Path
) -> None:
    """SD 3's last block gives no text: its norm of the text has shift and scale alone, in the other order."""
    model = models["sd3-without-t5 safetensors"]
    block = model["diffusion"].config["num_layers"] - 1 if last else 0
    parameter = f"transformer_blocks.{block}.norm1_context.linear.weight"
    (shape,) = shapes(model, "diffusion", [parameter]).values()
    name = f"lora_unet_joint_blocks_{block}_context_block_adaLN_modulation_1"
    change = only(open_lora(written(tmp_path, {name: shape}), model).components["diffusion"][parameter])
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(RANK, shape[1], generator=generator), torch.randn(shape[0], RANK, generator=generator)
    wanted = torch.cat((up[shape[0] // 2 :], up[: shape[0] // 2])) @ down if last else up @ down
    np.testing.assert_allclose(change.rows(0, shape[0]), wanted.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", FUSED)
def test_a_dora_of_a_fused_matrix_is_that_of_the_whole(
    models: dict[str, Model], kind: str, of_columns: bool, tmp_path: Path
) -> None:
    """The columns of queries, keys and values together have one length."""
    model = models[kind]
    for original, parts in FUSED[kind].items():
        weights = [model["diffusion"].found.tensors[f"{part}.weight"] for part in parts]
        whole = torch.cat([torch.from_numpy(numbers(w).copy()) for w in weights])
        path = written(tmp_path, {f"lora_unet_{original.replace('.', '_')}": (whole.shape[0], whole.shape[1])})
        tensors = load_file(path)
        (down,), (up,) = ([t for name, t in tensors.items() if end in name] for end in ("_down", "_up"))
        magnitude = torch.rand(1 if of_columns else len(whole), whole.shape[1] if of_columns else 1) + 0.5
        save_file({**tensors, f"lora_unet_{original.replace('.', '_')}.dora_scale": magnitude}, path)
        changes = open_lora(path, model).components["diffusion"]
        added = whole + up @ down
        wanted = 0.3 * whole + 0.7 * magnitude * added / added.norm(dim=0 if of_columns else 1, keepdim=True)
        got = [
            numbers(merged(cast(w, F32), [(change, 0.7) for change in changes[f"{part}.weight"]]))
            for part, w in zip(parts, weights, strict=True)
        ]
        np.testing.assert_allclose(np.concatenate(got), wanted.numpy(), rtol=1e-4, atol=1e-5)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_what_belongs_to_no_layer_is_named(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["sd1 safetensors"]
    (shape,) = shapes(model, "diffusion", [f"{QUERY}.weight"]).values()
    lora = open_lora(written(tmp_path, {f"unet.{QUERY}": shape, "unet.attic": (4, 4)}), model)
    assert changed(lora) == {"diffusion": [f"{QUERY}.weight"]}
    assert lora.unknown == ("unet.attic",)


def test_loras_of_other_families_are_refused(models: dict[str, Model], tmp_path: Path) -> None:
    flux = written(tmp_path, {f"lora_unet_double_blocks_{n}_img_attn_qkv": (96, 32) for n in range(2)})
    with pytest.raises(CheckpointError, match=r"another kind of model: 2 of its 2 .* this Stable Diffusion 1.x's"):
        open_lora(flux, models["sd1 safetensors"])
    (shape,) = shapes(models["sd1 safetensors"], "diffusion", [f"{QUERY}.weight"]).values()
    wide = written(tmp_path, {f"unet.{QUERY}": (shape[0], 2 * shape[1])})
    with pytest.raises(CheckpointError, match=r"another model: it adds .* to down_blocks.1.* here"):
        open_lora(wide, models["sd1 safetensors"])


def test_files_that_are_no_lora_are_refused(models: dict[str, Model], tmp_path: Path) -> None:
    save_file({"model.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"is no LoRA: none of its tensors adds to a layer .*'model.weight'"):
        open_lora(tmp_path / "other.safetensors", models["sd1 safetensors"])
    (tmp_path / "text").write_text("no model")
    with pytest.raises(CheckpointError):
        open_lora(tmp_path / "text", models["sd1 safetensors"])
