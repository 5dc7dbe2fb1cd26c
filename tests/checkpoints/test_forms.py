"""The forms in which models come: file types told by content, 8-bit floats, shards, components, GGUF's own orders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import save_file

from sdrpc.checkpoints.checkpoint import Checkpoint, open_checkpoint
from sdrpc.errors import CheckpointError
from sdrpc.ggml.weight import Weight
from tests.checkpoints.test_expressions import numbers, permuted_by_llama_cpp

F8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def values(w: Weight) -> torch.Tensor:
    return torch.from_numpy(numbers(w).astype(np.float32))


# what a file is, its bytes say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.sft", "m", "m.gguf", "m.bin", "m [pruned]"])
def test_misnamed_safetensors_and_gguf(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / name)
    assert list(open_checkpoint(tmp_path / name).tensors) == ["a"]
    write_gguf(tmp_path / name, {"b": np.ones(3, np.float32)})
    assert list(open_checkpoint(tmp_path / name).tensors) == ["b"]


def test_a_download_that_was_broken_off(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for size in (len(whole) - 1, 100, 20):
        (tmp_path / "a.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"incomplete: it has {size:,} of at least"):
            open_checkpoint(tmp_path / "a.safetensors")


def test_a_file_that_was_given_its_size_before_it_was_filled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Weights that are zeros draw a grey picture, or noise."""
    save_file({"a": torch.ones(1 << 19), "b": torch.ones(9)}, tmp_path / "a.safetensors")
    open_checkpoint(tmp_path / "a.safetensors")
    assert not caplog.messages
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[: 1 << 20] + bytes(len(whole) - (1 << 20)))
    open_checkpoint(tmp_path / "a.safetensors")
    assert caplog.messages == [f"{tmp_path / 'a.safetensors'}: ends in zeros, as a download does that has not ended"]


# numbers -------------------------------------------------------------------------------------------------------------


def test_f64_weights_are_float32(tmp_path: Path) -> None:
    numbers = torch.randn(3, 4, dtype=torch.float64)
    save_file({"a": numbers}, tmp_path / "a.safetensors")
    weight = open_checkpoint(tmp_path / "a.safetensors").tensors["a"]
    assert weight.type.name == "F32"
    assert torch.equal(values(weight), numbers.float())


@pytest.mark.parametrize("columns", [32, 16])
@pytest.mark.parametrize("format", F8)
def test_all_256_numbers_of_8_bit_floats(format: str, columns: int, tmp_path: Path) -> None:
    tensor = torch.arange(256, dtype=torch.uint8).view(F8[format]).reshape(-1, columns)
    save_file({"a": tensor, "b": torch.ones(2)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert sorted(checkpoint.tensors) == ["a", "b"]
    weight = checkpoint.tensors["a"]
    assert weight.type.name == (format if columns == 32 else "F16")
    assert torch.equal(values(weight).nan_to_num(), tensor.float().nan_to_num())
    assert torch.equal(values(weight).isnan(), tensor.float().isnan())


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1)])
@pytest.mark.parametrize(("size", "type"), [(2e-4, "F16"), (1e3, "BF16"), (1e-9, "BF16")])
def test_scaled_8_bit_floats(scale_name: str, shape: tuple[int, ...], size: float, type: str, tmp_path: Path) -> None:
    raw = torch.randn(8, 32).mul(100).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) * size + size
    file = {
        "l.weight": raw, f"l.{scale_name}": scale, "l.bias": torch.ones(8), "scaled_fp8": torch.zeros(0).to(raw.dtype),
        "l.scale_input": torch.ones(()), "other.weight": raw.clone(),
    }  # fmt: skip
    save_file(file, tmp_path / "a.safetensors")
    tensors = open_checkpoint(tmp_path / "a.safetensors").tensors
    assert sorted(tensors) == ["l.bias", "l.weight", "other.weight"]
    assert tensors["l.weight"].type.name == type
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[type]
    expected = (raw.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))).to(dtype)
    assert torch.equal(values(tensors["l.weight"]), expected.float())
    assert bytes(b"".join(tensors["l.weight"].pieces(70, 402))) == bytes(tensors["l.weight"].data()[70:402])
    assert torch.equal(values(tensors["other.weight"]), raw.float())


def test_scales_of_blocks_are_refused(tmp_path: Path) -> None:
    save_file(
        {"l.weight": torch.zeros(8, 32).to(torch.float8_e4m3fn), "l.weight_scale": torch.ones(8, 2)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"tensor 'l.weight': has scales F32 \[8, 2\]"):
        open_checkpoint(tmp_path / "a.safetensors")


# GGUF ----------------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "sd1",
    entries: Callable[[GGUFWriter], None] = lambda _: None,
    kind: GGMLQuantizationType | None = None,
) -> None:
    writer = GGUFWriter(path, architecture)
    entries(writer)
    for name, values in tensors.items():
        if kind is None or values.ndim < 2:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [None, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0])
def test_queries_and_keys_of_llama_are_in_the_order_of_transformers(
    kind: GGMLQuantizationType | None, tmp_path: Path
) -> None:
    def entries(writer: GGUFWriter) -> None:
        writer.add_head_count(4)
        writer.add_head_count_kv(2)

    rng = np.random.default_rng(0)
    names = {"q_proj": "blk.0.attn_q.weight", "k_proj": "blk.0.attn_k.weight", "v_proj": "blk.0.attn_v.weight"}
    original = {
        name: rng.normal(size=(rows, 32)).astype(np.float32) for name, rows in zip(names, (32, 16, 16), strict=True)
    }
    stored = {names[name]: values for name, values in original.items()}
    stored[names["q_proj"]] = permuted_by_llama_cpp(original["q_proj"], 4)
    stored[names["k_proj"]] = permuted_by_llama_cpp(original["k_proj"], 2)
    for architecture in ("llama", "qwen3"):
        write_gguf(tmp_path / "a.gguf", stored, architecture, entries, kind)
        tensors = open_checkpoint(tmp_path / "a.gguf").tensors
        for name, values in original.items():
            expected = values if architecture == "llama" else stored[names[name]]
            weight = tensors[names[name]]
            assert weight.type.name == (kind.name if kind else "F32")
            assert weight.data() == quantize(expected, kind or GGMLQuantizationType.F32).tobytes()
    write_gguf(tmp_path / "a.gguf", stored, "llama")
    with pytest.raises(CheckpointError, match=r"attn_q\.weight.*is permuted"):
        open_checkpoint(tmp_path / "a.gguf")


