"""The application: APIs, page, health and metrics behind the gate."""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from .. import __version__
from ..errors import SdrpcError
from .api import a1111, openai, sdcpp
from .api.common import NoPicture, failed
from .context import Context
from .gate import Gate, Refused, Rules, error_body

PAGE = {
    "index.html": "text/html; charset=utf-8", "app.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml",
}  # fmt: skip
"""Files of the page."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(context: Context, rules: Rules) -> FastAPI:
    """The server's application, for uvicorn."""
    app = FastAPI(title="sdrpc", version=__version__, description=__doc__ or "", docs_url=None, redoc_url=None)
    app.state.context = context
    for api in (openai, a1111, sdcpp):
        app.include_router(api.router)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(Gate, rules=rules)

    @app.get("/health", tags=["server"])
    def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["server"])
    def ready() -> JSONResponse:
        """200 when jobs are drawn at once; 503, with how far it is, while a model is being loaded."""
        loading = [
            context.board.get(job.id) for job in context.studio.running() if context.board.get(job.id).stage in _LOADING
        ]
        if not loading:
            return JSONResponse({"status": "ready"})
        first = loading[0]
        told = {"stage": first.stage, "component": first.component, "done": first.done, "total": first.total}
        return JSONResponse({"status": "loading", **told}, 503, {"Retry-After": "2"})

    @app.get("/metrics", tags=["server"])
    def metrics() -> Response:
        """Prometheus' text format."""
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return page("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    def page(name: str) -> Response:
        if name not in PAGE:
            raise HTTPException(404, f"the page has no {name}")
        data = (resources.files(__package__) / "page" / name).read_bytes()
        return Response(data, media_type=PAGE[name], headers=PAGE_HEADERS)

    return app


_LOADING = ("starting", "capture", "upload", "release")


async def _invalid(_: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
    """The first field that is wrong, and why."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    body = error_body(f"{field}: {first['msg']}", 422)
    body["error"]["param"] = field
    return JSONResponse(body, 422)


async def _http(_: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code, error.headers)


async def _refused(_: Request, error: Refused) -> JSONResponse:
    return JSONResponse(error_body(str(error), error.status), error.status)


_HANDLERS: dict[type[Exception], Any] = {
    SdrpcError: failed,
    NoPicture: failed,
    RequestValidationError: _invalid,
    ValidationError: _invalid,
    HTTPException: _http,
    Refused: _refused,
}
"""Error → what answers for it."""
