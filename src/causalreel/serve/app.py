"""The HTTP side: sessions, their streams, videos, health and metrics, as one FastAPI application.

Routes translate between HTTP and `service.Service`; whatever may take a while runs in a thread. Every error is
{"error": {"code", "message"}}; what is not foreseen is logged and answered without details.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

try:
    from fastapi import APIRouter, FastAPI, Query, Request, Response, WebSocket
    from fastapi.exceptions import RequestValidationError
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import FileResponse
    from fastapi.routing import APIRoute
    from fastapi.staticfiles import StaticFiles
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError("serving needs FastAPI; install it with: pip install 'causalreel[serve]'") from error

from causalreel import __version__
from causalreel.infer.pipeline import Pipeline
from causalreel.serve.bodies import BODY, DOOR, describe, errors, read_body, read_json, takes
from causalreel.serve.counters import CONTENT_TYPE
from causalreel.serve.guard import Guard, refuse
from causalreel.serve.handle import Handle
from causalreel.serve.jobs import Jobs, VideoLimits
from causalreel.serve.safety import ApiError, Settings
from causalreel.serve.scheduler import Scheduler
from causalreel.serve.service import Service
from causalreel.serve.store import Store
from causalreel.serve.streaming import Viewer, Wish
from causalreel.serve.videos import videos
from causalreel.serve.wire import (
    CommandTaken,
    Deleted,
    Format,
    ModelView,
    ReadyView,
    ReplayView,
    SessionList,
    SessionRequest,
    SessionView,
    explain,
    plain,
)

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
health = APIRouter(tags=["health"], responses=errors(400, 413, 431, 500))
sessions = APIRouter(prefix="/v1/sessions", tags=["sessions"], responses=DOOR)


def create_app(model: Scheduler | Pipeline, settings: Settings = Settings(), *, store: Store | None = None) -> FastAPI:
    """The application for a scheduler, which the caller starts and closes, or for a pipeline, with a scheduler of its
    own. `app.state.service` is what its routes call. store: of videos, closed at the end; None: opened at the start.
    """
    owns = isinstance(model, Pipeline)
    service = Service(Scheduler(model) if isinstance(model, Pipeline) else model, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limits = VideoLimits(queued=settings.queued_videos, kept=settings.kept_videos)
        records = Store(settings.data, replica=settings.replica) if store is None else store
        service.jobs = Jobs(service.scheduler, records, limits, service.counters)
        if owns:
            service.scheduler.start()
        service.jobs.start()
        try:
            yield
        finally:
            await run_in_threadpool(service.jobs.close)
            if owns:
                await run_in_threadpool(service.scheduler.close)
            service.close()

    about = "Live video that people steer while it plays, and videos made in the background."
    app = FastAPI(
        title="causalreel", version=__version__, description=about, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    for router in (health, sessions, videos):
        app.include_router(router)
        for route in [route for route in router.routes if isinstance(route, APIRoute) and route.methods == {"GET"}]:
            head: dict[str, Any] = {"methods": ["HEAD"], "include_in_schema": False}
            app.add_api_route(route.path, route.endpoint, response_model=route.response_model, **head)
    if STATIC.is_dir():
        app.mount("/static", StaticFiles(directory=STATIC), name="static")
    _answer_errors(app)
    app.openapi = describe(app)
    app.add_middleware(
        Guard, settings=settings, rates=service.rates, count=service.refused, is_stopping=lambda: service.is_stopping
    )
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "range"],
        )
    return app


def _answer_errors(app: FastAPI) -> None:
    """Have every foreseen error leave in one form, and be counted; others are the doorkeeper's."""

    def answer(request: Request, error: ApiError) -> Response:
        request.app.state.service.refused(error.code)
        return Response(error.body(), error.status, error.headers, media_type="application/json")

    def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return answer(request, ApiError(error.status_code, code, str(error.detail), dict(error.headers or {})))

    def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, ApiError(422, "invalid_request", explain(error)))

    handlers: dict[Any, Any] = {
        ApiError: answer,
        HTTPException: http,
        RequestValidationError: invalid,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def service_of(request: Request | WebSocket) -> Service:
    return request.app.state.service


def view(handle: Handle) -> dict[str, Any]:
    """A session as the API shows it."""
    ended = None if handle.ended is None else {"reason": handle.ended.reason, "is_error": handle.ended.is_error}
    stream = f"/v1/sessions/{handle.id}/stream"
    return {"id": handle.id, "stream": stream, "state": plain(handle.session.state()), "ended": ended}


# ---- health and the page ---------------------------------------------------------------------------------------------


@health.get("/healthz")
async def healthz() -> dict[str, bool]:
    """The process answers."""
    return {"ok": True}


@health.get(
    "/readyz",
    response_model=ReadyView,
    responses={503: {"model": ReadyView, "description": "Not warm yet, or ending."}},
)
async def readyz(request: Request, response: Response) -> dict[str, Any]:
    """The model is loaded and warm: 200; not yet or no longer: 503. A full server is ready, its sessions need it."""
    facts = service_of(request).scheduler.facts()
    is_ready = bool(facts.get("is_ready"))
    response.status_code = 200 if is_ready else 503
    free = facts["max_sessions"] - facts["sessions"]
    return {"ready": is_ready, "free_sessions": max(free, 0)}


@health.get("/metrics", responses=DOOR)
async def metrics(request: Request) -> Response:
    """Numbers in Prometheus's text format."""
    body = await run_in_threadpool(service_of(request).counters.render)
    return Response(body, media_type=CONTENT_TYPE)


@health.get("/", include_in_schema=False)
async def page() -> Response:
    return _page("index.html")


@health.get("/docs", include_in_schema=False)
async def docs() -> Response:
    return _page("docs.html")


def _page(name: str) -> Response:
    if not (STATIC / name).is_file():
        raise ApiError(404, "not_found", "this installation has no page")
    return FileResponse(STATIC / name, headers={"cache-control": "no-cache"})


@health.get("/v1/model", response_model=ModelView, responses=DOOR)
async def show_model(request: Request) -> dict[str, Any]:
    """What the model is, and what its prompts may say."""
    return service_of(request).model()


# ---- sessions --------------------------------------------------------------------------------------------------------


@sessions.post(
    "",
    status_code=201,
    response_model=SessionView,
    responses=BODY | errors(422),
    openapi_extra=takes("SessionRequest", multipart=True),
)
async def open_session(request: Request, response: Response) -> dict[str, Any]:
    """Open a session; its frames come over the WebSocket at `stream`."""
    wanted = await read_body(request, SessionRequest)
    handle = await service_of(request).work(service_of(request).open, wanted)
    response.headers["location"] = f"/v1/sessions/{handle.id}"
    return view(handle)


@sessions.post("/replay", status_code=201, response_model=ReplayView, responses=BODY, openapi_extra=takes("Record"))
async def open_replay(request: Request, response: Response) -> dict[str, Any]:
    """Open a session that plays a record again and then pauses; a command that changes the picture takes over."""
    body = await read_json(request)
    handle, notes = await service_of(request).work(service_of(request).open_replay, body)
    response.headers["location"] = f"/v1/sessions/{handle.id}"
    return {**view(handle), "notes": notes}


@sessions.get("", response_model=SessionList)
async def list_sessions(request: Request) -> dict[str, Any]:
    """All sessions, oldest first."""
    return {"data": [view(handle) for handle in service_of(request).scheduler.handles()]}


@sessions.get("/{session_id}", response_model=SessionView, responses=errors(404))
async def show_session(request: Request, session_id: str) -> dict[str, Any]:
    """One session."""
    return view(service_of(request).handle(session_id))


@sessions.delete("/{session_id}", response_model=Deleted, responses=errors(404))
async def close_session(request: Request, session_id: str) -> dict[str, Any]:
    """End a session."""
    handle = service_of(request).handle(session_id)
    await run_in_threadpool(handle.close)
    return {"id": handle.id}


@sessions.post(
    "/{session_id}/commands",
    response_model=CommandTaken,
    responses=BODY | errors(404),
    openapi_extra=takes("CommandRequest"),
)
async def command_session(request: Request, session_id: str) -> dict[str, Any]:
    """Steer a session; the command takes effect at the next chunk border."""
    service = service_of(request)
    handle = service.handle(session_id)
    fields = await read_body(request, None)
    try:
        number = await service.work(service.command, handle, fields)
    except ValueError as error:
        raise ApiError(400, "invalid_request", str(error)) from error
    return {"number": number, "state": plain(handle.session.state())}


@sessions.get("/{session_id}/record", responses=errors(404))
async def record_session(request: Request, session_id: str) -> dict[str, Any]:
    """The session's options and commands: a file from which the same frames can be made again."""
    handle = service_of(request).handle(session_id)
    try:
        return await run_in_threadpool(handle.session.record)
    except ValueError as error:
        raise ApiError(400, "invalid_request", str(error)) from error


@sessions.websocket("/{session_id}/stream")
async def stream_session(
    socket: WebSocket,
    session_id: str,
    format: Format = "jpeg",
    after: Annotated[int, Query(ge=-1, lt=1 << 53)] = -1,
    quality: Annotated[int | None, Query(ge=1, le=100)] = None,
) -> None:
    """A session's chunks as they are made, and messages both ways; see `wire`."""
    service = service_of(socket)
    try:
        handle = service.handle(session_id)
        try:
            viewer = Viewer(socket, service, handle, Wish(format, after, quality))
        except ValueError as error:
            raise ApiError(400, "invalid_request", str(error)) from error
        await viewer.run()
    except ApiError as error:
        service.refused(error.code)
        await refuse(error, socket.scope, socket.receive, socket.send)
