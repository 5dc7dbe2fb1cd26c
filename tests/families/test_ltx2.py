"""LTX-2: what shapes and names tell, what the model is told about a prompt, when things are, and its autoencoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers, convert_ltx2_vae_to_diffusers
from diffusers.pipelines.ltx2.connectors import per_layer_masked_mean_norm, per_token_rms_norm
from safetensors.torch import load_file, save_file

from sdrpc.checkpoints.checkpoint import Checkpoint, Tokenizer
from sdrpc.checkpoints.expressions import cast
from sdrpc.diffusion.device_component import captured
from sdrpc.diffusion.drawable import latents_shape, settings_of, with_sound
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.engine import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import CheckpointError, InvalidValue, MissingComponent
from sdrpc.families.base import F32, Config, Found, ModuleSpec, Prompt, find
from sdrpc.families.components import film_ltx, gemma3, ltx2_connectors, sound
from sdrpc.families.components.autoencoder import ENCODES
from sdrpc.families.ltx2 import LTX2, TRANSFORMER, conditions, sound_length
from sdrpc.families.model import Model, ModelFiles, open_model
from sdrpc.families.registry import FAMILIES
from sdrpc.ggml.types import F16
from sdrpc.ggml.types import F32 as FLOATS
from sdrpc.ggml.weight import Weight
from sdrpc.server.limits import Limits
from sdrpc.targets import SDRPC
from tools.checkpoints import FAMILIES as CHECKPOINTS
from tools.checkpoints import Made, make
from tools.checkpoints.families import Component
from tools.checkpoints.tokenizers import gemma_entries

CONNECTED = "video_embeddings_connector.learnable_registers"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("ltx2", tmp_path_factory.mktemp("ltx2"), form="parts")


@pytest.fixture(scope="module")
def model(made: Made) -> Model:
    return opened(made.files)


def opened(files: dict[str, Path], **others: Path) -> Model:
    files = {name + "_model" if name == "diffusion" else name: path for name, path in {**files, **others}.items()}
    return open_model(ModelFiles(**files))


def in_a_file(component: Component, whole: bool = False) -> Checkpoint:
    """A checkpoint with the shapes of a component in its original names, and no numbers."""
    shapes = component.shapes()
    names = component.whole if whole else component.alone
    entries = {entry.name: entry.shape(shapes) for entry in names(shapes)}
    weights = {name: Weight(name, F16, shape, lambda *_: ()) for name, shape in entries.items()}
    return Checkpoint(Path("m"), weights, tokenizers={"": Tokenizer(entries=gemma_entries)})


def found_in(component: Any, checkpoint: Checkpoint) -> Found:
    found = find(component, checkpoint)
    assert found is not None
    return found


PARTS = [
    pytest.param(part, id=f"{version} {part.name}")
    for version in ("ltx2", "ltx2.3")
    for part in CHECKPOINTS[version].of_size("full")
    if version == "ltx2" or part.name != "llm"
]


@pytest.mark.parametrize("part", PARTS)
def test_published_models_are_told_by_their_shapes(part: Component) -> None:
    component = LTX2.component(part.name)
    found = found_in(component, in_a_file(part))
    config = component.configure(found, {})
    if part.name == "llm":
        wanted = {"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 3840}
        assert {name: config[name] for name in wanted} == wanted
        config = {**config, "states": [0]}
    else:
        with torch.device("meta"):
            theirs = dict(part.build().config)
        if config.get("per_modality_projections"):  # which does not need to know how many states there are
            theirs |= {"caption_channels": 3840 * 49, "text_proj_in_factor": 1}
        if config.get("use_prompt_embeddings") is False:  # nor how wide texts were
            theirs |= {"caption_channels": 4096}
        if config.get("per_modality_projections") is False:
            theirs |= {"video_hidden_dim": 3840, "audio_hidden_dim": 3840}
        assert json.loads(json.dumps({name: theirs[name] for name in config})) == config
    with torch.device("meta"):
        module, _ = component.build(config)
    unheard = ("encoder.",) if part.name == "audio_vae" else ()
    wanted_shapes = {name: shape for name, shape in found.shapes.items() if not name.startswith(unheard)}
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == wanted_shapes


def test_the_vocoders_are_told_in_a_file_of_everything_too() -> None:
    for version, wide in (("ltx2", False), ("ltx2.3", True)):
        part = next(each for each in CHECKPOINTS[version].of_size("tiny") if each.name == "vocoder")
        config = sound.GENERATOR.configure(found_in(sound.GENERATOR, in_a_file(part, whole=True)), {})
        assert ("bwe_in_channels" in config, sound.rate(config)) == (wide, 48000 if wide else 24000)


def test_without_what_decodes_sound_a_film_is_silent(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    files = {name: path for name, path in made.files.items() if name != "vocoder"}
    model = opened(files)
    assert "vocoder" not in model.components
    assert "audio_vae" in model.components
    device = LocalDevice("CPU", torch.device("cpu"), EXACT)
    session = Session(model, {"all": device})
    settings = settings_of(model, Request("a", width=64, height=64, video_frames=9, seed=1), True)
    assert not session._is_audible(settings)
    assert "the film is silent, for no file that was named has its vocoder" in caplog.text
    session.close()
    device.close()


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("latents_mean", (100,), "numbers are no 8 channels|needs"),
        ("decoder.up.1.block.0.conv2.conv.weight", (100, 128, 3, 3), "no multiples of 128"),
    ],
)
def test_an_audio_vae_of_other_shapes_is_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    part = next(each for each in CHECKPOINTS["ltx2"].of_size("tiny") if each.name == "audio_vae")
    found = found_in(sound.AUTOENCODER, in_a_file(part))
    changed = {**found.tensors, name: replace(found.tensors[name], shape=shape)}
    with pytest.raises(CheckpointError, match=said):
        sound.AUTOENCODER.configure(replace(found, tensors=changed), {})


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("upsamplers.0.weight", (32, 16, 7), "no vocoder that is known"),
        ("conv_out.weight", (6, 1, 7), "6 ears"),
        ("conv_in.weight", (48, 128, 7), "48 channels can't be halved 5 times"),
    ],
)
def test_a_vocoder_of_other_shapes_is_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    part = next(each for each in CHECKPOINTS["ltx2"].of_size("tiny") if each.name == "vocoder")
    found = found_in(sound.GENERATOR, in_a_file(part))
    changed = {**found.tensors, name: replace(found.tensors[name], shape=shape)}
    with pytest.raises(CheckpointError, match=said):
        sound.GENERATOR.configure(replace(found, tensors=changed), {})
    with pytest.raises(CheckpointError, match=r"upsample_factors of the vocoder is \[2\]"):
        sound.GENERATOR.configure(found, {"upsample_factors": [2]})


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("mel_stft.mel_basis", (32, 257), "32 frequencies for 2 ears"),
        ("mel_stft.stft_fn.forward_basis", (300, 1, 512), "300 waves of 512 samples"),
    ],
)
def test_a_vocoder_whose_halves_do_not_fit_is_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    part = next(each for each in CHECKPOINTS["ltx2.3"].of_size("tiny") if each.name == "vocoder")
    found = found_in(sound.GENERATOR, in_a_file(part))
    changed = {**found.tensors, name: replace(found.tensors[name], shape=shape)}
    with pytest.raises(CheckpointError, match=said):
        sound.GENERATOR.configure(replace(found, tensors=changed), {})


def test_no_other_family_takes_it() -> None:
    found = found_in(TRANSFORMER, in_a_file(next(c for c in CHECKPOINTS["ltx2"].of_size("tiny"))))
    seen = {each.name: find(each.diffusion, found.checkpoint) for each in FAMILIES}
    assert [each.name for each in FAMILIES if (one := seen[each.name]) and each.recognizes(one)] == ["ltx2"]


def test_names_become_those_of_diffusers_own_conversion() -> None:
    for name, ours, convert in (
        ("diffusion", TRANSFORMER, convert_ltx2_transformer_to_diffusers),
        ("vae", film_ltx.VAE_2, convert_ltx2_vae_to_diffusers),
    ):
        file = in_a_file(next(c for c in CHECKPOINTS["ltx2"].of_size("full") if c.name == name), whole=True)
        theirs = convert({name: torch.empty(weight.shape, device="meta") for name, weight in file.tensors.items()})
        assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == found_in(ours, file).shapes


def test_a_picture_is_encoded_as_by_diffusers_and_a_film_decoded(made: Made, model: Model) -> None:
    theirs, config = made.component("vae"), model["vae"].config
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    latents = torch.randn(1, 128, 2, 2, 3, generator=generator)
    mean, deviation = (each[None, :, None, None, None] for each in (theirs.latents_mean, theirs.latents_std))
    with torch.no_grad():
        module, encode = film_ltx.build_2({**config, ENCODES: True})
        module.load_state_dict(theirs.state_dict())
        (told,) = encode(module, picture)
        _, decode = film_ltx.build_2(config)
        frames = decode(module, latents)
        wanted = theirs.encode(picture[:, :, None]).latent_dist
        film = theirs.decode(latents * deviation + mean).sample[0].transpose(0, 1)
    assert [len(each) for each in frames] == [1, 8]
    torch.testing.assert_close(torch.cat(frames), film.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        told[:, :128] * deviation[:, :, 0] + mean[:, :, 0], wanted.mean[:, :, 0], rtol=1e-4, atol=1e-4
    )


def test_a_server_takes_the_graph_of_the_published_model() -> None:
    """The largest of all, counted by what the second block has more than the first."""
    found = found_in(TRANSFORMER, in_a_file(next(c for c in CHECKPOINTS["ltx2.3"].of_size("full"))))
    config = TRANSFORMER.configure(found, {})
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, 128, 5, 4, 6), "timestep": (1,), "context": (2, 1024, 4096), "sound_context": (2, 1024, 2048),
        "times": (2, 4), "sounds": (2, 20), "first": (2, 128, 1, 4, 6),
    }  # fmt: skip
    inputs = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    one, two = (
        len(captured(ModuleSpec(TRANSFORMER, {**config, "num_layers": n}), inputs, SDRPC, {}).graph.tensors)
        for n in (1, 2)
    )
    assert config["num_layers"] == 48
    assert one + 47 * (two - one) <= Limits().tensors


# What is told ---------------------------------------------------------------------------------------------------------


def test_hidden_states_are_normalized_as_by_diffusers() -> None:
    hidden = torch.randn(1, 5, 3, 8, generator=torch.Generator().manual_seed(1)) * 40 + 7
    ours = ltx2_connectors.normalized(hidden.reshape(1, 5, 24).numpy(), 3)
    theirs = per_layer_masked_mean_norm(hidden.transpose(2, 3), torch.tensor([5]), "cpu")
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)
    ours = ltx2_connectors.token_normalized(hidden.reshape(1, 5, 24).numpy(), 3)
    theirs = per_token_rms_norm(hidden.transpose(2, 3)).flatten(2)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


class Encoder:
    """Stands for Gemma and the connectors: hidden states that are the tokens' numbers."""

    pictures: tuple[F32, ...] = ()

    def __init__(self, model: Model) -> None:
        self._model = model
        self.seen: F32 | None = None

    def __call__(self, component: str, inputs: Any, **options: Any) -> tuple[F32, ...]:
        if component == "llm":
            assert options["states"] == list(range(7))
            return (np.repeat(inputs["ids"][..., None] + 7.0, 7 * 128, axis=2).astype(np.float32),)
        self.seen = inputs["seen"]
        assert inputs["hidden"].shape == (1, self.seen.shape[1], 7 * 128)
        return (np.zeros((1, 1024, 128), np.float32), np.ones((1, 1024, 128), np.float32))

    def config(self, component: str) -> Config:
        return self._model[component].config

    def tokenizer(self, component: str) -> Any:
        return self._model[component].tokenizer

    def has(self, component: str) -> bool:
        raise AssertionError


