"""A log whose lines are JSON objects, for programs that collect logs."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any

ACCESS = "uvicorn.access"

FIELDS = ("job", "user", "model", "seat", "status", "waited", "seconds")
"""What records tell beside their words: of a job whose it is, with which model, where, how it ended, and the seconds
that it waited and was drawn in. No prompts, no keys."""

_REQUEST = ("client", "method", "path", "http_version", "status")
"""The arguments of a record of uvicorn's about a request."""


class JsonFormatter(logging.Formatter):
    """A record as one line: ``time`` (ISO 8601, UTC), ``level``, ``logger``, ``message``, the :data:`FIELDS` that it
    has, those of a request, and ``exception`` where there was one."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.name == ACCESS and isinstance(record.args, tuple) and len(record.args) == len(_REQUEST):
            told |= dict(zip(_REQUEST, record.args, strict=True))
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)
