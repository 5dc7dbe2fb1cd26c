"""AUTOMATIC1111's API, as its clients use it: :mod:`drawing` from texts and pictures, which answers when it is done,
:mod:`progress` meanwhile, :mod:`listings` of what there is and the options, and what its tab of :mod:`extras` does.

A field that sdrpc has nothing for is refused by its name, unless it has the value that means nothing.
"""

from __future__ import annotations

from fastapi import APIRouter

from . import drawing, extras, listings, progress

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
for _part in (drawing, progress, listings, extras):
    router.include_router(_part.router)