def prompt(text: str) -> Prompt:
    return Prompt(text, 64, 96, -1, 3.5, frames=17, fps=24)


def test_positions_are_those_of_diffusers(made: Made, model: Model) -> None:
    encoder = Encoder(model)
    told = conditions(encoder, prompt(" a lovely cat "))
    assert encoder.seen is not None
    assert encoder.seen.shape == (1, 64, 1)
    assert encoder.seen.sum() == len(model["llm"].tokenizer.encode("<bos>a lovely cat").ids)  # type: ignore[union-attr]
    theirs = made.component("diffusion")
    edges = theirs.rope.prepare_video_coords(1, 3, 1, 1, torch.device("cpu"), fps=24.0)[:, 0]
    np.testing.assert_array_equal(told["times"], edges.mean(-1).numpy())
    length = sound_length(17, 24)
    assert length == round(17 / 24 * 25)
    sounds = theirs.audio_rope.prepare_audio_coords(1, length, torch.device("cpu"))[:, 0]
    np.testing.assert_allclose(told["sounds"], sounds.mean(-1).numpy(), rtol=1e-6)
    assert (told["context"].mean(), told["sound_context"].mean()) == (0, 1)


def test_what_can_not_be_told_is_refused(model: Model) -> None:
    with pytest.raises(InvalidValue, match=r"has \d+ tokens; LTX-2 reads 1024"):
        conditions(Encoder(model), prompt("cat " * 1200))
    with pytest.raises(InvalidValue, match="width 32: LTX-2 draws at least 64 pixels on a side"):
        settings_of(model, Request("a cat", width=32, height=64), video=True)


