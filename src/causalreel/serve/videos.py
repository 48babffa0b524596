"""Routes of the videos made in the background: create, look, download, list, cancel or delete."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from causalreel.infer.clips import ClipRequest
from causalreel.infer.live_video import in_range
from causalreel.infer.scripts import is_script
from causalreel.serve.bodies import BODY, DOOR, errors, read_body, takes
from causalreel.serve.jobs import Jobs, options_of, pack_image
from causalreel.serve.safety import ApiError
from causalreel.serve.service import Service
from causalreel.serve.session import Session
from causalreel.serve.wire import Deleted, VideoList, VideoRequest, VideoView

videos = APIRouter(prefix="/v1/videos", tags=["videos"], responses=DOOR | errors(503))


def jobs_of(request: Request) -> Jobs:
    jobs = request.app.state.service.jobs
    if jobs is None:
        raise ApiError(503, "starting", "the server is not up yet")
    return jobs


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A record as the API shows it."""
    error = None if row["error_code"] is None else {"code": row["error_code"], "message": row["error_message"]}
    return {**row, "error": error}


def planned(service: Service, wanted: VideoRequest) -> dict[str, Any]:
    """A request as the fields of a record, checked as far as can be without making anything."""
    scheduler, limit = service.scheduler, service.settings.video_frames
    pipeline = scheduler.pipeline
    height, width = pipeline.size
    try:
        if is_script(wanted.prompt):
            raise ValueError("prompts by time are for `causalreel generate`; open a session and change its prompt")
        image = None if wanted.image is None else in_range(wanted.image)
        request = ClipRequest(wanted.prompt, wanted.frames, wanted.seed, wanted.steps, wanted.chunk, image)
        frames = pipeline.geometry.frames_of(request.check(pipeline, pipeline.text).plan.frames)
        if frames > limit:
            raise ValueError(f"frames must be at most {limit}, got {frames}")
        row = {
            **vars(wanted),
            "model": pipeline.export.name,
            "frames": frames,
            "fps": pipeline.export.fps,
            "size": f"{width}x{height}",
            "image": None if image is None else pack_image(image),
        }
        Session(pipeline, options_of(row), policy=scheduler.policy)  # checks everything, makes nothing
    except ValueError as error:
        raise ApiError(400, "invalid_request", str(error)) from error
    return row


@videos.post(
    "",
    status_code=202,
    response_model=VideoView,
    responses=BODY | errors(422, 507),
    openapi_extra=takes("VideoRequest", multipart=True),
)
async def create_video(request: Request, response: Response) -> dict[str, Any]:
    """Ask for a video; it is made in the background."""
    wanted = await read_body(request, VideoRequest)
    service = request.app.state.service
    fields = await service.work(planned, service, wanted)
    row = await run_in_threadpool(jobs_of(request).create, fields)
    response.headers["location"] = f"/v1/videos/{row['id']}"
    return shown(row | {"progress": 0})


@videos.get("", response_model=VideoList, responses=errors(404, 422))
async def list_videos(
    request: Request,
    after: Annotated[str | None, Query(max_length=64, description="Id of the last video seen.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Videos in the order in which they were asked for, a page of them."""
    rows = await run_in_threadpool(jobs_of(request).list, after=after, limit=limit, newest_first=order == "desc")
    return {"data": [shown(row) for row in rows[:limit]], "has_more": len(rows) > limit}


@videos.get("/{video_id}", response_model=VideoView, responses=errors(404))
async def show_video(request: Request, video_id: str) -> dict[str, Any]:
    """One video's status and progress."""
    return shown(await run_in_threadpool(jobs_of(request).get, video_id))


class _File(FileResponse):
    """A file whose refusals have the form of all others."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                ranges = {k.decode(): v.decode() for k, v in message["headers"] if k == b"content-range"}
                raise ApiError(message["status"], "invalid_request", "the range must be one of this file", ranges)
            await send(message)

        await super().__call__(scope, receive, watched)


@videos.get(
    "/{video_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {"video/mp4": {}}},
        206: {"content": {"video/mp4": {}}, "description": "The range that was asked for."},
        **errors(404, 409, 416),
    },
)
async def download_video(request: Request, video_id: str) -> Response:
    """The finished file; ranges of it too."""
    jobs = jobs_of(request)
    row = await run_in_threadpool(jobs.get, video_id)
    path = jobs.store.file(row["id"])
    if row["status"] != "completed" or not path.is_file():
        raise ApiError(409, "not_completed", f"this video is {row['status'].replace('_', ' ')}")
    return _File(path, media_type="video/mp4", filename=path.name)


@videos.delete("/{video_id}", response_model=Deleted | VideoView, responses=errors(404, 507))
async def delete_video(request: Request, video_id: str) -> dict[str, Any]:
    """Cancel a video that is not finished, which keeps its record; remove one that is."""
    row = await run_in_threadpool(jobs_of(request).delete, video_id)
    return {"id": video_id, "deleted": True} if row is None else shown(row)
