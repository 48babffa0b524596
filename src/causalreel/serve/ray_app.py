"""The server on Ray Serve: each replica is an application of its own, at a route of its own, on a GPU of its own.

A session lives in one process, and Ray Serve sends a request to whichever replica of an application is free. So an
application has exactly one replica, and a session's address says where it lives: /a/v1/sessions/..., /b/v1/...
Restarts, placement and the proxy are Ray's; nothing here schedules.

    serve run causalreel.serve.ray_app:build model=tiny replica=a gpus=0
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from causalreel.infer.models import load
from causalreel.serve.app import create_app
from causalreel.serve.handle import Limits
from causalreel.serve.safety import Settings
from causalreel.serve.scheduler import Scheduler

ONGOING = 1024
"""Requests that Ray lets into a replica at a time: each stream is one while it lasts, and Ray's own limit is 5."""


class Replica(BaseModel):
    """One replica; what `build` takes, as words or YAML."""

    model_config = ConfigDict(extra="forbid")

    model: str = "tiny"
    replica: str = Field("a", pattern=r"^[a-z0-9]{1,16}$")
    gpus: float = Field(1, ge=0)
    steps: int | None = None
    chunk: int | None = None
    sessions: int = Field(8, ge=1)
    token_file: Path | None = None
    data: Path | None = None


def build(arguments: dict[str, Any]) -> Any:
    """The fields of `Replica` -> an application for `serve run` or a Serve config file; serve it at /NAME."""
    try:
        from ray import serve  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("Ray Serve is needed; install it with: pip install 'causalreel[ray]'") from error
    wanted = Replica.model_validate(arguments)

    def make() -> Any:
        return asgi(wanted)  # where the replica runs: a pipeline does not travel

    deployment = serve.deployment(serve.ingress(make)())
    return deployment.options(
        name=f"causalreel-{wanted.replica}",
        num_replicas=1,
        max_ongoing_requests=ONGOING,
        ray_actor_options={"num_gpus": wanted.gpus},
    ).bind()


def asgi(wanted: Replica) -> Any:
    """The server of one replica, which finds its paths whatever route it is mounted at."""
    token = None if wanted.token_file is None else wanted.token_file.read_text(encoding="utf-8-sig").strip()
    pipeline = load(wanted.model, steps=wanted.steps, chunk=wanted.chunk, device="cuda" if wanted.gpus else "cpu")
    if pipeline.device.type == "cuda":
        from causalreel.infer.accelerate import accelerate

        pipeline = accelerate(pipeline, precision="bf16")
    scheduler = Scheduler(pipeline, Limits(sessions=wanted.sessions))
    settings = Settings(token=token, data=wanted.data, replica=wanted.replica)
    return Unrooted(create_app(scheduler, settings), scheduler)


class Unrooted:
    """ASGI around the server: paths without the route, since limits and tokens go by path; starts the scheduler."""

    def __init__(self, app: Any, scheduler: Scheduler) -> None:
        self.app, self.scheduler = app, scheduler

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self.scheduler.start()
            await self.app(scope, receive, send)
            await asyncio.to_thread(self.scheduler.close)
            return
        root = scope.get("root_path", "")
        if root and scope["path"].startswith(root):
            scope = {**scope, "path": scope["path"][len(root) :] or "/", "root_path": ""}
        await self.app(scope, receive, send)
