"""`python -m training.evaluate [MODEL]`: how good the small model is, by a detector that reads pixels.

All pictures are drawn by sdrpc, as sd-cli draws them, from prompts whose combinations the training never showed; the
number of a prompt is its picture's seed. The exit status is 0 when every mark is reached.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rich.box
import torch
import typer
from rich.table import Table

from sdrpc import models
from sdrpc.cli import report
from sdrpc.cli.devices import placed_devices
from sdrpc.cli.progress import Meter
from sdrpc.diffusion.events import Event, OnEvent
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.families.model import Model, ModelFiles, open_model

from . import grid
from .detect import Pixels, Sight, detect
from .judge import Expectation, Stated, Verdict, judge
from .model import filled
from .prompts import Prompt, held_out_prompts, spread
from .scenes import MOST, NAMES, SHAPES, draw, sample

CFG_SCALE = 4.0
"""What the model card recommends."""

LEAST_PSNR = 30.0
"""The VAE's mark, in dB."""
PSNR_SCENES, PSNR_BATCH = 256, 16

UNGUIDED_PROMPTS, NEGATIVE_SEEDS = 104, 40
"""Pictures without guidance, and pictures with and without each kind of negative prompt."""


@dataclass(frozen=True)
class Row:
    """A line of the table: what is counted, and the share that must be right (None: only shown)."""

    prompts: str
    what: str
    mark: float | None
    right: Callable[[Verdict], bool | None]


ONE, MORE = "one shape", "two or three"

ROWS = (
    Row(ONE, "colour", 0.97, lambda v: v.count and v.colours),
    Row(ONE, "background", 0.97, lambda v: v.background),
    Row(ONE, "shape", 0.92, lambda v: v.kinds),
    Row(ONE, "position", 0.90, lambda v: v.places),
    Row(ONE, "size", None, lambda v: v.sizes),
    Row(ONE, "count", None, lambda v: v.count),
    Row(ONE, "everything said", None, lambda v: v.right),
    Row(MORE, "count", 0.88, lambda v: v.count),
    Row(MORE, "every colour", 0.88, lambda v: v.colours),
    Row(MORE, "background", None, lambda v: v.background),
    Row(MORE, "every shape", None, lambda v: v.kinds),
    Row(MORE, "positions", None, lambda v: v.places),
    Row(MORE, "relation", None, lambda v: v.relation),
    Row(MORE, "sizes", None, lambda v: v.sizes),
    Row(MORE, "everything said", None, lambda v: v.right),
)
"""What the model is held to, and what is worth knowing. A colour, shape, position or size of one shape is wrong when
there is not just one."""


@dataclass(frozen=True)
class Setting:
    """A way to draw. ``within``: how many points less than the first setting's a score may be; None: nothing is asked.

    ``pictures``: of so many prompts, None: all.
    """

    title: str
    model: Path
    sampler: str
    steps: int
    cfg_scale: float
    within: float | None = None
    pictures: int | None = None