def test_the_vocabulary_of_a_gguf_file(tmp_path: Path) -> None:
    def entries(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("t5")
        writer.add_token_list(["<pad>", "</s>", "▁a"])
        writer.add_token_scores([0.0, 0.0, -1.5])
        writer.add_token_types([3, 3, 1])

    write_gguf(tmp_path / "a.gguf", {"w": np.ones(3, np.float32)}, "t5encoder", entries)
    read = open_checkpoint(tmp_path / "a.gguf").tokenizers[""].entries
    assert read is not None
    assert read() == {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<pad>", "</s>", "▁a"],
        "tokenizer.ggml.scores": [0.0, 0.0, -1.5],
        "tokenizer.ggml.token_type": [3, 3, 1],
    }


# directories ---------------------------------------------------------------------------------------------------------


def shard(
    folder: Path, count: int, stem: str = "diffusion_pytorch_model", index: str = ".safetensors.index.json"
) -> None:
    """A component in ``count`` shards of one tensor each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"_class_name": "X"}', encoding="utf-8-sig")
    weight_map = {}
    for i in range(1, count + 1):
        weight_map[f"w{i}"] = f"{stem}-{i:05}-of-{count:05}.safetensors"
        save_file({f"w{i}": torch.full((2,), float(i))}, folder / weight_map[f"w{i}"])
    (folder / f"{stem}{index}").write_text(json.dumps({"weight_map": weight_map}))


def names(checkpoint: Checkpoint) -> list[str]:
    assert all(weight.name == name for name, weight in checkpoint.tensors.items())
    return list(checkpoint.tensors)


def test_a_pipeline_with_any_components(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    shard(tmp_path / "transformer", 3)
    shard(tmp_path / "text_encoder_2", 2, "model")
    shard(tmp_path / "unet", 2, "diffusion_pytorch_model.fp16", ".safetensors.index.json")
    shard(tmp_path / "unet_2", 2, "diffusion_pytorch_model.fp16", ".missing")
    (tmp_path / "unet_2" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_bytes(
        (tmp_path / "unet_2" / "diffusion_pytorch_model.fp16.missing").read_bytes()
    )
    for folder, file in (("vae", "diffusion_pytorch_model.fp16.safetensors"), ("safety_checker", "model.safetensors")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        save_file({"a": torch.ones(2)}, tmp_path / folder / file)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    torch.save({"a": torch.ones(2)}, tmp_path / "text_encoder" / "pytorch_model.bin")
    for tokenizer, file in (("tokenizer", "vocab.json"), ("tokenizer_2", "spiece.model")):
        (tmp_path / tokenizer).mkdir()
        (tmp_path / tokenizer / file).write_text("x")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    checkpoint = open_checkpoint(tmp_path)
    assert names(checkpoint) == [
        "text_encoder.a", "text_encoder_2.w1", "text_encoder_2.w2", "transformer.w1", "transformer.w2",
        "transformer.w3", "unet.w1", "unet.w2", "unet_2.w1", "unet_2.w2", "vae.a",
    ]  # fmt: skip
    assert checkpoint.configs["scheduler"] == {"shift": 3.0}
    assert checkpoint.configs["transformer"] == {"_class_name": "X"}
    assert checkpoint.configs[""] == {"_class_name": "FluxPipeline"}
    assert {name: list(found.files) for name, found in checkpoint.tokenizers.items()} == {
        "tokenizer": ["vocab.json"], "tokenizer_2": ["spiece.model"],
    }  # fmt: skip
    alone = open_checkpoint(tmp_path / "text_encoder_2")
    assert names(alone) == ["w1", "w2"]
    assert alone.configs == {"": {"_class_name": "X"}}
    assert alone.tokenizers[""].files == {"spiece.model": tmp_path / "tokenizer_2" / "spiece.model"}
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"vae/config\.json: No such file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "named", ["m.safetensors.index.json", "m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"]
)
def test_shards_are_opened_by_any_of_their_names(named: str, tmp_path: Path) -> None:
    shard(tmp_path, 3, "m")
    checkpoint = open_checkpoint(tmp_path / named)
    assert names(checkpoint) == ["w1", "w2", "w3"]
    assert [float(values(weight)[0]) for weight in checkpoint.tensors.values()] == [1, 2, 3]
    assert checkpoint.configs == {"": {"_class_name": "X"}}
    second = tmp_path / "m-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.safetensors: damaged or incomplete"):
        open_checkpoint(tmp_path / named)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"of 3 files these are missing: m-00002-of-00003\.safetensors$"):
        open_checkpoint(tmp_path / named)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    shard(tmp_path, 2, "model")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"w2"', '"w3"'))
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors: tensor 'w3': is missing"):
        open_checkpoint(index)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="names no files"):
        open_checkpoint(index)


def test_a_directory_of_several_files_that_do_not_belong_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several files of weights \(a\.safetensors, b\.safetensors"):
        open_checkpoint(tmp_path)
