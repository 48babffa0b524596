"""What groups of videos are made into: captions embedded, then clips decoded in a thread and encoded meanwhile."""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from causalreel.data.clips import Clip, LeftOut, cut
from causalreel.data.groups import WORK, Group, Plan, Share, Teller, read_part, write_part
from causalreel.data.listing import Item
from causalreel.data.packing import without_zeros
from causalreel.data.sheet import thumbnail
from causalreel.files import write_text
from causalreel.types import VideoCodec

T = TypeVar("T")


# ---- captions


def embed(out: Path, groups: Sequence[Group], plan: Plan) -> None:
    """Embed the captions of groups that have no text yet, and the unconditional text if it is not there; the encoder is
    let go before anything else is loaded."""
    waiting = [group for group in groups if not group.text.is_file()]
    null = out / WORK / "null.safetensors"
    if not waiting and null.is_file():
        return
    encoder = plan.models.load_text()
    if not null.is_file():
        write_part(null, {"text": without_zeros(encoder.null(1)[0]).cpu()})
    tell = Teller()
    for done, group in enumerate(waiting, 1):
        tensors: dict[str, Tensor] = {}
        for at, item in enumerate(group.items):
            refused = item.problem
            if item.caption is not None:
                try:
                    tensors[f"text.{at}"] = without_zeros(encoder.encode([item.caption])[0]).cpu()
                except ValueError as error:
                    refused = str(error)
            if refused is not None:
                told = refused.encode(errors="backslashreplace")  # a file's name may be no UTF-8
                tensors[f"refused.{at}"] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        write_part(group.text, tensors)
        tell(f"embedded captions of {done * plan.group} of about {len(waiting) * plan.group} videos")
    if release := getattr(encoder, "release", None):
        release()
    del encoder
    if plan.models.device.type == "cuda":
        torch.cuda.empty_cache()


# ---- clips

Event = tuple[Group, int, Clip | LeftOut | None]
"""What comes of a video of a group; None at its end."""


def encode_clips(groups: Sequence[Group], plan: Plan, share: Share) -> None:
    """Encode the clips of groups; videos are decoded meanwhile, in a thread."""
    if not groups:
        return
    codec = plan.models.load_codec()
    waiting = sum(not group.end(at).is_file() for group in groups for at in range(len(group.items)))
    tell, counts, began = Teller(), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="causalreel-") as scratch:
        events = _ahead(_decoded(groups, plan, Path(scratch)), depth=2)
        for group, at, found in _by_video(events):
            told = _encode_video(codec, group, at, found, plan)
            counts.update(videos=1, clips=told["clips"], left=len(told["left"]))
            rate = counts["clips"] / max(1e-6, time.monotonic() - began)
            whose = f" (process {share.rank} of {share.size})" if share.size > 1 else ""
            tell(
                f"prepared {counts['videos']} of {waiting} videos{whose}: {counts['clips']} clips, {counts['left']} "
                f"left out, {rate:.2f} clips a second"
            )
            if all(group.end(each).is_file() for each in range(len(group.items))):
                group.close()
    for group in groups:  # those whose last video was finished before a kill
        if not group.is_done:
            group.close()


def _decoded(groups: Sequence[Group], plan: Plan, scratch: Path) -> Iterator[Event]:
    """Every video's clips and what is left out of it, group by group; what is finished is not decoded again."""
    for group in groups:
        embedded = read_part(group.text)
        for at, item in enumerate(group.items):
            if group.end(at).is_file():
                continue
            if (refused := embedded.get(f"refused.{at}")) is not None:
                yield group, at, LeftOut(item.start, f"bad caption: {bytes(refused.tolist()).decode()}")
            elif item.caption is None:
                yield group, at, LeftOut(item.start, "no caption")
            else:
                for found in _clips_of(item, plan, scratch):
                    yield group, at, found
            yield group, at, None


def _clips_of(item: Item, plan: Plan, scratch: Path) -> Iterator[Clip | LeftOut]:
    """As `clips.cut`; a video that cannot be decoded, or not to its end, is left out from there on."""
    at = item.start
    try:
        with item.on_disk(scratch) as path:
            for found in cut(path, plan.cutting, start=item.start, end=item.end):
                at = found.start
                yield found
    except (ValueError, FileNotFoundError, PermissionError) as error:
        yield LeftOut(at, f"cannot be decoded: {str(error).replace(str(item.file), item.name)}")


def _by_video(events: Iterator[Event]) -> Iterator[tuple[Group, int, Iterator[Clip | LeftOut]]]:
    """Events of one video after the other; each is taken to its end before the next."""

    def rest(first: Event) -> Iterator[Clip | LeftOut]:
        event = first
        while event[2] is not None:
            yield event[2]
            event = next(events)

    for event in events:
        yield event[0], event[1], rest(event)


def _encode_video(
    codec: VideoCodec, group: Group, at: int, found: Iterator[Clip | LeftOut], plan: Plan
) -> dict[str, Any]:
    """Encode a video's clips, a part for each batch; parts that are there are left as they are. -> what was written."""
    left: list[dict[str, Any]] = []
    held: list[Clip] = []
    parts = clips = 0

    def flush() -> None:
        nonlocal parts, clips
        if not group.part(at, parts).is_file():
            _encode_part(codec, group.part(at, parts), held, plan)
        parts, clips = parts + 1, clips + len(held)
        held.clear()

    for each in found:
        if isinstance(each, LeftOut):
            left.append({"source": group.items[at].name, "start": round(each.start, 3), "reason": each.reason})
            continue
        held.append(each)
        if len(held) == plan.batch:
            flush()
    if held:
        flush()
    told = {"parts": parts, "clips": clips, "left": left}
    write_text(group.end(at), json.dumps(told))
    return told


@torch.no_grad()
def _encode_part(codec: VideoCodec, path: Path, clips: Sequence[Clip], plan: Plan) -> None:
    video = torch.from_numpy(np.stack([clip.frames for clip in clips])).to(plan.models.device)  # (B,T,H,W,3)
    latents = encode(codec, video.permute(0, 1, 4, 2, 3))
    if not latents.isfinite().all():
        raise FloatingPointError(
            f"the codec gave latents that are not finite for {path.name}; float32 weights are needed"
        )
    shown = torch.from_numpy(np.stack([thumbnail(clip.frames) for clip in clips]))
    starts = torch.tensor([clip.start for clip in clips], dtype=torch.float64)
    write_part(path, {"latents": latents.to(plan.dtype).cpu(), "shown": shown, "starts": starts})


def encode(codec: VideoCodec, video: Tensor) -> Tensor:
    """video (B,T,3,H,W) uint8 -> latents (B,F,C,h,w): piece by piece where the codec can, so that memory is bounded."""
    stream: Any = getattr(codec, "encode_stream", None)
    if stream is None:
        return codec.encode(_scaled(video))
    run, first, step = stream(), codec.geometry.first, 4 * codec.geometry.temporal
    pieces = [video[:, :first], *video[:, first:].split(step, dim=1)]
    return torch.cat([run(_scaled(piece)) for piece in pieces if piece.shape[1]], dim=1)


def _scaled(video: Tensor) -> Tensor:
    return video.float().div_(127.5).sub_(1)


def _ahead(items: Iterator[T], *, depth: int) -> Iterator[T]:
    """The same items, made in a thread, at most `depth` of them before they are asked for; its errors come out here."""
    made: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    is_over = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not is_over.is_set():
            with suppress(queue.Full):
                made.put((kind, value), timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed over
            put("error", error)

    thread = threading.Thread(target=work, name="causalreel decoding", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        is_over.set()
        thread.join()
