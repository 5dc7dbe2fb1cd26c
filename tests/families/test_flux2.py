"""FLUX.2: what its language models are told, what its diffusion model sees, and which files make one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from sdrpc.errors import CheckpointError, InvalidValue
from sdrpc.families import flux2
from sdrpc.families.base import F32, Config, Prompt
from sdrpc.families.components.llm import causal_mask
from sdrpc.families.model import ModelFiles, open_model
from sdrpc.prompts import Template, llm_tokens, mistral_tokenizer, qwen_tokenizer, t5_tokenizer
from tools.checkpoints import Made, make

WIDTH = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("flux2-klein-4b", tmp_path_factory.mktemp("klein"), form="parts", type="BF16")


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("flux2-dev", tmp_path_factory.mktemp("dev"), form="parts", type="BF16")


def files(made: Made, **changes: Path) -> ModelFiles:
    paths = {"diffusion_model" if name == "diffusion" else name: path for name, path in made.files.items()}
    return ModelFiles(**{**paths, **changes})


class Encoder:
    """Stands for a language model, and keeps what it was told."""

    def __init__(self, own: Any = None, words: int = 151936) -> None:
        self.own, self.words = own, words
        self.told: dict[str, NDArray[Any]] = {}
        self.options: dict[str, Any] = {}
        self.pictures = ()

    def __call__(self, component: str, inputs: dict[str, NDArray[Any]], **options: Any) -> tuple[F32, ...]:
        assert component == "llm"
        self.told, self.options = inputs, options
        places = np.arange(inputs["ids"].shape[1], dtype=np.float32)
        return (np.broadcast_to(places[None, :, None] + 1, (1, len(places), WIDTH)).copy(),)

    def config(self, component: str) -> Config:
        return {"vocab_size": self.words}

    def tokenizer(self, component: str) -> Any:
        return self.own

    def has(self, component: str) -> bool:
        return True


def asked(text: str) -> Prompt:
    return Prompt(text, 64, 64, -1, 2.5)


@pytest.mark.parametrize("text", ["", "a lovely cat", "cat " * 480, "cat " * 600])
def test_kleins_padding_stands_behind_the_text_and_sees_it(text: str) -> None:
    encoder = Encoder()
    told = flux2.klein_conditions(encoder, asked(text))
    tokens = llm_tokens(text, flux2.KLEIN_TEMPLATE, qwen_tokenizer()).ids[0]
    length, whole = len(tokens), max(512, -(-len(tokens) // 64) * 64)
    assert encoder.options == {"states": [9, 18, 27]}
    assert encoder.told["ids"].tolist() == [[*tokens, *[151643] * (whole - length)]]
    rows, columns = np.mgrid[:whole, :whole]
    assert np.array_equal(encoder.told["mask"][0, 0] == 0, (columns <= rows) & (columns < length))
    assert "seen" not in encoder.told
    assert told.keys() == {"context"}
    assert told["context"].shape == (1, whole, WIDTH)


@pytest.mark.parametrize("text", ["", "a lovely [IMG]cat"])
def test_devs_padding_stands_before_the_text_and_sees_nothing(text: str) -> None:
    encoder = Encoder()
    told = flux2.dev_conditions(encoder, asked(text))
    tokens = llm_tokens(text.replace("[IMG]", ""), flux2.DEV_TEMPLATE, mistral_tokenizer()).ids[0]
    before = 512 - len(tokens)
    assert encoder.options == {"states": [10, 20, 30]}
    assert encoder.told["ids"].tolist() == [[*[11] * before, *tokens]]
    assert tokens[:2].tolist() == [1, 17]
    seen = np.arange(512) >= before
    assert np.array_equal(encoder.told["seen"][0], seen)
    rows, columns = np.mgrid[:512, :512]
    wanted = (columns <= rows) & seen | (columns == rows)  # its own, which the module makes nothing of
    assert np.array_equal(encoder.told["mask"][0, 0] == 0, wanted)
    assert told["guidance"].tolist() == [2.5]


def test_a_mask_leaves_no_row_without_anything_to_see() -> None:
    for seen in (np.ones(5, bool), np.zeros(5, bool), np.array([False, True, False, True, False])):
        mask = causal_mask(seen)
        assert mask.dtype == np.float32
        assert (mask == 0).any(-1).all()


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(InvalidValue, match="no such token"):
        flux2.klein_conditions(Encoder(t5_tokenizer()), asked("cat"))
    with pytest.raises(InvalidValue, match="has the token 151668, but the language model knows 151643: its tokenizer"):
        flux2.klein_conditions(Encoder(words=151643), asked("cat"))


def test_pictures_that_are_shown_have_numbers_of_their_own(made: Made) -> None:
    config = open_model(files(made))["diffusion"].config
    theirs = made.component("diffusion")
    ours, call = flux2.build(config)
    ours.load_state_dict(theirs.state_dict())
    rng = torch.Generator().manual_seed(5)
    latents, context = torch.randn(1, 128, 3, 5, generator=rng), torch.randn(2, 7, 192, generator=rng)
    shown = [torch.randn(1, 128, *size, generator=rng) for size in ((2, 4), (5, 3))]
    with torch.no_grad():
        references = {f"reference_{n}": picture.expand(2, -1, -1, -1) for n, picture in enumerate(shown)}
        (mine,) = call(ours.eval(), latents, torch.tensor([0.7]), context, **references)
        pictures = [Flux2KleinPipeline._pack_latents(picture) for picture in (latents, *shown)]
        places = (Flux2KleinPipeline._prepare_latent_ids(latents), Flux2KleinPipeline._prepare_image_ids(shown))
        wanted = theirs(
            hidden_states=torch.cat(pictures, 1).expand(2, -1, -1),
            timestep=torch.full((2,), 0.7),
            encoder_hidden_states=context,
            img_ids=torch.cat(places, 1).expand(2, -1, -1),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(context),
            return_dict=False,
        )[0][:, : 3 * 5]
    wanted = wanted.transpose(1, 2).reshape(2, 128, 3, 5)
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_what_a_request_means(made: Made, dev: Made, tmp_path: Path) -> None:
    klein = open_model(files(made))
    assert klein.family.name == "flux2-klein"
    assert (klein.defaults.steps, klein.defaults.cfg_scale) == (4, 1.0)
    assert (klein.size, klein.pixels, klein.latent_channels) == ((1024, 1024), 16, 128)
    distilled = open_model(files(dev))
    assert distilled.family.name == "flux2"
    assert (distilled.defaults.guidance, distilled.defaults.cfg_scale) == (4.0, 1.0)
    folder = make("flux2-klein-4b", tmp_path, form="diffusers", type="BF16").files["model"]
    assert open_model(ModelFiles(folder)).defaults.cfg_scale == 4.0  # which says that it is not distilled
    said = folder / "model_index.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"is_distilled": True}))
    assert open_model(ModelFiles(folder)).defaults == klein.defaults


def test_wrong_parts_are_refused_in_a_line(made: Made, dev: Made, tmp_path: Path) -> None:
    for changes, reason in (
        ({"llm": made.files["vae"]}, "has no Qwen3 text encoder, which FLUX.2 klein needs; what it has: VAE"),
        ({"llm": dev.files["llm"]}, "has no Qwen3 text encoder, which FLUX.2 klein needs; what it has: Mistral"),
        ({"vae": made.files["llm"]}, "has no VAE, which FLUX.2 klein needs; what it has: Qwen3"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            open_model(files(made, **changes))
    weights = load_file(made.files["llm"])
    short = {name: weight for name, weight in weights.items() if not name.startswith("model.layers.2")}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="has 2 layers; what the diffusion model reads is the result of layer 27"):
        open_model(files(made, llm=tmp_path / "short.safetensors"))
    flux1 = make("flux1-schnell", tmp_path, form="parts", type="BF16").files
    with pytest.raises(
        CheckpointError, match=r"the VAE has no such tensor.*bn\.running_mean|bn\.running_mean.*no such"
    ):
        open_model(files(made, vae=flux1["vae"]))
    paths = {name: path for name, path in flux1.items() if name != "diffusion"}
    with pytest.raises(CheckpointError, match="vae gives 128 channels, but diffusion takes 64"):
        open_model(ModelFiles(diffusion_model=flux1["diffusion"], **paths | {"vae": made.files["vae"]}))


def test_a_decoder_narrower_than_its_encoder(made: Made, tmp_path: Path) -> None:
    """As FLUX.2-small-decoder, which is an alternative."""
    from diffusers import AutoencoderKLFlux2

    make_vae: Any = AutoencoderKLFlux2
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    small = make_vae(
        block_out_channels=(32, 32, 64, 64), decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=1, **kinds
    )
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    model = open_model(files(made, vae=tmp_path / "small.safetensors"))
    built, _ = model["vae"].module().build()
    wanted = {name: tuple(tensor.shape) for name, tensor in built.named_parameters()}
    assert model["vae"].found.take(wanted).keys() == wanted.keys()


def test_layers_that_nobody_reads_are_not_counted(made: Made) -> None:
    found = open_model(files(made))["llm"].found
    unread = [weight for name, weight in found.tensors.items() if name.startswith(("layers.27.", "norm."))]
    assert len(unread) == 12
    assert found.nbytes() == sum(w.nbytes for w in found.tensors.values()) - sum(w.nbytes for w in unread)


def test_templates_are_those_of_the_pipelines(made: Made) -> None:
    """Of Qwen3 without thinking; and FLUX.2's own system message."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    assert flux2.DEV_TEMPLATE.before == f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]"
    pipeline = made.pipeline()
    message = [{"role": "user", "content": "cat"}]
    whole = pipeline.tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert isinstance(flux2.KLEIN_TEMPLATE, Template)
    assert whole == f"{flux2.KLEIN_TEMPLATE.before}cat{flux2.KLEIN_TEMPLATE.after}"
