"""Pictures with LoRAs through a real rpc-server are those of diffusers' own pipeline with the same files; what changes
between two pictures is all that crosses the network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sdrpc
from bench.proxy import CountingProxy
from sdrpc.device import Device
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.session import Session
from sdrpc.errors import CheckpointError
from sdrpc.runtime.cache import Cache
from tests.support.pictures import BOUNDS, Case, Checkpoints, drawing, request
from tests.support.references.draw import draw, psnr

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers' scheduler with numpy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers' loaders, about themselves
]

RANK, STRENGTH = 4, 0.7
Tensors = dict[str, torch.Tensor]
Name = Callable[[str, str], str]
"""(component's folder, layer) → what the file calls it."""


def kohya(folder: str, layer: str) -> str:
    """Underscores for dots."""
    beginning, inner = {
        "unet": ("lora_unet", ""), "text_encoder": ("lora_te", "text_model."),
        "text_encoder_2": ("lora_te2", "text_model."),
    }[folder]  # fmt: skip
    return f"{beginning}_{(inner + layer.removeprefix(inner)).replace('.', '_')}"


def diffusers(folder: str, layer: str) -> str:
    return f"{folder}.{layer}"


@dataclass(frozen=True)
class Trained:
    """A case with LoRAs for it: what of the model they change, and how it is named there. ``lengths``: whose they set,
    if they are DoRAs."""

    case: Case
    name: Name
    layers: Mapping[str, Sequence[str]]
    peft: bool = False
    lengths: Literal["", "rows", "columns"] = ""

    def __str__(self) -> str:
        return f"{self.case} {self.lengths}".strip()

    def changed(self, pipeline: Any, folder: str) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
        """The layers of a component that they change, with their names in files."""
        for layer, module in getattr(pipeline, folder).named_modules():
            if layer.endswith(tuple(self.layers[folder])) and isinstance(module, nn.Linear | nn.Conv2d):
                yield self.name(folder, layer), module


def written(pipeline: Any, path: Path, trained: Trained, seed: int = 0) -> Path:
    """A LoRA of all of its layers."""
    tensors: Tensors = {}
    generator = torch.Generator().manual_seed(seed)
    for folder in trained.layers:
        for called, module in trained.changed(pipeline, folder):
            rows, columns, *taps = module.weight.shape
            down = torch.randn(RANK, columns, *taps, generator=generator) * (columns * max(1, len(taps) * 4)) ** -0.5
            up = torch.randn(rows, RANK, *(1 for _ in taps), generator=generator)
            tensors[f"{called}.{'lora_A' if trained.peft else 'lora_down'}.weight"] = down
            tensors[f"{called}.{'lora_B' if trained.peft else 'lora_up'}.weight"] = up
            if not trained.peft:
                tensors[f"{called}.alpha"] = torch.tensor(2.0)
            if trained.lengths:
                size = columns if trained.lengths == "columns" else rows
                lengths = (
                    torch.rand(size, generator=generator) + module.weight.std() * (module.weight.numel() / size) ** 0.5
                )
                shape = (size,) if trained.peft and not taps else (1, size, *(1 for _ in taps))
                tensors[f"{called}.{'lora_magnitude_vector' if trained.peft else 'dora_scale'}"] = lengths.reshape(
                    shape
                )
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CASES = (
    Trained(Case("sd1", "safetensors"), kohya, {"unet": (*ATTENTION, "conv1"), "text_encoder": ("q_proj", "fc1")}),
    Trained(Case("sdxl", "gguf", "Q4_K"), diffusers, {
        "unet": (*ATTENTION, "proj_in"), "text_encoder": ("v_proj",), "text_encoder_2": ("fc2",),
    }, peft=True),
    Trained(Case("flux1-dev", "gguf", "Q8_0"), diffusers, {
        "transformer": (*ATTENTION, "add_q_proj", "proj_mlp", "norm.linear"),
    }, peft=True),
    Trained(Case("sd3-without-t5", "diffusers"), diffusers, {"transformer": ATTENTION}, peft=True),
)  # fmt: skip


DORAS = (
    Trained(Case("sd1", "safetensors"), diffusers, {
        "unet": (*ATTENTION, "conv1"), "text_encoder": ("q_proj", "fc1"),
    }, peft=True, lengths="rows"),
    Trained(Case("flux1-dev", "gguf", "Q8_0"), diffusers, {
        "transformer": (*ATTENTION, "add_q_proj", "proj_mlp", "norm.linear"),
    }, peft=True, lengths="rows"),
    Trained(Case("sdxl", "gguf", "Q4_K"), kohya, {
        "unet": (*ATTENTION, "conv1"), "text_encoder_2": ("fc2",),
    }, lengths="columns"),
)  # fmt: skip


@pytest.fixture(scope="module")
def wire(ports: list[int]) -> Iterator[tuple[CountingProxy, Device]]:
    """A server's device behind a proxy that counts."""
    with CountingProxy(ports[0]) as proxy:
        device = sdrpc.devices(rpc=f"127.0.0.1:{proxy.port}")["RPC0"]
        yield proxy, device
        device.close()


def theirs(pipeline: Any, trained: Trained, loras: Sequence[tuple[Path, float]]) -> np.ndarray:
    """The picture of diffusers' pipeline with LoRAs. Its loader misreads those of text encoders with transformers 5
    (it forgets the adapters' names): they are added to the weights by the formula."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers and peft about each other
        for number, (path, strength) in enumerate(loras):
            tensors = load_file(path)
            for folder in trained.layers:
                if folder.startswith("text_encoder") or trained.lengths == "columns":  # which PEFT does not know
                    for called, module in trained.changed(pipeline, folder):
                        _merge(module, called, tensors, strength)
            if tensors:
                pipeline.load_lora_weights(tensors, adapter_name=f"lora{number}")
        if tensors:
            pipeline.set_adapters([f"lora{n}" for n in range(len(loras))], [strength for _, strength in loras])
        return draw(pipeline, drawing(trained.case)).pixels


def _merge(module: nn.Linear | nn.Conv2d, called: str, tensors: Tensors, strength: float) -> None:
    """Add what a LoRA has for a layer to its weight, and take it out of ``tensors``."""
    found = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{called}.")}
    down, up = (
        next(found[key] for key in found if re.search(kind, key)) for kind in ("lora_down|lora_A", "lora_up|lora_B")
    )
    alpha = found.get(f"{called}.alpha", torch.tensor(float(RANK)))
    weight = module.weight.data
    whole = weight + alpha / RANK * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    for key in found:
        if key.endswith("dora_scale"):
            across = [dim for dim in range(whole.ndim) if dim != 1]
            whole *= found[key] / torch.linalg.vector_norm(whole, dim=across, keepdim=True)
        elif key.endswith("magnitude_vector"):
            whole *= (found[key].flatten() / whole.flatten(1).norm(dim=1)).reshape(-1, *(1 for _ in whole.shape[1:]))
    weight += strength * (whole - weight)


@pytest.mark.parametrize("trained", CASES, ids=str)
def test_a_picture_with_loras_is_that_of_diffusers(
    trained: Trained, checkpoints: Checkpoints, wire: tuple[CountingProxy, Device], cache: Cache, tmp_path: Path
) -> None:
    """Two at once; the weights, quantized ones too, are those of the picture without, which comes back after it."""
    case, (_, device) = trained.case, wire
    pipeline = checkpoints.made(case).pipeline()
    named = {
        n: written(pipeline, tmp_path / f"{n}.safetensors", trained, seed) for seed, n in enumerate(("one", "other"))
    }
    loras = [("one", STRENGTH), ("other.safetensors", -0.5)]
    wanted = theirs(pipeline, trained, [(named[name.partition(".")[0]], strength) for name, strength in loras])
    plain = checkpoints.wanted(case)
    events: list[Event] = []
    with Session.open(checkpoints.files(case), device, cache, lora_dir=tmp_path) as session:
        (without,) = session.generate(request(case))
        (picture,) = session.generate(replace(request(case), loras=loras), events.append)
        (again,) = session.generate(request(case), events.append)
        assert not [path for path in session.unused() if path in map(str, named.values())]
    assert psnr(picture.image, wanted) >= BOUNDS["exact"]
    assert psnr(wanted, plain) < 30, "a LoRA changes the picture"
    np.testing.assert_array_equal(again.image, without.image)
    uploaded = sum(event.total for event in events if event.stage == "upload" and event.over)
    assert uploaded <= sum(path.stat().st_size for path in named.values()), "the LoRAs alone"


@pytest.mark.parametrize("trained", DORAS, ids=str)
def test_a_picture_with_a_dora_is_that_of_diffusers(
    trained: Trained, checkpoints: Checkpoints, wire: tuple[CountingProxy, Device], cache: Cache, tmp_path: Path
) -> None:
    """At strength 1, at which PEFT and we agree, and, of columns, at another one by LyCORIS's formula."""
    case, (_, device), strength = trained.case, wire, 1.0 if trained.peft else STRENGTH
    pipeline = checkpoints.made(case).pipeline()
    path = written(pipeline, tmp_path / "one.safetensors", trained)
    wanted = theirs(pipeline, trained, [(path, strength)])
    events: list[Event] = []
    with Session.open(checkpoints.files(case), device, cache, lora_dir=tmp_path) as session:
        list(session.generate(request(case)))
        (picture,) = session.generate(replace(request(case), loras=[("one", strength)]), events.append)
        assert not [path for path in session.unused() if str(tmp_path) in path]
    assert psnr(picture.image, wanted) >= BOUNDS["exact"]
    assert psnr(wanted, checkpoints.wanted(case)) < 30, "a DoRA changes the picture"
    uploaded = sum(event.total for event in events if event.stage == "upload" and event.over)
    assert uploaded <= path.stat().st_size, "the DoRA alone"


def test_a_lora_with_values_that_are_no_numbers(
    checkpoints: Checkpoints, wire: tuple[CountingProxy, Device], cache: Cache, tmp_path: Path
) -> None:
    """It is the LoRA that is named, not the model."""
    case = CASES[0].case
    path = written(checkpoints.made(case).pipeline(), tmp_path / "one.safetensors", CASES[0])
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_unet" in name and "lora_up" in name)
    tensors[name][0] = float("nan")
    save_file(tensors, path)
    with Session.open(checkpoints.files(case), wire[1], cache, lora_dir=tmp_path) as session:
        with pytest.raises(CheckpointError, match=rf"one\.safetensors: tensor '{name}': has values that are NaN"):
            list(session.generate(replace(request(case), loras=[("one", 1.0)])))
        assert len(list(session.generate(request(case)))) == 1


@pytest.mark.parametrize("trained", [CASES[0], DORAS[0]], ids=["LoRA", "DoRA"])
def test_what_changes_is_what_is_sent(
    trained: Trained, checkpoints: Checkpoints, wire: tuple[CountingProxy, Device], cache: Cache, tmp_path: Path
) -> None:
    """Another strength: some bytes; another LoRA: its bytes; none: nothing. Never the model, nor other graphs than for
    another text."""
    proxy, device = wire
    pipeline = checkpoints.made(trained.case).pipeline()
    for seed, name in enumerate(("one", "other")):
        written(pipeline, tmp_path / f"{name}.safetensors", trained, seed)
    size = (tmp_path / "one.safetensors").stat().st_size
    asked = request(trained.case)

    def sent(session: Session, tag: str) -> tuple[int, int]:
        """Bytes on the wire for a picture, and those of weights among them."""
        before, events = proxy.sent, list[Event]()
        list(session.generate(replace(asked, prompt=asked.prompt + tag), events.append))
        return proxy.sent - before, sum(event.total for event in events if event.stage == "upload" and event.over)

    with Session.open(checkpoints.files(trained.case), device, cache, lora_dir=tmp_path) as session:
        first, weights = sent(session, "<lora:one:0.8>")
        assert first > weights > 10 * size
        usual, uploaded = sent(session, " or so<lora:one:0.8>")
        assert uploaded == 0
        few = 4096  # the strengths, and what other numbers of a text or a picture may have in common with those before
        stronger, uploaded = sent(session, "<lora:one:0.9>")
        assert uploaded == 0
        assert abs(stronger - usual) < few
        other, uploaded = sent(session, "<lora:other:0.9>")
        assert 0 < uploaded <= size
        assert other - usual < size * 5 // 4, "with a message for each of its small matrices"
        _, uploaded = sent(session, "")
        assert uploaded == 0


@pytest.mark.parametrize("trained", CASES[:2], ids=str)
def test_merged_into_the_weights(
    trained: Trained, checkpoints: Checkpoints, wire: tuple[CountingProxy, Device], cache: Cache, tmp_path: Path
) -> None:
    """immediately: what changes is sent again. Weights in F16 are rounded once more; blocks that nothing here writes
    are unpacked to F16 before."""
    _, device = wire
    pipeline = checkpoints.made(trained.case).pipeline()
    path = written(pipeline, tmp_path / "one.safetensors", trained)
    wanted = theirs(pipeline, trained, [(path, STRENGTH)])
    asked = request(trained.case)
    options: Any = {"lora_dir": tmp_path, "lora_apply_mode": "immediately"}
    with Session.open(checkpoints.files(trained.case), device, cache, **options) as session:
        (without,) = session.generate(asked)
        (picture,) = session.generate(replace(asked, prompt=f"{asked.prompt}<lora:one:{STRENGTH}>"))
        (again,) = session.generate(asked)
    assert psnr(picture.image, wanted) >= BOUNDS["exact"]
    np.testing.assert_array_equal(again.image, without.image)
