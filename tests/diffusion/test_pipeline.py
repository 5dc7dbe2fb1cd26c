"""From a request to pixels: what is asked of the parts, and that parts on a device equal torch in process."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sdrpc.diffusion import modules
from sdrpc.diffusion.clock import Clock
from sdrpc.diffusion.model import Model, ModelFiles, ModelPart, open_model
from sdrpc.diffusion.pipeline import Parts, Request, finite, generate, to_pixels
from sdrpc.diffusion.placed import PlacedModel, Placement
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import CheckpointError, ComputeError, UsageError
from sdrpc.runtime.cache import Cache

F32 = NDArray[np.float32]

SAME_PICTURE = 50.0
"""dB PSNR between the same pictures in float32."""


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    error = np.square(one.astype(float) - other.astype(float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


class Recording:
    """Parts that compute next to nothing and remember what they were asked."""

    token_length, latent_channels, scaling_factor, prediction = 77, 4, 0.5, "eps"

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.predictions: list[tuple[F32, F32, F32]] = []
        self.decoded: list[F32] = []

    def encode(self, ids: NDArray[np.int32], clip_skip: int) -> F32:
        return self._value("encode", np.repeat(ids[..., None], 8, -1).astype(np.float32))

    def predict(self, latents: F32, timestep: F32, context: F32) -> F32:
        self.predictions.append((latents, timestep, context))
        return self._value("predict", latents * np.float32(0.1) + context.mean(axis=(1, 2))[:, None, None, None] / 5e4)

    def decode(self, latents: F32) -> F32:
        self.decoded.append(latents)
        return self._value("decode", np.repeat(np.repeat(latents[:, :3], 8, 2), 8, 3))

    def _value(self, part: str, value: F32) -> F32:
        return value * np.float32("nan") if part == self.broken else value


def drawn(parts: Parts, request: Request) -> list[NDArray[np.uint8]]:
    return [picture.image for picture in generate(request.resolved(), parts, Clock())]


SMALL = Request("a cat", width=64, height=128, steps=3, sampler="euler", scheduler="karras")


def test_guidance_is_one_batch_of_two() -> None:
    parts = Recording()
    (image,) = drawn(parts, SMALL)
    assert image.shape == (128, 64, 3)
    assert image.dtype == np.uint8
    assert len(parts.predictions) == 3
    latents, timestep, context = parts.predictions[0]
    assert latents.shape == (2, 4, 16, 8)
    np.testing.assert_array_equal(latents[0], latents[1])
    assert timestep.tolist() == [timestep[0]] * 2
    assert context.shape == (2, 77, 8)
    assert {array.dtype for array in (latents, timestep, context)} == {np.dtype(np.float32)}
    assert not np.array_equal(context[0], context[1]), "the negative prompt is first"


def test_no_guidance_asks_once() -> None:
    parts = Recording()
    drawn(parts, replace(SMALL, cfg_scale=1.0))
    assert [latents.shape[0] for latents, _, _ in parts.predictions] == [1, 1, 1]


def test_texts_of_different_lengths_are_asked_apart() -> None:
    parts, together = Recording(), Recording()
    drawn(parts, replace(SMALL, prompt="cat " * 100))
    assert [context.shape for _, _, context in parts.predictions] == [(1, 77, 8), (1, 154, 8)] * 3
    drawn(together, replace(SMALL, prompt="cat " * 100, negative_prompt=" , " * 100))
    assert [context.shape for _, _, context in together.predictions] == [(2, 154, 8)] * 3


def test_guidance_moves_away_from_the_negative_prompt() -> None:
    parts = Recording()
    drawn(parts, replace(SMALL, cfg_scale=3.0))
    latents, _, context = parts.predictions[0]
    negative, positive = (latents[0] * np.float32(0.1) + context[i].mean() / 5e4 for i in (0, 1))
    following = parts.predictions[1][0]
    plain = Recording()
    plain.predict = lambda *_: (negative + 3 * (positive - negative))[None].astype(np.float32)  # type: ignore[method-assign]
    recorded: list[F32] = []
    original = plain.predict
    plain.predict = lambda x, t, c: (recorded.append(x), original(x, t, c))[1]  # type: ignore[method-assign,func-returns-value]
    drawn(plain, replace(SMALL, cfg_scale=1.0))
    np.testing.assert_allclose(recorded[1][0], following[0], rtol=1e-5, atol=1e-6)


def test_latents_are_scaled_for_the_vae() -> None:
    half, whole = Recording(), Recording()
    whole.scaling_factor = 1.0
    drawn(half, SMALL)
    drawn(whole, SMALL)
    np.testing.assert_allclose(half.decoded[0], 2 * whole.decoded[0], rtol=1e-6)


def test_a_batch_counts_seeds_up() -> None:
    three = list(generate(replace(SMALL, batch_count=3).resolved(), Recording(), Clock()))
    assert [picture.seed for picture in three] == [42, 43, 44]
    alone = drawn(Recording(), replace(SMALL, seed=44))
    np.testing.assert_array_equal(three[2].image, alone[0])
    assert not np.array_equal(three[0].image, three[1].image)


@pytest.mark.parametrize(("part", "words"), [("encode", "text encoder"), ("predict", "timestep"), ("decode", "VAE")])
def test_what_is_not_a_number_is_named(part: str, words: str) -> None:
    with pytest.raises(ComputeError, match=f"{words}.*NaN"):
        drawn(Recording(part), SMALL)


def test_infinity_is_no_number_either() -> None:
    with pytest.raises(ComputeError, match="1 of 2"):
        finite(np.array([1, np.inf], np.float32), "it")


def test_steps_are_reported_and_time_is_charged() -> None:
    reports: list[tuple[int, int]] = []
    clock = Clock()
    list(generate(SMALL.resolved(), Recording(), clock, lambda done, total: reports.append((done, total))))
    assert reports == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert clock.seconds.keys() == {"encode", "sample", "decode"}


def test_a_stage_inside_another_is_charged_once() -> None:
    clock = Clock()
    with clock("outer"):
        with clock("inner"):
            time.sleep(0.05)
        with clock("inner"):
            pass
    assert clock.seconds["inner"] >= 0.05
    assert clock.seconds["outer"] < 0.05


def test_pixels_are_rounded_half_up_and_clamped() -> None:
    values = np.array([-2, -1, 0, 1, 3, 2 * (0.5 / 255) - 1, 2 * (0.49 / 255) - 1], np.float32)
    pixels = to_pixels(np.broadcast_to(values, (3, 1, 7)))
    assert pixels.shape == (1, 7, 3)
    assert pixels[0, :, 0].tolist() == [0, 0, 128, 255, 255, 1, 0]


@pytest.mark.parametrize(("asked", "given"), [(1, 64), (64, 64), (65, 128), (500, 512), (512, 512)])
def test_sizes_are_rounded_up(asked: int, given: int) -> None:
    assert Request("", width=asked, height=64).resolved().width == given


def test_a_request_gets_what_belongs_to_its_sampler() -> None:
    assert Request("", sampler="lcm").resolved().scheduler == "lcm"
    assert Request("").resolved().scheduler == "discrete"
    assert Request("", seed=-1).resolved().seed >= 0
    assert Request("", seed=-1).resolved().seed != Request("", seed=-5).resolved().seed


@pytest.mark.parametrize(
    "wrong",
    [{"width": 0}, {"height": 1 << 20}, {"steps": 0}, {"batch_count": 0}, {"sampler": "x"}, {"scheduler": "x"},
     {"rng": "x"}, {"cfg_scale": float("nan")},
        {"eta": float("inf")}],
)  # fmt: skip
def test_requests_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Request("", **wrong).resolved()


# On a device ----------------------------------------------------------------------------------------------------------


class InProcess:
    """The parts as torch modules in float32."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.token_length, self.latent_channels = 77, 4
        self.scaling_factor, self.prediction = model.scaling_factor, model.prediction

    def encode(self, ids: NDArray[np.int32], clip_skip: int) -> F32:
        return self._run(self.model.text_encoder, ids, clip_skip=clip_skip)

    def predict(self, latents: F32, timestep: F32, context: F32) -> F32:
        return self._run(self.model.unet, latents, timestep, context)

    def decode(self, latents: F32) -> F32:
        return self._run(self.model.vae, latents)

    def _run(self, part: ModelPart, *inputs: NDArray[Any], clip_skip: int = -1) -> F32:
        module, call = modules.spec(part, clip_skip).build()
        wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        weights = part.tensors.take(wanted)
        state = {
            name: torch.frombuffer(bytearray(weight.data()), dtype=torch.float16).float().reshape(weight.shape)
            for name, weight in weights.items()
        }
        module.load_state_dict(state, strict=False)
        with torch.no_grad():
            return call(module.eval(), *map(torch.from_numpy, inputs))[0].numpy()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def model(tiny: Path) -> Model:
    return open_model(ModelFiles(tiny))


