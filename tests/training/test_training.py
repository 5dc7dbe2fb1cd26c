"""The training's own pieces: it goes on exactly where it was stopped, and its file is an SD 1.x checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from sdrpc.families.model import ModelFiles, open_model
from sdrpc.prompts.chunks import clip_chunks
from training import autoencoder, bank, diffusion, loop, model, scenes

CPU = torch.device("cpu")
PLAN = loop.Plan(steps=9, batch=4, rate=0.05, warm_up=2, report=3)


def _train(folder: Path, until: float) -> loop.Run:
    torch.manual_seed(1)
    run = loop.Run(nn.ModuleDict({"line": nn.Linear(3, 2)}), PLAN, CPU, seed=5)
    line = run.modules["line"]

    def losses(x: Tensor) -> tuple[Tensor, Tensor]:
        error = (line(x).float() - x[:, :2]).square().mean()
        return error, error.sqrt()

    def inputs(run: loop.Run) -> tuple[Tensor]:
        return (torch.randn((PLAN.batch, 3), generator=run.generator()),)

    loop.train(run, folder / "line.pt", losses, inputs, until)
    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Time that goes on by one second at each look; calling it starts anew."""

    def restart() -> None:
        ticks = itertools.count()
        monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(ticks)))

    restart()
    return restart


def test_a_stopped_training_goes_on_exactly(tmp_path: Path, clock: Callable[[], None]) -> None:
    (tmp_path / "once").mkdir()
    whole = _train(tmp_path / "once", until=float("inf"))
    assert whole.done
    steps = []
    for _ in range(10):
        clock()
        part = _train(tmp_path, until=3)
        steps.append(part.step)
        if part.done:
            break
    assert len(steps) > 2
    assert steps[-1] == PLAN.steps
    for kind in ("modules", "mean"):
        ours, theirs = (getattr(run, kind).state_dict() for run in (part, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind


def test_training_learns(tmp_path: Path) -> None:
    run = _train(tmp_path, until=float("inf"))
    torch.manual_seed(1)
    before, x = nn.Linear(3, 2), torch.randn(64, 3)
    error_before, error_after = ((m(x) - x[:, :2]).square().mean() for m in (before, run.modules["line"]))
    assert error_after < 0.8 * error_before


def test_rates_rise_and_fall() -> None:
    rates = [PLAN.rate_at(step) for step in range(PLAN.steps + 1)]
    assert rates[0] < rates[1] == max(rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 1e-9


def test_noise_is_that_of_stable_diffusion() -> None:
    scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(diffusion.signal(), scheduler.alphas_cumprod, rtol=1e-5, atol=0)


def test_an_error_counts_as_one_in_the_picture() -> None:
    alpha = diffusion.signal()
    in_picture = diffusion.weight(alpha) * alpha / (1 - alpha)  # error of the picture = error of the noise / SNR
    assert in_picture.min() >= 1
    assert in_picture.max() <= diffusion.HIGHEST_WEIGHT + 1e-3
    assert bool((in_picture.diff() <= 1e-5).all())


def test_standard_latents_are_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae: Any = model.vae().eval().requires_grad_(False)
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    before = vae.encode(picture).latent_dist
    drawn = vae.decode(before.mean).sample
    mean, deviation = torch.randn(4), torch.rand(4) + 0.5
    model.standardize(vae, mean, deviation)
    after = vae.encode(picture).latent_dist
    shift, scale = mean[:, None, None], deviation[:, None, None] * model.SCALING_FACTOR
    torch.testing.assert_close(after.mean, (before.mean - shift) / scale)
    torch.testing.assert_close(after.std, before.std / scale)
    torch.testing.assert_close(vae.decode(after.mean).sample, drawn, rtol=0, atol=1e-4)


def test_the_file_is_an_sd_checkpoint(tmp_path: Path) -> None:
    """Every weight is found again by what reads SD 1.5, under diffusers' name, and nothing is left over."""
    modules = {"text_encoder": model.text_encoder(), "unet": model.unet(), "vae": model.vae()}
    weights = model.tensors(**modules)
    looks = [[0.1, 0.2, 0.3]] * 4, [0.0, 0.0, -0.5]
    model.write(tmp_path / "m.safetensors", weights, looks, {"license": "MIT"})
    assert (tmp_path / "m.safetensors").stat().st_size <= 32e6
    opened = open_model(ModelFiles(tmp_path / "m.safetensors"))
    assert opened.colours == (((0.1, 0.2, 0.3),) * 4, (0.0, 0.0, -0.5))
    taken = 0
    for part in opened.components.values():
        told_as = part.found.component.told_as
        prefix = "text_model." if told_as == "text_encoder" else ""
        expected = {prefix + name: weight for name, weight in modules[told_as].state_dict().items()}
        options = {"outputs": ["hidden"], "skip": 1, "final_norm": True} if prefix else {}
        built, _ = part.module(**options).build()
        assert {name: tuple(w.shape) for name, w in built.state_dict().items() if "text_projection" not in name} == {
            name: tuple(w.shape) for name, w in expected.items()
        }
        for name, weight in expected.items():
            stored = weights[part.found.tensors[name].name]
            assert torch.equal(stored.reshape(weight.shape), weight.half()), name
            taken += 1
        configs = {"unet": model.UNET, "vae": model.VAE, "text_encoder": model.TEXT_ENCODER}
        for key in model.UNTOLD[told_as]:
            assert part.config[key] == configs[told_as][key]
    assert taken == len(weights)


def test_tokens_are_those_of_the_pipeline() -> None:
    text = "a small red circle on the left of a large blue square, on a yellow background"
    ours = bank.padded(iter([bank.clip_tokenizer().encode(text, add_special_tokens=False).ids]))
    np.testing.assert_array_equal(ours, clip_chunks(text).ids)


def test_unknown_words_stand_before_or_after() -> None:
    random, ids = Random(0), [1000, 1001]
    noisy = [bank._noisy(ids, random) for _ in range(2000)]
    changed = [row for row in noisy if row != ids]
    assert 0.03 < len(changed) / len(noisy) < 0.09
    assert all(row[:2] == ids or row[-2:] == ids for row in changed)


def test_a_bank_holds_standard_latents_and_captions() -> None:
    torch.manual_seed(0)
    vae = model.vae().eval()
    sampled = scenes.sample(np.random.default_rng(1), 3)
    built = bank.build(vae, sampled, CPU, seed=1, processes=1)
    assert built.latents.shape == (3, 4, 16, 16)
    assert built.tokens.shape == (3, bank.CAPTIONS, 77)
    again = autoencoder.encode(vae, autoencoder.draw(sampled, CPU, 1))
    torch.testing.assert_close(built.latents, again.half(), rtol=1e-3, atol=1e-3)
    assert "background" in bank.clip_tokenizer().decode(built.tokens.reshape(-1).tolist())


def test_a_preview_is_a_picture_of_each_prompt() -> None:
    torch.manual_seed(0)
    modules = [module.eval() for module in (model.text_encoder(), model.unet(), model.vae())]
    pictures = diffusion.preview(*modules, ["a red circle", "two stars"], CPU, steps=2)
    assert pictures.shape == (2, 3, 128, 128)
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1
