"""Learnt words (textual inversion) in prompts: the picture is that of a model whose vocabulary has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdrpc.device import Device
from sdrpc.diffusion.embeddings import Embeddings
from sdrpc.diffusion.session import Session
from sdrpc.errors import CheckpointError, InvalidValue
from sdrpc.families.model import Model, open_model
from sdrpc.prompts import END_ID, clip_chunks, clip_tokenizer
from sdrpc.prompts.learned import FIRST
from sdrpc.runtime.cache import Cache
from tests.support.pictures import BOUNDS, Case, Checkpoints, drawing, request
from tests.support.references.draw import draw, psnr

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' scheduler with numpy 2

SD1, SDXL = Case("sd1", "safetensors"), Case("sdxl", "safetensors")


@pytest.fixture(scope="module")
def model(checkpoints: Checkpoints) -> Model:
    return open_model(checkpoints.files(SD1))


def vectors(width: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.5


def taught(pipeline: Any, words: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Give the pipeline's own encoders the words, as diffusers' load_textual_inversion does: each vector is a token.
    How the words are spelled then."""
    spelled = {}
    for word, tables in words.items():
        tokens = [f"<{word}-{number}>" for number in range(len(next(iter(tables.values()))))]
        spelled[word] = "".join(tokens)
        for folder, table in tables.items():
            encoder = getattr(pipeline, folder)
            tokenizer = getattr(pipeline, folder.replace("text_encoder", "tokenizer"))
            tokenizer.add_tokens(tokens)
            encoder.resize_token_embeddings(len(tokenizer))
            encoder.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(tokens)] = table
            for module in encoder.modules():  # else the text is pooled at its highest token, which is a new one
                if hasattr(module, "eos_token_id"):
                    module.eos_token_id = END_ID
    return spelled


@pytest.mark.parametrize("case", [SD1, SDXL], ids=str)
def test_a_picture_with_learnt_words_is_that_of_diffusers(
    case: Case, checkpoints: Checkpoints, device: Device, tmp_path: Path, cache: Cache
) -> None:
    pipeline = checkpoints.made(case).pipeline()
    folders = {"clip_l": "text_encoder"} | ({"clip_g": "text_encoder_2"} if case is SDXL else {})
    widths = {name: getattr(pipeline, folder).config.hidden_size for name, folder in folders.items()}
    styles = {name: vectors(width, 3) for name, width in widths.items()}
    save_file(styles if case is SDXL else {"emb_params": styles["clip_l"]}, tmp_path / "my-style.safetensors")
    spelled = taught(pipeline, {"style": {folders[name]: table for name, table in styles.items()}})
    wanted = draw(pipeline, replace(drawing(case), prompt=f"a cat in {spelled['style']} colours")).pixels
    asked = replace(request(case), prompt="a cat in my-style colours")
    with Session.open(checkpoints.files(case), device, cache, embd_dir=tmp_path) as session:
        (picture,) = session.generate(asked)
        (other,) = session.generate(replace(asked, prompt="a cat in embedding:My-Style colours"))
        (without,) = session.generate(replace(asked, prompt="a cat in plain colours"))
    assert psnr(picture.image, wanted) >= BOUNDS["exact"]
    assert (other.image == picture.image).all()
    assert psnr(without.image, wanted) < 40


def test_every_form_of_file(model: Model, tmp_path: Path) -> None:
    width = model["clip_l"].config["hidden_size"]
    table = vectors(width, 2)
    save_file({"emb_params": table}, tmp_path / "one.safetensors")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": table}, "name": "two"}, tmp_path / "two.pt")
    torch.save({"<three>": table[0]}, tmp_path / "three.bin")
    found = Embeddings(model, tmp_path)
    for word, count in (("one", 2), ("two", 2), ("three", 1)):
        learned = found.of(f"a {word} cat")
        assert learned.words == {word: tuple(range(FIRST, FIRST + count))}
        torch.testing.assert_close(torch.from_numpy(learned.vectors["clip_l"]), table[:count])


def test_words_are_found_on_their_own_and_keep_their_weight(model: Model, tmp_path: Path) -> None:
    width = model["clip_l"].config["hidden_size"]
    save_file({"emb_params": vectors(width, 2)}, tmp_path / "glow.safetensors")
    save_file({"emb_params": vectors(width, 1)}, tmp_path / "glow-2.safetensors")
    prompt = "glowing (embedding:glow:1.3), Glow-2 aglow"
    learned = Embeddings(model, tmp_path).of(prompt)
    tokens = clip_chunks(prompt, learned=learned)
    word = {part: clip_tokenizer().encode(part, add_special_tokens=False).ids for part in ("glowing", ",", "aglow")}
    glow, two = learned.words["glow"], learned.words["glow-2"]
    wanted = [*word["glowing"], *glow, *word[","], *two, *word["aglow"]]
    assert tokens.ids[0, 1 : 1 + len(wanted)].tolist() == wanted
    start = 1 + len(word["glowing"])
    assert tokens.weights[0, start : start + 2].tolist() == pytest.approx([1.3, 1.3])


def test_refusals(model: Model, checkpoints: Checkpoints, tmp_path: Path) -> None:
    width = model["clip_l"].config["hidden_size"]
    with pytest.raises(InvalidValue, match=r"embedding:glow: no such embedding .*there is none"):
        Embeddings(model, None).of("a embedding:glow cat")
    with pytest.raises(InvalidValue, match="is no folder"):
        Embeddings(model, tmp_path / "absent").of("a cat")
    save_file({"emb_params": vectors(width + 1, 1)}, tmp_path / "wide.safetensors")
    found = Embeddings(model, tmp_path)
    with pytest.raises(InvalidValue, match="there are wide"):
        found.of("embedding:other")
    with pytest.raises(CheckpointError, match=rf"no word for this .* has vectors of {width}"):
        found.of("a wide cat")
    save_file({"emb_params": torch.full((1, width), float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        Embeddings(model, tmp_path).of("a nan cat")
    save_file({f"layers.{i}.bias": vectors(width, 1) for i in range(40)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is no word: it has 40 tensors, as models have"):
        Embeddings(model, tmp_path).of("a model cat")
