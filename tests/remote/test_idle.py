"""Fields of a request that are said to have no effect have none; those that models are told have one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdrpc.device import Device
from sdrpc.diffusion.drawable import settings_of
from sdrpc.diffusion.idle import idle_fields
from sdrpc.diffusion.session import Session
from sdrpc.families.model import open_model
from sdrpc.runtime.cache import Cache
from tests.support.pictures import CASES, Case, Checkpoints, request

OF_EACH_FAMILY = list({case.family: case for case in reversed(CASES)}.values())

FIELDS = {"guidance": (1.25, 6.5), "clip_skip": (1, 2)}
"""Two values of each."""
SD2 = {"clip_skip": (2, 3)}
"""Its files are without CLIP's last layer."""


@pytest.mark.parametrize("case", OF_EACH_FAMILY, ids=str)
def test_what_a_model_is_not_told_is_idle(case: Case, checkpoints: Checkpoints, device: Device, cache: Cache) -> None:
    """What the diffusion model is told of the prompt depends on a field, or the field is said to have no effect."""
    usual = replace(request(case), guidance=None)
    with Session.open(checkpoints.files(case), device, cache) as session:
        for field, values in (FIELDS | (SD2 if case.family.startswith("sd2") else {})).items():
            asked = [replace(usual, **{field: value}) for value in values]
            settings = [session.settings(each, (usual.video_frames or 1) > 1) for each in asked]
            one, other = (session.conditioning.conditions(each).positive for each in settings)
            same = all(np.array_equal(one[name], other[name]) for name in one)
            found = [idle for idle, _ in idle_fields(session.model, asked[0], settings[0])]
            assert found == ([field] if same else [])


@pytest.mark.parametrize(("of_high_noise", "idle"), [(2.5, []), (1.0, ["negative_prompt"])])
def test_what_one_of_two_models_uses_has_an_effect(
    of_high_noise: float, idle: list[str], checkpoints: Checkpoints
) -> None:
    case = Case("wan2.2-a14b", "parts")
    asked = replace(request(case), guidance=None, cfg_scale=1.0, high_noise_cfg_scale=of_high_noise)
    model = open_model(checkpoints.files(case))
    assert [field for field, _ in idle_fields(model, asked, settings_of(model, asked, True))] == idle