@dataclass(frozen=True)
class Score:
    """How many of the pictures of which something was asked had it."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else float("nan")


@dataclass(frozen=True)
class Negative:
    """Prompts that leave something open, and words that take possibilities away."""

    prompt: str
    words: tuple[str, ...]
    says: Expectation
    shows: Callable[[Sight, str], bool]


NEGATIVES = (
    Negative(
        "a circle on a white background",
        tuple(name for name in NAMES if name != "white"),
        Expectation("white", (Stated("circle"),)),
        lambda sight, word: any(shape.colour == word for shape in sight.shapes),
    ),
    Negative(
        "a red shape on a white background",
        SHAPES,
        Expectation("white", (Stated(colour="red"),)),
        lambda sight, word: any(shape.kind == word for shape in sight.shapes),
    ),
    Negative(
        "a red circle",
        tuple(f"{name} background" for name in NAMES if name != "red"),
        Expectation(None, (Stated("circle", "red"),)),
        lambda sight, word: sight.background == word.split()[0],
    ),
)


@dataclass(frozen=True)
class NegativeScore:
    """Shares of pictures that show what the negative prompt says, and of those that show what the prompt says."""

    prompt: str
    shown_without: float
    shown_with: float
    right_without: float
    right_with: float


def main(
    model: Annotated[
        Path, typer.Argument(help="The model's file.", show_default="the one that ships")
    ] = models.SHIPPED[models.DEFAULT],
    gguf: Annotated[Path | None, typer.Option(help="The same model as GGUF, to compare.")] = None,
    device: Annotated[str, typer.Option(help="Where pictures are drawn: CPU, CUDA0 …")] = "CPU",
    precision: Annotated[str, typer.Option(metavar="exact|fast|ggml|auto")] = "auto",
    prompts: Annotated[int | None, typer.Option(min=1, help="How many.", show_default="all 520")] = None,
    sampler: Annotated[str, typer.Option()] = "euler",
    steps: Annotated[int, typer.Option(min=1)] = 20,
    cfg_scale: Annotated[float, typer.Option()] = CFG_SCALE,
    only: Annotated[
        bool, typer.Option("--only", help="No other settings beside this one, no negative prompts.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    grid_file: Annotated[Path | None, typer.Option("--grid", help="Write a grid of pictures here, as PNG.")] = None,
) -> None:
    """Draw held-out prompts with the small model, and count what is right."""
    first = Setting(f"{sampler}, {steps}", model, sampler, steps, cfg_scale)
    settings = [first]
    if not only:
        settings.append(Setting("dpm++2m, 12", model, "dpm++2m", 12, cfg_scale, within=3))
    if gguf is not None:
        settings.append(replace(first, title=f"{first.title}, GGUF", model=gguf, within=2))
    if not only:
        settings.append(replace(first, title="no guidance", cfg_scale=1.0, pictures=UNGUIDED_PROMPTS))
    asked = held_out_prompts()
    asked = asked if prompts is None else spread(asked, prompts)
    scores: list[list[Score]] = []
    negatives: list[NegativeScore] = []
    meter = report.meter()
    for setting in settings:
        chosen = asked if setting.pictures is None else spread(asked, setting.pictures)
        with opened(setting.model, device, precision, meter) as artist:
            scores.append(_scores(artist, setting, chosen, meter))
            if setting is first and grid_file is not None:
                pictures = [artist.draw(setting, prompt, seed) for seed, prompt in enumerate(grid.PROMPTS)]
                grid.arranged(pictures, grid.PROMPTS).save(grid_file)
            if setting is first and not only:
                negatives = [_negative(artist, setting, negative, meter) for negative in NEGATIVES]
    psnr = vae_psnr(open_model(ModelFiles(model)))
    report.table(_table(settings, scores))
    if negatives:
        report.table(_negative_table(negatives))
    passed = psnr >= LEAST_PSNR and all(_passed(settings, scores))
    print(f"VAE: {psnr:.2f} dB over {PSNR_SCENES} scenes, {LEAST_PSNR:.0f} asked for")
    print("every mark is reached" if passed else "not every mark is reached")
    if json_file is not None:
        json_file.write_text(json.dumps(_facts(settings, scores, negatives, psnr, passed), indent=2) + "\n")
    raise typer.Exit(0 if passed else 1)


# Drawing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artist:
    """A model on a device."""

    session: Session
    tell: OnEvent

    def draw(self, setting: Setting, prompt: str, seed: int, negative: str = "") -> Pixels:
        """One picture (side, side, 3), with what the setting says but for its model."""
        request = Request(
            prompt, negative, steps=setting.steps, cfg_scale=setting.cfg_scale, seed=seed,
            sampling_method=setting.sampler,
        )  # fmt: skip
        (picture,) = self.session.generate(request, self.tell)
        return picture.image


@contextmanager
def opened(model: Path, device: str, precision: str, meter: Meter) -> Iterator[Artist]:
    """The model in a file, all of it on one device of this machine."""

    def tell(event: Event) -> None:
        if event.stage == "capture":
            meter.tell(event)

    with (
        placed_devices({"all": (device,)}, (), precision, None) as (places, _),
        Session.open(model, places) as session,
    ):
        yield Artist(session, tell)


def _scores(artist: Artist, setting: Setting, prompts: Sequence[Prompt], meter: Meter) -> list[Score]:
    verdicts: dict[str, list[Verdict]] = {ONE: [], MORE: []}
    for done, prompt in enumerate(prompts, 1):
        sight = detect(artist.draw(setting, prompt.text, prompt.seed))
        verdicts[ONE if len(prompt.says.shapes) == 1 else MORE].append(judge(sight, prompt.says))
        meter.steps(setting.title, done, len(prompts))
    return [_score(map(row.right, verdicts[row.prompts])) for row in ROWS]


def _score(values: Iterator[bool | None]) -> Score:
    said = [value for value in values if value is not None]
    return Score(sum(said), len(said))


def _negative(artist: Artist, setting: Setting, negative: Negative, meter: Meter) -> NegativeScore:
    """Without a negative prompt, each word's share of the same pictures; with one, the share of the word in it."""
    free, held = [], []
    for seed in range(NEGATIVE_SEEDS):
        word = negative.words[seed % len(negative.words)]
        free.append(detect(artist.draw(setting, negative.prompt, seed)))
        held.append((detect(artist.draw(setting, negative.prompt, seed, word)), word))
        meter.steps(f"negative prompts: {negative.prompt}", seed + 1, NEGATIVE_SEEDS)
    shown = [negative.shows(sight, word) for sight in free for word in negative.words]
    return NegativeScore(
        negative.prompt,
        float(np.mean(shown)),
        float(np.mean([negative.shows(sight, word) for sight, word in held])),
        float(np.mean([judge(sight, negative.says).right for sight in free])),
        float(np.mean([judge(sight, negative.says).right for sight, _ in held])),
    )


