"""What LoRA files of every form add to a weight, against the formulas of their libraries in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdrpc.checkpoints import lora_file
from sdrpc.checkpoints.checkpoint import open_checkpoint
from sdrpc.checkpoints.deltas import Difference, LowRank, can_merge, merged, numbers
from sdrpc.checkpoints.lora_file import LoraFile
from sdrpc.errors import CheckpointError
from sdrpc.ggml.types import F32, TYPES
from sdrpc.ggml.weight import View, Weight

Tensors = Mapping[str, torch.Tensor]
ROWS, COLUMNS, RANK = 24, 32, 3
CONV = (ROWS, COLUMNS, 3, 3)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 10 * len(shape) + sum(shape)))


def opened(folder: Path, tensors: Tensors) -> LoraFile:
    path = folder / "lora.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return lora_file.read(open_checkpoint(path))


def prefixed(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"x.{name.replace('__', '.')}": tensor for name, tensor in parts.items()}


DOWN, UP, ALPHA = random(RANK, COLUMNS), random(ROWS, RANK), torch.tensor(2.0)
SCALE = 2.0 / RANK
LEFT, RIGHT = random(4, 2), random(6, 16)
"""Of a Kronecker product of ROWS and COLUMNS."""

LOW_RANK = {
    "kohya": prefixed(lora_down__weight=DOWN, lora_up__weight=UP, alpha=ALPHA),
    "PEFT": prefixed(lora_A__weight=DOWN, lora_B__weight=UP, alpha=ALPHA),
    "PEFT, with the adapter's name": prefixed(lora_A__default__weight=DOWN, lora_B__default__weight=UP, alpha=ALPHA),
    "diffusers": prefixed(lora__down__weight=DOWN, lora__up__weight=UP, alpha=ALPHA),
    "diffusers, text": prefixed(lora_linear_layer__down__weight=DOWN, lora_linear_layer__up__weight=UP, alpha=ALPHA),
}


@pytest.mark.parametrize("form", LOW_RANK)
def test_every_spelling_of_up_and_down(tmp_path: Path, form: str) -> None:
    change = opened(tmp_path, LOW_RANK[form]).layers["x"]
    assert isinstance(change, LowRank)
    np.testing.assert_allclose(change.rows(0, ROWS), SCALE * (UP @ DOWN).numpy(), rtol=1e-5, atol=1e-5)


def test_old_attention_processors_name_their_layer(tmp_path: Path) -> None:
    names = {"a.attn1.processor.to_q_lora.down.weight": DOWN, "a.attn1.processor.to_q_lora.up.weight": UP}
    assert list(opened(tmp_path, names).layers) == ["a.attn1.to_q"]


HADAMARD = {f"hada_w{n}_{side}": random(*shape, seed=n) for n in (1, 2)
            for side, shape in (("a", (ROWS, 2)), ("b", (2, COLUMNS)))}  # fmt: skip
TUCKER = {
    "hada_t1": random(2, 2, 3, 3), "hada_t2": random(2, 2, 3, 3, seed=1),
    **{f"hada_w{n}_{side}": random(2, size, seed=n) for n in (1, 2) for side, size in (("a", ROWS), ("b", COLUMNS))},
}  # fmt: skip


def tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ijkl,jr,ip->prkl", core, b, a).contiguous()


def hadamard_tucker() -> torch.Tensor:
    one, two = ((TUCKER[f"hada_t{n}"], TUCKER[f"hada_w{n}_a"], TUCKER[f"hada_w{n}_b"]) for n in (1, 2))
    return tucker(*one) * tucker(*two)


LYCORIS: dict[str, tuple[Tensors, Callable[[], torch.Tensor], type]] = {
    "LoCon": (
        {"lora_down.weight": random(RANK, *CONV[1:]), "lora_up.weight": UP[..., None, None]},
        lambda: torch.einsum("or,rikl->oikl", UP, random(RANK, *CONV[1:])),
        LowRank,
    ),
    "LoCon with a middle": (
        {"lora_mid.weight": random(RANK, RANK, 3, 3), "lora_down.weight": DOWN[..., None, None],
         "lora_up.weight": UP[..., None, None]},
        lambda: torch.einsum("om,mrkl,ri->oikl", UP, random(RANK, RANK, 3, 3), DOWN),
        LowRank,
    ),
    "LoHa": (
        HADAMARD,
        lambda: (HADAMARD["hada_w1_a"] @ HADAMARD["hada_w1_b"]) * (HADAMARD["hada_w2_a"] @ HADAMARD["hada_w2_b"]),
        LowRank,
    ),
    "LoHa of high rank": (
        {name: torch.cat([part] * 3, 1 if name.endswith("a") else 0) for name, part in HADAMARD.items()},
        lambda: 9 * (HADAMARD["hada_w1_a"] @ HADAMARD["hada_w1_b"]) * (HADAMARD["hada_w2_a"] @ HADAMARD["hada_w2_b"]),
        Difference,
    ),
    "LoHa of a convolution": (TUCKER, hadamard_tucker, Difference),
    "LoKr": ({"lokr_w1": LEFT, "lokr_w2": RIGHT}, lambda: torch.kron(LEFT, RIGHT), Difference),
    "LoKr of low rank": (
        {"lokr_w1": LEFT, "lokr_w2_a": random(6, 1), "lokr_w2_b": random(1, 16)},
        lambda: torch.kron(LEFT, random(6, 1) @ random(1, 16)),
        LowRank,
    ),
    "LoKr, both of low rank": (
        {"lokr_w1_a": random(4, 1), "lokr_w1_b": random(1, 2), "lokr_w2_a": random(6, 1), "lokr_w2_b": random(1, 16)},
        lambda: torch.kron(random(4, 1) @ random(1, 2), random(6, 1) @ random(1, 16)),
        LowRank,
    ),
    "LoKr of a convolution": (
        {"lokr_w1": LEFT, "lokr_t2": random(2, 2, 3, 3), "lokr_w2_a": random(2, 6), "lokr_w2_b": random(2, 16)},
        lambda: torch.kron(LEFT[..., None, None], tucker(random(2, 2, 3, 3), random(2, 6), random(2, 16))),
        Difference,
    ),
    "a whole difference": ({"diff": random(*CONV)}, lambda: random(*CONV), Difference),
}  # fmt: skip


@pytest.mark.parametrize("form", LYCORIS)
def test_lycoris_forms(tmp_path: Path, form: str) -> None:
    parts, formula, kind = LYCORIS[form]
    change = opened(tmp_path, {f"x.{name}": part for name, part in parts.items()}).layers["x"]
    wanted = formula().reshape(ROWS, -1).numpy()
    assert isinstance(change, kind)
    np.testing.assert_allclose(change.rows(0, ROWS), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(change.rows(5, 9), change.rows(0, ROWS)[5:9])


def test_alpha_counts_by_the_rank_that_the_format_means(tmp_path: Path) -> None:
    parts = {"lokr_w1": LEFT, "lokr_w2_a": random(6, 2), "lokr_w2_b": random(2, 16), "alpha": torch.tensor(1.0)}
    assert opened(tmp_path, {f"x.{name}": part for name, part in parts.items()}).layers["x"].factor == 0.5
    parts = {"lokr_w1": LEFT, "lokr_w2": RIGHT, "alpha": torch.tensor(1.0)}
    assert opened(tmp_path, {f"x.{name}": part for name, part in parts.items()}).layers["x"].factor == 1.0


def test_biases_and_what_is_not_understood(tmp_path: Path) -> None:
    file = opened(tmp_path, {"x.diff_b": random(ROWS), "y.lora_up.weight": UP, "z.on_input": torch.tensor(True)})
    assert (list(file.biases), list(file.layers)) == (["x"], [])
    assert set(file.unknown) == {"y.lora_up.weight", "z.on_input"}


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_down.weight": DOWN, "lora_up.weight": random(ROWS, RANK + 1)},
        {"lora_down.weight": random(0, COLUMNS), "lora_up.weight": random(ROWS, 0)},
        {"lora_down.weight": torch.tensor(1.0), "lora_up.weight": UP},
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": random(2)},
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(float("nan"))},
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "lora_mid.weight": random(2, 2, 3, 3)},
        {**HADAMARD, "hada_w2_a": random(ROWS + 1, 2)},
        {**TUCKER, "hada_t2": random(3, 2, 3, 3)},
        {"lokr_w1": LEFT, "lokr_w2_a": random(6, 2), "lokr_w2_b": random(3, 16)},
        {"lokr_w1": random(3), "lokr_w2": RIGHT},
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, parts: Tensors) -> None:
    with pytest.raises(CheckpointError, match="x\\."):
        opened(tmp_path, {f"x.{name}": part for name, part in parts.items()})


MAGNITUDES: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "PEFT": ("lora_magnitude_vector", (ROWS,), False),
    "PEFT, as a module's weight": ("lora_magnitude_vector.weight", (ROWS,), False),
    "PEFT, with the adapter's name": ("lora_magnitude_vector.default.weight", (ROWS,), False),
    "PEFT, of a convolution": ("lora_magnitude_vector.weight", (1, ROWS, 1, 1), False),
    "LyCORIS": ("dora_scale", (ROWS, 1), False),
    "LyCORIS, of columns": ("dora_scale", (1, COLUMNS), True),
    "LyCORIS, of a convolution's columns": ("dora_scale", (1, COLUMNS, 1, 1), True),
}


@pytest.mark.parametrize("form", MAGNITUDES)
def test_magnitudes_say_whose_lengths_they_are(tmp_path: Path, form: str) -> None:
    name, shape, of_columns = MAGNITUDES[form]
    given = random(*shape)
    file = opened(tmp_path, {**LOW_RANK["kohya"], f"x.{name}": given})
    assert not file.unknown
    assert file.magnitudes["x"].of_columns == of_columns
    np.testing.assert_array_equal(numbers(file.magnitudes["x"].lengths), given.flatten().numpy())


def test_magnitudes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for shape in ((ROWS + 1,), (1, ROWS), (COLUMNS, 1)):
        with pytest.raises(CheckpointError, match=r"x\.dora_scale.*does not go with 24 rows and 32 columns"):
            opened(tmp_path, {**LOW_RANK["kohya"], "x.dora_scale": random(*shape)})


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_merging_keeps_the_type(tmp_path: Path, kind: str) -> None:
    """In pieces and as a whole, and as exactly as the type allows."""
    change = opened(tmp_path, LOW_RANK["kohya"]).layers["x"]
    values = random(ROWS, COLUMNS).numpy()
    plain = Weight("w", F32, values.shape, View(memoryview(values.tobytes())))
    stored = merged(plain, []) if kind == "F32" else _stored(values, kind)
    result = merged(stored, [(change, 0.5), (change, -0.25)])
    assert (result.type, result.shape) == (TYPES[kind], values.shape)
    wanted = numbers(stored) + 0.25 * SCALE * (UP @ DOWN).numpy()
    loss = {"F32": 1e-6, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2}[kind] * np.abs(wanted).max()
    np.testing.assert_allclose(numbers(result), wanted, atol=loss)
    whole, third = bytes(result.data()), result.nbytes // 3
    assert b"".join(result.pieces(0, third)) + b"".join(result.pieces(third)) == whole


def _stored(values: np.ndarray, kind: str) -> Weight:
    import gguf

    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).tobytes()
    return Weight("w", TYPES[kind], values.shape, View(memoryview(data)))


def test_types_that_nothing_writes_are_refused(tmp_path: Path) -> None:
    change = opened(tmp_path, LOW_RANK["kohya"]).layers["x"]
    kind = TYPES["Q4_K"]
    weight = Weight("w", kind, (ROWS, 256), View(memoryview(bytes(kind.row_bytes(ROWS * 256)))))
    assert not can_merge(kind)
    with pytest.raises(CheckpointError, match="'w': nothing can be merged into it: Q4_K can't be made"):
        merged(weight, [(change, 1.0)])
