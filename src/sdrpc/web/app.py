"""The application: APIs, page, health and metrics behind the gate."""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from typing_extensions import TypedDict

from .. import __version__
from ..errors import SdrpcError
from .api import a1111, native, openai, sdcpp
from .api.common import Ending, NoPicture, failed
from .api.described import describe, first_fault, refusals
from .context import Context
from .gate import Gate, Rules, error_body
from .metrics import Counted

_APIS = (openai, a1111, sdcpp)

PAGE = {
    "index.html": "text/html; charset=utf-8", "app.js": "text/javascript; charset=utf-8",
    "server.js": "text/javascript; charset=utf-8", "devices.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml",
}  # fmt: skip
"""Files of the page."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(context: Context, rules: Rules) -> FastAPI:
    """The server's application, for uvicorn."""
    app = FastAPI(title="sdrpc", version=__version__, description=ABOUT, docs_url=None, redoc_url=None)
    app.state.context = context
    keyed = [Security(HTTPBearer(auto_error=False))] if rules.keys else []  # the gate checks; this is what is described
    for api in _APIS:
        app.include_router(api.router, dependencies=keyed)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(Gate, rules=rules)
    app.add_middleware(Counted, metrics=context.metrics)
    describe(app)

    @app.get("/health", tags=["server"], responses=refusals())
    def health() -> Status:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["server"], responses=refusals() | {503: {"model": Loading, "description": "Loading"}})
    def ready() -> Status:
        """200 when jobs are drawn at once; 503, with how far it is, while a model is being loaded."""
        for job in context.studio.running():
            now = context.board.get(job.id)
            if now.stage in _LOADING:
                told = {"stage": now.stage, "component": now.component, "done": now.done, "total": now.total}
                raise NotReady({"model": job.task.model, **told})
        return {"status": "ready"}

    @app.get(
        "/metrics",
        tags=["server"],
        dependencies=keyed,
        response_class=PlainTextResponse,
        responses=refusals(),
    )
    def metrics() -> PlainTextResponse:
        """Prometheus' text format."""
        return PlainTextResponse(context.metrics.text(), headers={"Content-Type": PROMETHEUS})

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


ABOUT = "Pictures and films for everyone on the network: the APIs of OpenAI, AUTOMATIC1111 and stable-diffusion.cpp."

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

_LOADING = ("opening", "capture", "upload", "release")


class Status(TypedDict):
    status: str


class Loading(TypedDict):
    """A ``component`` of a ``model`` is being loaded. ``done`` of ``total``: bytes while weights are sent (``stage``
    upload) or leave (release); else 0 of 1."""

    status: str
    model: str
    stage: str
    component: str
    done: int
    total: int


class NotReady(Exception):
    """A model is being loaded; ``told``: how far it is."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__("a model is being loaded")
        self.told = told


async def _not_ready(_: Request, error: NotReady) -> JSONResponse:
    return JSONResponse({"status": "loading", **error.told}, 503, {"Retry-After": "2"})


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """The first field that is wrong, and why."""
    field, reason = first_fault(list(error.errors()))
    body = error_body(f"{field}: {reason}", 400)
    body["error"]["param"] = field
    return JSONResponse(body, 400)


async def _http(request: Request, error: HTTPException) -> JSONResponse:
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request))) or headers.get("Allow", "")
    return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code, headers)


def _methods(request: Request) -> set[str]:
    """What can be done at a path: by all of its routes, where the framework names those of the first."""
    routes = (route for api in _APIS for route in api.router.routes if isinstance(route, Route))
    here = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in here for method in route.methods or ()}


_CALLED = {
    f"{a1111.router.prefix}/extra-single-image": a1111.extras.CALLED, a1111.router.prefix: a1111.drawing.CALLED,
    openai.router.prefix: openai.CALLED, sdcpp.router.prefix: native.CALLED,
}  # fmt: skip
"""Where a path begins → what requests there call our fields."""


async def _failed(request: Request, error: Exception) -> JSONResponse:
    path = request.url.path
    return failed(error, next((called for prefix, called in _CALLED.items() if path.startswith(prefix)), {}))


_HANDLERS: dict[type[Exception], Any] = {
    SdrpcError: _failed,
    NoPicture: _failed,
    Ending: _failed,
    NotReady: _not_ready,
    RequestValidationError: _invalid,
    HTTPException: _http,
}
"""Error → what answers for it."""