def test_what_a_request_means(model: Model) -> None:
    assert (model.size, model.frames, model.defaults.frames, model.defaults.fps) == ((768, 512), 8, 121, 24)
    request = Request("a cat", width=100, height=64, video_frames=16)
    settings = settings_of(model, request, video=True)
    assert (settings.width, settings.height, settings.video_frames, settings.scheduler) == (128, 64, 9, "ltx2")
    shape = latents_shape(model, settings)
    assert shape == (1, 128, 2, 2, 4)
    assert with_sound(model, settings, shape) == (1, 128, 2 + 2, 2, 4), "9 latents of sound in frames of 8"


@pytest.mark.parametrize(
    ("frames", "ends", "reason"),
    [(9, ("init_image", "end_image"), "what a film begins with, no end"), (1, ("init_image",), "and no pictures")],
)
def test_pictures_that_it_can_not_take_are_refused(
    frames: int, ends: tuple[str, ...], reason: str, model: Model
) -> None:
    shown: dict[str, Any] = {name: np.zeros((64, 64, 3), np.uint8) for name in ends}
    with pytest.raises(InvalidValue, match=reason):
        settings_of(model, Request("a cat", video_frames=frames, **shown), video=True)


# Wrong files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "name", "shape", "reason"),
    [
        ("diffusion", "keyframes_abs_pos_embedding", (1, 256), "this is LTX-2.5"),
        ("diffusion", "audio_proj_out.weight", (64, 128), "128 and 128 channels of pictures, 128 and 64 of sound"),
        ("diffusion", "audio_patchify_proj.weight", (100, 128), r"audio_num_attention_heads .* not divide \[100\]"),
        ("connectors", "text_embedding_projection.aggregate_embed.weight", (128, 800), "makes 128 numbers of 800"),
        ("connectors", "text_embedding_projection.aggregate_embed.weight", (128, 768), "llm gives 896 hidden numbers"),
        ("connectors", f"model.diffusion_model.{CONNECTED}", (100, 128), "has 100 registers of 128 numbers for 1024"),
        ("vae", "encoder.down_blocks.0.res_blocks.0.conv1.conv.weight", (9, 9, 3, 3, 3), "begins with 9 channels"),
        ("llm", "model.layers.0.self_attn.q_norm.weight", None, "this is Gemma 2, and not Gemma 3"),
        ("llm", "spiece_model", None, "brings no vocabulary.*gemma_3_12B_it"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_are_refused(
    part: str, name: str, shape: tuple[int, ...] | None, reason: str, made: Made, tmp_path: Path
) -> None:
    """``shape``: of the tensor in the file; None: it is not there."""
    tensors = load_file(made.files[part])
    tensors.pop(name, None)
    save_file(tensors | ({} if shape is None else {name: torch.zeros(shape)}), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=reason):
        opened(made.files, **{part: tmp_path / "other.safetensors"})


def test_connectors_are_found_in_the_diffusion_models_file_or_their_own(made: Made, tmp_path: Path) -> None:
    files = dict(made.files)
    both = load_file(files["connectors"]) | {
        f"model.diffusion_model.{name}": each for name, each in load_file(files["diffusion"]).items()
    }
    del files["connectors"]
    with pytest.raises(MissingComponent, match="no text connectors, which LTX-2 needs"):
        opened(files)
    save_file(both, tmp_path / "both.safetensors")
    found = opened(files, diffusion=tmp_path / "both.safetensors")
    assert found.unused([w for each in found.components.values() for w in each.found.tensors.values()]) == {}


def test_autoencoders_of_the_two_are_not_taken_for_each_other(made: Made, tmp_path: Path) -> None:
    for name in ("ltx-video", "ltx-video-13b"):
        older = make(name, tmp_path / name, form="parts").files
        with pytest.raises(CheckpointError, match="this is the VAE of LTX-Video, and not LTX-2's"):
            opened(made.files, vae=older["vae"])
        with pytest.raises(CheckpointError, match="this is the VAE of LTX-2, and not LTX-Video's"):
            opened(older, vae=made.files["vae"])


def test_parts_of_other_versions_are_refused(made: Made, tmp_path: Path) -> None:
    newer = make("ltx2.3", tmp_path / "newer", form="parts").files
    with pytest.raises(CheckpointError, match=r"vae gives 4 steps .*, but diffusion takes 3"):
        opened(made.files, vae=newer["vae"])
    with pytest.raises(CheckpointError, match="connectors gives 256 channels, but diffusion takes 128"):
        opened(made.files, connectors=newer["connectors"])
    wrong = {
        "text_embedding_projection.audio_aggregate_embed.weight": torch.zeros(64, 896),
        f"model.diffusion_model.{CONNECTED.replace('video', 'audio')}": torch.zeros(128, 64),
    }
    save_file(load_file(newer["connectors"]) | wrong, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="connectors gives 64 channels for sound, but diffusion takes 128"):
        opened(newer, connectors=tmp_path / "other.safetensors")


def test_layers_of_gemma_are_found_in_a_model_that_sees(made: Made, model: Model, tmp_path: Path) -> None:
    for prefix in ("language_model.model.", "model.language_model."):
        renamed = {name.replace("model.", prefix, 1): each for name, each in load_file(made.files["llm"]).items()}
        save_file({**renamed, "vision_tower.patch.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
        other = opened(made.files, llm=tmp_path / "other.safetensors")["llm"]
        assert other.found.shapes == model["llm"].found.shapes
        assert other.found.component.name == gemma3.GEMMA3.name


def test_gguf_files_are_read_as_the_same(model: Model, tmp_path: Path) -> None:
    """llama.cpp's converter adds 1 to the weights of norms, which the class does itself."""
    other = opened(make("ltx2", tmp_path, form="gguf-parts", type="Q8_0").files)
    assert {name: each.config for name, each in other.components.items()} == model.configs
    for name in ("norm.weight", "layers.0.self_attn.q_norm.weight", "layers.5.post_feedforward_layernorm.weight"):
        (one, two) = (cast(each["llm"].found.tensors[name], FLOATS).data() for each in (other, model))
        np.testing.assert_allclose(np.frombuffer(one, np.float32), np.frombuffer(two, np.float32), atol=1e-3)  # F16
    assert other["llm"].tokenizer is not None


def test_other_positions_are_refused(model: Model) -> None:
    with pytest.raises(CheckpointError, match="positions of kind 'interleaved' are not supported"):
        TRANSFORMER.configure(model["diffusion"].found, {"rope_type": "interleaved"})
