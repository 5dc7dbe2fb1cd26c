"""Samplers and schedules by A1111's names, and by ours."""

from __future__ import annotations

from ....diffusion.samplers import SAMPLERS
from ....diffusion.schedules import ALIASES, SCHEDULES
from ....errors import InvalidValue

NAMES = {
    "euler a": "euler_a", "euler": "euler", "heun": "heun", "dpm2": "dpm2", "dpm++ 2s a": "dpm++2s_a",
    "dpm++ 2m": "dpm++2m", "dpm++ 2m sde": "dpm++2m_sde", "lcm": "lcm", "lms": "lms", "ddim": "ddim_trailing",
    "restart": None, "plms": None, "unipc": None,
}  # fmt: skip
"""A1111's samplers → ours; None: sdrpc lacks it."""

LABELS = {"euler_a": "Euler a", "euler": "Euler", "heun": "Heun", "dpm2": "DPM2", "dpm++2s_a": "DPM++ 2S a",
          "dpm++2m": "DPM++ 2M", "dpm++2m_sde": "DPM++ 2M SDE", "lcm": "LCM", "lms": "LMS",
          "ddim_trailing": "DDIM"}  # fmt: skip
"""Ours → the name that A1111's clients expect, where there is one."""

SCHEDULER_NAMES = {"automatic": None, "uniform": "discrete", "sgm uniform": "sgm_uniform", "kl optimal": "kl_optimal",
                   "align your steps": "ays", "normal": "discrete"}  # fmt: skip


def sampler(name: str | None) -> tuple[str | None, str | None]:
    """Sampler and schedule of A1111's ``DPM++ 2M Karras``, or of our own names. Raises :class:`InvalidValue`."""
    if not name or name.lower() == "automatic":
        return None, None
    folded, implied = name.lower().strip(), None
    for ending in ("karras", "exponential"):
        if folded.endswith(f" {ending}"):
            folded, implied = folded.removesuffix(f" {ending}"), ending
            break
    ours = folded if folded in SAMPLERS else NAMES.get(folded)
    if ours is None:
        raise InvalidValue("sampler_name", name, f"does not exist; there are {', '.join(SAMPLERS)}")
    return ours, implied


def schedule(name: str | None) -> str | None:
    """A schedule of A1111's, or one of ours. Raises :class:`InvalidValue`."""
    folded = (name or "automatic").lower()
    if folded in SCHEDULER_NAMES:
        return SCHEDULER_NAMES[folded]
    if folded not in SCHEDULES and folded not in ALIASES:
        raise InvalidValue("scheduler", name, f"does not exist; there are {', '.join(SCHEDULES)}")
    return folded
