"""Model files: what is read, that nothing is copied, and what is refused how."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdrpc.checkpoints import gguf_header, mapped
from sdrpc.checkpoints.checkpoint import open_checkpoint
from sdrpc.checkpoints.expressions import rows
from sdrpc.errors import CheckpointError
from sdrpc.ggml.weight import Origin


def test_safetensors_are_views_of_the_file(tiny: Path, tiny_weights: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(tiny)
    assert checkpoint.tensors.keys() == tiny_weights.keys()
    for name, tensor in tiny_weights.items():
        weight = checkpoint.tensors[name]
        assert weight.shape == tuple(tensor.shape)
        assert bytes(weight.data()) == tensor.numpy().tobytes()
    weight = next(iter(checkpoint.tensors.values()))
    assert weight.data().obj is weight.data().obj  # the mapping
    assert weight.data().readonly


def test_an_origin_is_one_state_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def origins() -> dict[str, Origin | None]:
        return {name: weight.origin for name, weight in open_checkpoint(path).tensors.items()}

    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, path)
    assert set(origins().values()) == {None}  # so young that another change might not show
    monkeypatch.setattr(mapped, "YOUNG", 0)
    first = origins()
    assert first == origins()
    assert len({*first.values(), None}) == 3
    save_file({"a": torch.ones(3), "b": torch.zeros(3)}, path)
    assert not {*first.values()} & {*origins().values()}
    copy = path.rename(tmp_path / "b.safetensors")
    path.symlink_to(copy)
    assert origins()["a"] == open_checkpoint(copy).tensors["a"].origin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_safetensors_types(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    save_file(
        {"a": tensor, "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)}, tmp_path / "a.safetensors", {"k": "v"}
    )
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    weight = checkpoint.tensors["a"]
    assert weight.type.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}[str(dtype)[6:]]
    assert torch.equal(torch.frombuffer(bytearray(weight.data()), dtype=dtype).reshape(3, 4), tensor)
    assert checkpoint.metadata == {"k": "v"}


def test_types_that_ggml_lacks_are_set_aside(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.uint8), "b": torch.zeros(4)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.skipped == {"a": "U8"}
    assert list(checkpoint.tensors) == ["b"]


@pytest.mark.parametrize("quant", [None, "Q8_0", "Q4_0", "Q4_K"])
def test_gguf_reads_as_the_library_does(
    quant: str | None, maker: ModuleType, tiny_weights: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.gguf"
    names = [name for name in tiny_weights if "layers.0" in name or "input_blocks.1." in name]
    maker.write_gguf(path, {name: tiny_weights[name] for name in names}, quant)
    checkpoint = open_checkpoint(path)
    theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert checkpoint.tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        weight = checkpoint.tensors[name]
        assert weight.type.name == tensor.tensor_type.name
        assert weight.shape == tuple(tensor.shape[::-1].tolist())
        assert bytes(weight.data()) == tensor.data.tobytes()
    assert (quant or "F16") in {weight.type.name for weight in checkpoint.tensors.values()}


def test_gguf_metadata_and_alignment(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "sd1")
    writer.add_custom_alignment(256)
    writer.add_string("sdrpc.config", "{}")
    writer.add_array("words", ["a", "b"])
    writer.add_float32("number", 1.5)
    writer.add_tensor("w", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    assert checkpoint.metadata["sdrpc.config"] == "{}"
    assert checkpoint.metadata["number"] == "1.5"
    assert np.frombuffer(checkpoint.tensors["w"].data(), np.float32).tolist() == list(range(8))


def test_gguf_tensors_that_a_converter_folded(tmp_path: Path) -> None:
    """A convolution in blocks of 32 has rows of 3: it is unpacked when it is read."""
    values = np.random.default_rng(0).normal(size=(4, 8, 3, 3)).astype(np.float32)
    writer = GGUFWriter(tmp_path / "a.gguf", "sd1")
    from gguf.quants import quantize

    folded = quantize(values.reshape(9, 32), GGMLQuantizationType.Q8_0)
    writer.add_array("comfy.gguf.orig_shape.w", [4, 8, 3, 3])
    writer.add_tensor("w", folded, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weight = open_checkpoint(tmp_path / "a.gguf").tensors["w"]
    assert (weight.type.name, weight.shape) == ("F16", (4, 8, 3, 3))
    assert weight.before == ("Q8_0 in rows of 3", 8.5)
    expected = dequantize(folded, GGMLQuantizationType.Q8_0).astype(np.float16)
    assert bytes(weight.data()) == expected.tobytes()


def test_diffusers_directory(maker: ModuleType, tiny_weights: dict[str, Any], tmp_path: Path) -> None:
    maker.write_diffusers(tmp_path / "model", tiny_weights)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.configs.keys() == {"", "unet", "vae", "text_encoder"}
    assert open_checkpoint(tmp_path / "model" / "model_index.json").configs == checkpoint.configs
    assert {name.split(".")[0] for name in checkpoint.tensors} == {"unet", "vae", "text_encoder"}
    assert all(weight.name == name for name, weight in checkpoint.tensors.items())


def test_sharded_diffusers_directory(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet" / "config.json").write_text("{}")
    weight_map = {}
    for number in (1, 2):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": torch.ones(2)}, tmp_path / "unet" / file)
        weight_map[f"w{number}"] = file
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(tmp_path).tensors.keys() == {"unet.w1", "unet.w2"}
    index.write_text(json.dumps({"weight_map": {"w": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside"):
        open_checkpoint(tmp_path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.safetensors", None, "No such file"),
        ("a.ckpt", b"\x80\x02}", "old form"),
        ("a.pt", b"PK\x03\x04", "damaged or incomplete"),
        ("lfs.safetensors", LFS, r"a Git LFS pointer to a file of 4\.3 GB, .* git lfs pull"),
        ("page.safetensors", b"\n<!DOCTYPE html><html>Sign in</html>", "a web page, not a model: .*DOCTYPE"),
        ("error.gguf", b'{"error": "Access to this model is restricted"}', "JSON text, not a model: .*Access"),
        (
            "s3.safetensors",
            b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code>',
            "XML text, such as a server's.*AccessDenied",
        ),
        ("hub.safetensors", b"Entry not found", "neither .* it begins with 'Entry not found'"),
        ("powershell.safetensors", b"\xff\xfeh\0e\0", "UTF-16 text, as PowerShell's > does"),
        ("a.safetensors", b"\x1f\x8b\x08\0", r"an archive \(gzip\), not a model: unpack it first"),
        ("b.safetensors", b"\x28\xb5\x2f\xfd\0", r"an archive \(zstd\)"),
        ("a.tar", b"a.safetensors".ljust(257, b"\0") + b"ustar", r"an archive \(tar\)"),
        ("a.safetensors.crdownload", b"anything", "a download that has not ended, as its name says; rename it"),
        ("a.safetensors.part", b"", "a download that has not ended"),
        ("a.safetensors.download", b"anything", "a download that has not ended"),
        ("saved.safetensors", b"<!-- saved from url=(0020)https://x -->", "a web page, not a model"),
        ("preview.safetensors", b"\x89PNG\r\n\x1a\n", r"is a picture \(PNG\), not a model"),
        ("big.gguf", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF for big-endian machines"),
        ("zeros.ckpt", bytes(4096), "zeros: the download is not finished"),
        ("terminal.gguf", b"\x1b[2J\x00", r"begins with '\\x1b\[2J"),
        ("a.txt", b"hello, this is text", "neither"),
        ("empty.safetensors", b"", "is empty"),
        ("short.safetensors", b"\x10\0\0\0\0\0\0\0{}", "damaged"),
        ("huge.safetensors", struct.pack("<Q", 1 << 63) + b"{}", "neither"),
        ("large.safetensors", struct.pack("<Q", 1 << 39) + b"{}", "incomplete: it has 10 of at least 549,755,813,896"),
        ("text.safetensors", struct.pack("<Q", 8) + b"{ot json", "damaged"),
        ("list.safetensors", struct.pack("<Q", 16) + b'{"a": [1, 2, 3]}', "damaged"),
        ("magic.gguf", b"GGUF", "damaged"),
        ("version.gguf", b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        ("tensors.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "do not fit"),
        ("entries.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "do not fit"),
    ],
)
def test_pointer_files_and_others_that_are_no_model(
    name: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tiny.ckpt", r"No such file or directory; did you mean \S*/tiny\.safetensors\?"),
        ("Tiny.safetensors ", r"did you mean \S*/tiny\.safetensors\?"),
        ("other.gguf", "No such file or directory$"),
        ("gone.safetensors", r"is a link to blobs/0123, which is not there"),
        ("https://example.org/tiny.safetensors", "is an address, not a file: models are not fetched"),
        ("stabilityai/sdxl-turbo", "models are not fetched from a hub"),
    ],
)
def test_what_is_not_there(name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is nearly right, a link to a file that was moved, an address, a name at a hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.safetensors").touch()
    (tmp_path / "gone.safetensors").symlink_to("blobs/0123")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(name if "/" in name else tmp_path / name)


@pytest.mark.parametrize("made", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(made: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made(path)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: is a pipe or a device; .* has to be a file"):
        open_checkpoint(path)


def test_a_file_that_becomes_shorter_in_use(tmp_path: Path) -> None:
    """As when another one is copied over it. What is gone can't be read: the system would end the process."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3000, 4), "b": torch.ones(2, 3)}, path)
    found = open_checkpoint(path).tensors
    part = rows(found["a"], 100, 300)
    assert len(part.data()) == 200 * 4 * 4
    os.truncate(path, 4096)
    for weight in (part, *found.values()):
        with pytest.raises(CheckpointError, match="has become shorter while it was in use"):
            weight.data()


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_directories_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_index"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="object"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        open_checkpoint(tmp_path)


def gguf_bytes() -> bytes:
    """A small valid file: two entries, one of them an array, and a tensor."""
    key, word = (struct.pack("<Q", len(text)) + text for text in (b"key", b"value"))
    entries = key + struct.pack("<I", 8) + word + key + struct.pack("<IIQ", 9, 5, 2) + struct.pack("<ii", 1, 2)
    tensor = struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + entries + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


def test_the_small_gguf_is_valid() -> None:
    header = gguf_header.parse(memoryview(gguf_bytes()))
    assert header.metadata == {"key": "value"}
    assert header.tensors[0].shape == (2, 4)


@given(st.data())
def test_any_damage_to_a_gguf_header_is_a_value_error(data: st.DataObject) -> None:
    content = bytearray(gguf_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    try:
        header = gguf_header.parse(memoryview(content[:cut]))
    except ValueError:
        return
    assert all(
        0 <= tensor.begin <= tensor.end <= cut for tensor in header.tensors if not tensor.type.startswith("type")
    )