# The VAE --------------------------------------------------------------------------------------------------------------


def vae_psnr(model: Model, scenes: int = PSNR_SCENES) -> float:
    """How well pictures survive the way to latents (their means) and back: the PSNR, in dB, of the mean squared error
    over all pixels of so many scenes that were not trained on."""
    vae: Any = filled(model["vae"].module().build()[0], model["vae"].found)
    shown = sample(np.random.default_rng((0, 99)), scenes)
    jitter = torch.rand((scenes, MOST + 1, 3), generator=torch.Generator().manual_seed(99)) * 2 - 1
    errors = []
    with torch.inference_mode():
        for start in range(0, scenes, PSNR_BATCH):
            part = slice(start, min(start + PSNR_BATCH, scenes))
            picture = draw(shown.part(part.start, part.stop), model.size[0], jitter=jitter[part])
            latents = vae.encode(picture * 2 - 1).latent_dist.mean
            back = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
            errors.append((back - picture).square().mean((1, 2, 3)))
    return float(-10 * torch.cat(errors).mean().log10())


# The report -----------------------------------------------------------------------------------------------------------


def _passed(settings: Sequence[Setting], scores: Sequence[Sequence[Score]]) -> list[bool]:
    return [
        _reached(setting, row, score, first) is not False
        for setting, column in zip(settings, scores, strict=True)
        for row, score, first in zip(ROWS, column, scores[0], strict=True)
    ]


def _reached(setting: Setting, row: Row, score: Score, first: Score) -> bool | None:
    """Whether a score is as good as it must be: as its mark, or as nearly the first setting's as is asked."""
    if row.mark is None or not score.asked:
        return None
    if setting.within is not None:
        return round(100 * (first.share - score.share), 6) <= setting.within
    return score.share >= row.mark if score is first else None


def _table(settings: Sequence[Setting], scores: Sequence[Sequence[Score]]) -> Table:
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    for title in ("prompts", "what is right", "mark", *(setting.title for setting in settings)):
        table.add_column(title, justify="left" if title in ("prompts", "what is right") else "right")
    for number, row in enumerate(ROWS):
        cells = []
        for setting, column in zip(settings, scores, strict=True):
            reached = _reached(setting, row, column[number], scores[0][number])
            text = f"{column[number].share:.1%} of {column[number].asked}" if column[number].asked else "–"
            cells.append(f"[red]{text} ✗[/red]" if reached is False else f"{text} ✓" if reached else f"{text}  ")
        mark = "" if row.mark is None else f"≥ {row.mark:.0%}"
        table.add_row(row.prompts, row.what, mark, *cells)
    return table


def _negative_table(negatives: Sequence[NegativeScore]) -> Table:
    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    for title in ("prompt", "shows a word", "with it as negative prompt", "prompt right", "still right"):
        table.add_column(title, justify="left" if title == "prompt" else "right")
    for score in negatives:
        _, *shares = asdict(score).values()
        table.add_row(score.prompt, *(f"{share:.1%}" for share in shares))
    return table


def _facts(
    settings: Sequence[Setting],
    scores: Sequence[Sequence[Score]],
    negatives: Sequence[NegativeScore],
    psnr: float,
    passed: bool,
) -> Mapping[str, Any]:
    """Everything that was counted, as JSON."""
    return {
        "passed": passed,
        "settings": [{**asdict(setting), "model": setting.model.name} for setting in settings],
        "rows": [
            {
                "prompts": row.prompts, "what": row.what, "mark": row.mark,
                "scores": {s.title: asdict(column[number]) for s, column in zip(settings, scores, strict=True)},
            }
            for number, row in enumerate(ROWS)
        ],
        "negative prompts": [asdict(score) for score in negatives],
        "vae": {"psnr": psnr, "scenes": PSNR_SCENES, "mark": LEAST_PSNR},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(report.guarded(lambda: typer.run(main)))
