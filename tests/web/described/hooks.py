"""What schemathesis sends to a server in a test: what it made up, but small, so that a test's time is that of its
requests and not of what is drawn."""

from __future__ import annotations

from typing import Any

import schemathesis

MOST = {"width": 64, "height": 64, "upscaling_resize_w": 96, "upscaling_resize_h": 96, "hr_resize_x": 96,
        "hr_resize_y": 96, "target_width": 96, "target_height": 96, "steps": 1, "sample_steps": 1, "hr_steps": 1,
        "hr_second_pass_steps": 1, "batch_count": 2, "batch_size": 2, "n_iter": 1, "n": 2,
        "upscaling_resize": 2}  # fmt: skip
"""Fields that decide how long something takes. A number that is valid, and larger, becomes this."""

VALID = 4096
"""No field of these takes more: what is larger stays as it is, to be refused."""

USUAL: dict[str, dict[str, Any]] = {
    "/v1/images/generations": {"size": "64x64", "steps": 1},
    "/v1/images/edits": {"size": "64x64", "steps": 1},
    "/sdapi/v1/txt2img": {"width": 64, "height": 64, "steps": 1},
    "/sdapi/v1/img2img": {"width": 64, "height": 64, "steps": 1},
    "/sdcpp/v1/img_gen": {"width": 64, "height": 64, "sample_params": {"sample_steps": 1}},
}
"""What is sent where nothing is said, since the default takes longer."""

NOTHING_SAID = ("width", "height", "steps", "sample_steps")
"""Fields whose null is the default, too."""


def smaller(value: Any, name: str = "") -> Any:
    """``value``, the field ``name`` of a body, with small numbers in it; as valid or invalid as it was."""
    if isinstance(value, dict):
        return {key: smaller(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [smaller(each) for each in value]
    if value is None and name in NOTHING_SAID:
        return MOST[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return MOST[name] if number and name in MOST and MOST[name] < value <= VALID else value


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(context: schemathesis.HookContext, case: Any, kwargs: dict[str, Any]) -> None:
    if isinstance(case.body, dict):
        case.body = smaller(USUAL.get(case.path, {}) | case.body)
