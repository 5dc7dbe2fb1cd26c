"""A prompt and a negative prompt, each evaluated on a device of its own: how near two devices come to what each of them
does with one prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from sdrpc.runtime.chain import Chain, Lanes

from .rows import Mark, Row
from .sampling import Sampled, difference

MARK = Mark(1.7, at_least=True)

APART = 0.05
"""Latents of two devices may be so far (relative, L2) from one device's, which evaluates both prompts as a batch:
*fast* rounds a batch of two otherwise. Predictions of another step would bring them farther off."""

Measure = Callable[[Chain | Lanes, bool], Sampled]
"""Where the diffusion model is, whether there is a negative prompt → the picture's latents and the time of a step."""


def rows(measure: Measure, one: Chain, two: Mapping[str, Chain], note: str, mark: Mark | None) -> Iterator[Row]:
    """``one`` device, and pairs of devices by where they are."""
    alone, most = measure(one, True), measure(one, False).seconds
    both = 1 / alone.seconds
    about = "what two devices come to at most, if nothing but their evaluations takes time"
    yield Row("steps a second, one prompt on one device", 1 / most, "1/s", both, "both prompts", None, about)
    for where, pair in two.items():
        drawn = measure(Lanes(tuple(Chain((device,)) for device in pair.devices)), True)
        distance = difference(drawn.latents, alone.latents)
        if not distance < APART:
            raise AssertionError(f"prompts on two devices of {where}: {distance:.1%} from one device's latents")
        what = f"steps a second, prompt and negative prompt on two devices of {where}"
        apart = f"{1e3 * (drawn.seconds - most):.2f} ms a step around the evaluation, latents {distance:.2%} apart"
        yield Row(what, 1 / drawn.seconds, "1/s", both, "one device", mark, f"{note}; {apart}")
