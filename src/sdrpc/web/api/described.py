"""How /openapi.json describes bodies, answers and refusals. What the description says is what is checked: a body that
does not fit it is refused with 400, and with the field that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

MAX_PICTURES = 16
"""Of one request."""

MAX_SIDE = 4096
"""Pixels. Who draws larger pictures uses sd-cli."""

MAX_STEPS = 500

MAX_FRAMES = 1000
"""Of a film: a minute, at the speed that models were trained on."""

MAX_SEED = (1 << 63) - 1 - MAX_PICTURES


class Body(BaseModel):
    """What is sent. A field that is not here is refused by its name, and a number is a number, not a text of one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Nothing(TypedDict):
    """It was done."""


def _whole(value: Any) -> Any:
    """What JSON calls an integer: 20.0 as well."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
"""The smallest picture, a red point."""

Base64 = Annotated[str, Field(examples=[PIXEL, f"data:image/png;base64,{PIXEL}"])]
"""A picture's file in base64, or a data URL of it."""


class Reason(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class Problem(TypedDict):
    """A refusal: an error as OpenAI's clients read it, with AUTOMATIC1111's ``detail``."""

    error: Reason
    detail: str


class EventStream(StreamingResponse):
    """Server-sent events."""

    media_type = "text/event-stream"


FILE = {"type": "string", "contentMediaType": "application/octet-stream"}

_REASONS = {
    400: "What is asked for can't be done, or does not fit the description; the reason names the field",
    401: "A key is needed",
    403: "A page of somebody else asks",
    404: "There is no such thing",
    408: "The rest of the request did not come in time",
    409: "Not in the state that it is in",
    413: "The body is too large",
    421: "This server is not called that",
    429: "The queue is full, or too many keys were wrong; Retry-After says when to come again",
    500: "It was tried, and failed",
    503: "The server is too busy, or not ready yet, or its disk keeps nothing for now",
}
_ANYWHERE = (400, 401, 403, 408, 413, 421, 429, 503)


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The descriptions of what any request may be refused with, and of these further ``statuses``."""
    return {status: {"model": Problem, "description": _REASONS[status]} for status in sorted({*_ANYWHERE, *statuses})}


def files(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """The description of an answer that is a file of one of these types."""
    return {200: {"content": {kind: {"schema": FILE} for kind in media_types}, "description": "The file"}}


def leads_to(*operations: str) -> dict[str, Any]:
    """The description of an answer whose ``id`` is that of these operations, as links."""
    return {"links": {name: {"operationId": name, "parameters": {"id": "$response.body#/id"}} for name in operations}}


def events(**data: str) -> dict[str, Any]:
    """The description of server-sent events, by name, whose data is JSON of the type that is named."""
    said = [
        {"type": "object", "required": ["event", "data"], "properties": {
            "event": {"const": name}, "data": {
                "type": "string", "contentMediaType": "application/json",
                "contentSchema": {"$ref": f"#/components/schemas/{kind}"} if kind else {"type": "object"},
            },
        }}
        for name, kind in data.items()
    ]  # fmt: skip
    return {EventStream.media_type: {"schema": {"type": "object", "anyOf": said}}}


def describe(app: FastAPI) -> None:
    """Describe ``app`` as FastAPI does, but for refusals: this server says 400 where it says 422."""

    def made() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for operation in (each for path in schema["paths"].values() for each in path.values()):
                operation["responses"].pop("422", None)
                for status, answer in operation["responses"].items():
                    if not status.startswith("2"):  # refusals are JSON, whatever the answer is
                        answer["content"] = {"application/json": next(iter(answer["content"].values()))}
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = made  # type: ignore[method-assign]


_SAID = {
    "extra_forbidden": "this server knows no such field",
    "missing": "it is needed",
    "json_invalid": "is no JSON",
    "finite_number": "is no finite number",
}
"""What pydantic complains about → how it is said here."""


def first_fault(errors: list[Any]) -> tuple[str, str]:
    """The first field that is wrong, and why."""
    fault: Mapping[str, Any] = errors[0]
    parts = [str(part) for part in fault["loc"] if part != "body"]
    if fault["type"] == "json_invalid":
        parts = []
    return ".".join(parts) or "body", _SAID.get(fault["type"], fault["msg"])


def fault_of(error: ValidationError) -> str:
    """The first fault of what was read elsewhere than from a body."""
    field, reason = first_fault(error.errors())
    return f"{field}: {reason}"