def placed(model: Model, cache: Cache, **more: Any) -> PlacedModel:
    devices = [LocalDevice(name, torch.device("cpu"), EXACT) for name in ("A", "B", "C")]
    return PlacedModel(model, Placement(*devices), Clock(), cache, **more)


def test_a_picture_from_three_devices_is_torchs(model: Model, cache: Cache) -> None:
    uploads: dict[str, tuple[int, int]] = {}
    parts = placed(model, cache, uploading=lambda title, done, total: uploads.update({title: (done, total)}))
    request = replace(SMALL, height=64, negative_prompt="a dog", clip_skip=2)
    (image,) = drawn(parts, request)
    assert psnr(image, drawn(InProcess(model), request)[0]) >= SAME_PICTURE
    assert image.std() > 10, "something is to be seen"
    assert uploads.keys() == {"text encoder", "diffusion model", "VAE"}
    assert all(done == total > 0 for done, total in uploads.values())
    (unused,) = parts.unused().values()
    assert unused == ["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    devices = parts.placement
    parts.close()
    for device in (devices.text_encoder, devices.unet, devices.vae):
        assert not device._buffers  # type: ignore[attr-defined]


def test_the_second_run_captures_nothing(model: Model, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(SMALL, height=64, steps=1, clip_skip=2)
    first = drawn(placed(model, cache), request)
    monkeypatch.setattr("sdrpc.diffusion.placed.captured", lambda *_: pytest.fail("captured again"))
    np.testing.assert_array_equal(drawn(placed(model, cache), request)[0], first[0])


def test_a_tensor_that_is_missing_is_named(tiny_weights: dict[str, Any], cache: Cache, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    path = tmp_path / "a.safetensors"
    save_file({key: weight for key, weight in tiny_weights.items() if key != name}, path)
    parts = placed(open_model(ModelFiles(path)), cache)
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias.*missing"):
        drawn(parts, replace(SMALL, height=64, steps=1))
