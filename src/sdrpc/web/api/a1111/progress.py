"""How far a job is, and the end of it."""

from __future__ import annotations

import time

from fastapi import APIRouter
from typing_extensions import TypedDict

from ..common import Here, User, as_base64
from ..described import Nothing, refusals

router = APIRouter()


class ProgressState(TypedDict):
    skipped: bool
    interrupted: bool
    job: str
    job_count: int
    job_no: int
    job_timestamp: str
    sampling_step: int
    sampling_steps: int


class ProgressShown(TypedDict):
    """``progress``: 0 … 1; ``eta_relative``: seconds that are left."""

    progress: float
    eta_relative: float
    state: ProgressState
    current_image: str | None
    textinfo: str | None


@router.get("/progress", responses=refusals())
def progress(here: Here, skip_current_image: bool = False) -> ProgressShown:
    """How far the oldest job is that is being drawn."""
    running = sorted(here.studio.running(), key=lambda job: job.started or 0)
    state: ProgressState = {
        "skipped": False, "interrupted": False, "job": "", "job_count": len(running) + here.store.pending(),
        "job_no": 0, "job_timestamp": "0", "sampling_step": 0, "sampling_steps": 0,
    }  # fmt: skip
    if not running:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    job, now = running[0], here.board.get(running[0].id)
    share = ((now.step / now.steps if now.steps else 0) + now.picture - 1) / job.task.pictures
    seconds = time.time() - (job.started or time.time())
    shown = now.preview is not None and not skip_current_image
    return {
        "progress": share,
        "eta_relative": seconds / share - seconds if share else 0.0,
        "state": {**state, "job": job.id, "sampling_step": now.step, "sampling_steps": now.steps},
        "current_image": as_base64(now.preview or b"") if shown else None,
        "textinfo": now.stage,
    }


@router.post("/interrupt", responses=refusals())
def interrupt(here: Here, who: User) -> Nothing:
    """End what is being drawn for whoever asks."""
    for job in here.studio.running():
        if job.user == who:
            here.studio.cancel(job.id)
    return {}


@router.post("/skip", responses=refusals())
def skip(here: Here, who: User) -> Nothing:
    return interrupt(here, who)
