"""Samplers: from noise to latents, a step at a time.

Each is one function over numpy float32 arrays with the arithmetic of stable-diffusion.cpp (denoiser), scalars in single
precision where they are there. A sampler asks a :class:`Denoise` what the picture without noise would be and moves
towards it; some then add new noise (ancestral ones, and those of stochastic differential equations). Most have one
form for all predictions; new noise is added otherwise where latents and noise are mixed (flow models).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...errors import InvalidValue
from ..denoising import Denoise
from ..predictions import F32
from ..rng import Rng
from .base import OnStep, Run, quiet
from .distilled import lcm, tcd
from .er_sde import er_sde
from .euler import euler, euler_a, euler_a_cfg_pp, euler_cfg_pp, euler_ge
from .multistep import (
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2m_sde_bt,
    dpmpp_2m_v2,
    ipndm,
    ipndm_v,
    lms,
    res_multistep,
)
from .two_stage import dpm2, dpmpp_2s_a, heun, res_2s


@dataclass(frozen=True)
class Sampler:
    """A sampler and what belongs to it.

    ``eta``: how much new noise it adds unless told otherwise; None: that can't be told. ``schedule``: the one it is
    used with unless told otherwise; ``evaluations``: how often it calls the model in a step (the last step to 0 always
    takes one); ``unconditional``: whether it needs the guess for the negative prompt; ``options``: what else it can be
    given.
    """

    run: Callable[..., F32]
    eta: float | None = None
    schedule: str = "discrete"
    evaluations: int = 1
    unconditional: bool = False
    options: tuple[str, ...] = ()

    def told(self, eta: float | None) -> float:
        """The ``eta`` that it has when it is told one, or None."""
        return (self.eta or 0.0) if eta is None else eta


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler),
    "euler_a": Sampler(euler_a, eta=1.0),
    "heun": Sampler(heun, evaluations=2),
    "dpm2": Sampler(dpm2, evaluations=2),
    "dpm++2s_a": Sampler(dpmpp_2s_a, eta=1.0, evaluations=2),
    "dpm++2m": Sampler(dpmpp_2m),
    "dpm++2mv2": Sampler(dpmpp_2m_v2),
    "ipndm": Sampler(ipndm),
    "ipndm_v": Sampler(ipndm_v),
    "lcm": Sampler(lcm, schedule="lcm", options=("noise_clip_std", "noise_scale_start", "noise_scale_end")),
    "ddim_trailing": Sampler(euler_a, eta=0.0, schedule="simple"),
    "tcd": Sampler(tcd, eta=0.0, schedule="lcm"),
    "res_multistep": Sampler(res_multistep, eta=0.0),
    "res_2s": Sampler(res_2s, eta=0.0, evaluations=2),
    "er_sde": Sampler(er_sde, eta=1.0),
    "euler_cfg_pp": Sampler(euler_cfg_pp, unconditional=True),
    "euler_a_cfg_pp": Sampler(euler_a_cfg_pp, eta=1.0, unconditional=True),
    "euler_ge": Sampler(euler_ge, eta=0.0, options=("gamma",)),
    "dpm++2m_sde": Sampler(dpmpp_2m_sde, eta=1.0),
    "dpm++2m_sde_bt": Sampler(dpmpp_2m_sde_bt, eta=1.0),
    "lms": Sampler(lms),
}
"""The samplers by the names that sd-cli gives them."""


def find_sampler(name: str) -> Sampler:
    """The sampler of that name. Raises :class:`InvalidValue` when there is none."""
    if name not in SAMPLERS:
        raise InvalidValue("sampling_method", name, f"does not exist; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def sample(
    name: str,
    denoise: Denoise,
    x: F32,
    sigmas: F32,
    rng: Rng,
    *,
    flow: bool,
    eta: float | None = None,
    options: Mapping[str, float] | None = None,
    on_step: OnStep = quiet,
) -> F32:
    """Latents without noise, from latents ``x`` at the level ``sigmas[0]``, by the sampler ``name``.

    ``sigmas`` is a schedule (float32, falling to 0), ``rng`` gives the noise that is added on the way, ``flow`` says
    whether the model is a flow model. ``eta`` None: the sampler's own. ``options`` are the sampler's own, by name.
    Raises :class:`InvalidValue` for a sampler or an option that does not exist, and what ``denoise`` raises.
    """
    sampler = find_sampler(name)
    options = options or {}
    for option, value in options.items():
        if option not in sampler.options:
            known = f"it takes {', '.join(sampler.options)}" if sampler.options else "it takes none"
            raise InvalidValue(option, value, f"no option of the sampler {name}; {known}")
    run = Run(denoise, sigmas, rng, sampler.told(eta), flow, on_step)
    return sampler.run(run, x, **options)
