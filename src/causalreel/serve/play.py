"""A live video without a server: shown in a window or written away, steered by a timed script or by typed lines."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from causalreel.files import read_lines
from causalreel.infer.inputs import read_picture
from causalreel.infer.live import MODES, understand
from causalreel.infer.models import Profile
from causalreel.infer.schedule import adapt
from causalreel.serve.commands import check, text
from causalreel.serve.records import MAX_COMMANDS
from causalreel.serve.session import Emitted, Session


@dataclass(frozen=True)
class Timed:
    """A command at a time of the video, in seconds from its first frame."""

    time_s: float
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


MOST_BYTES = 4 << 20
"""Of a script."""


def read_script(path: Path, profile: Profile) -> list[Timed]:
    """A file of timed commands, in order, all of which the model takes; empty lines and those after # do not count.

    A line is a time and a prompt (12.5 a blue square moves left), or JSON: {"time": 12.5, "command": "prompt", "text":
    ..., "mode": "fade"}. A picture is named by its path from the script's folder. ValueError names the line that is
    neither, or asks for what cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no script at {path}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES >> 20} MiB: it is no script")
    found = []
    for row, line in enumerate(read_lines(path), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            timed = _timed(line)
            found.append(replace(timed, arguments=_checked(timed, path.parent, profile)))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}:{row}: {error}") from None
    if len(found) > MAX_COMMANDS:
        raise ValueError(f"{path} holds {len(found)} commands, at most {MAX_COMMANDS} are allowed")
    return sorted(found, key=lambda timed: timed.time_s)


def _checked(timed: Timed, folder: Path, profile: Profile) -> dict[str, Any]:
    """The command's arguments as a session takes them."""
    told = check(timed.name, timed.arguments)
    for prompt in (told.get("text"), told.get("prompt")):
        if prompt is not None:
            understand(profile.export, [prompt])
    if timed.name == "steps":
        adapt(profile.sampling, steps=told["steps"])
    if told.get("image") is not None:
        picture = folder / text("image", told["image"])
        told["image"] = read_picture(picture, profile.size)[0]
    return told


LINE = 'expected "12.5 prompt text" or a JSON object with time and command'


def _timed(line: str) -> Timed:
    if line.startswith("{"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{LINE}; this is not JSON") from None
        if "time" not in entry:
            raise ValueError(f"{LINE}; there is no time")
        name = entry.pop("command", "prompt")
        return Timed(_time(entry.pop("time")), name, entry)
    time_s, _, words = line.partition(" ")
    try:
        seconds = float(time_s)
    except ValueError:
        raise ValueError(f"{LINE}; got {line!r:.80}") from None
    if not words.strip():
        raise ValueError(f"{LINE}; got {line!r:.80}")
    return Timed(_time(seconds), "prompt", {"text": words.strip()})


def _time(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MOST_TIME_S:
        raise ValueError(f"{LINE}; a time must be a number of seconds from 0 to {MOST_TIME_S:g}, got {value!r:.40}")
    return float(value)


MOST_TIME_S = 1e9


def parse_line(line: str) -> tuple[str, dict[str, Any]] | None:
    """A typed line -> command and arguments, None if it is empty. A line without a slash is a prompt.

    /switch TEXT, /recompute TEXT, /fade TEXT, /pause, /resume, /step [N], /restart [SEED], /steps N, /fps N, /close.
    """
    line = line.strip()
    if not line.startswith("/"):
        return ("prompt", {"text": line}) if line else None
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name in MODES:
        return "prompt", {"text": rest, "mode": name}
    values: dict[str, tuple[str, Callable[[str], Any]]] = {
        "step": ("chunks", int),
        "restart": ("seed", int),
        "steps": ("steps", int),
        "fps": ("fps", float),
    }
    if name in values and rest:
        key, read = values[name]
        return name, {key: read(rest)}
    if rest:
        raise ValueError(f"/{name} takes nothing behind it, got {rest!r}")
    return name, {}


class Typed:
    """Lines from a file such as standard input, read beside the work; `commands` has those that came since."""

    def __init__(self, file: TextIO) -> None:
        self._lines: queue.Queue[str] = queue.Queue(maxsize=1000)
        threading.Thread(target=self._read, args=(file,), name="causalreel-typed", daemon=True).start()

    def _read(self, file: TextIO) -> None:
        for line in file:
            self._lines.put(line)

    def lines(self) -> Iterator[str]:
        """What has been typed and not been taken yet."""
        while True:
            try:
                yield self._lines.get_nowait()
            except queue.Empty:
                return


def play(
    session: Session,
    *,
    frames: int | None = None,
    script: Iterable[Timed] = (),
    typed: Typed | None = None,
    say: Callable[[str], None] = lambda line: None,
    realtime: bool = False,
    idle: Callable[[], None] | None = None,
) -> Iterator[Emitted]:
    """Yield chunks until `frames` pixel frames are made (the last chunk cut there; None: until close).

    script: commands that take effect at the first chunk border at or behind their time. typed: refused lines are told
    to `say`, and so is each command that took effect. realtime: no chunk before its time of showing. idle: called again
    and again while the video is paused; a pause that neither it nor `typed` can end is a ValueError.
    """
    waiting, begun = list(script), time.monotonic()
    while not session.closed and (frames is None or session.frames < frames):
        while waiting and waiting[0].time_s <= session.frames / session.fps:
            timed = waiting.pop(0)
            session.command(timed.name, **timed.arguments)
        for line in () if typed is None else typed.lines():
            _obey(session, line, say)
        made = session.next_chunk()
        if made is None:
            if not session.closed and typed is None and idle is None:
                raise ValueError("the script pauses the video, and nothing is there to resume it")
            if idle is not None:
                idle()
            time.sleep(0.02)
            continue
        for command in made.commands:
            say(f"{command.name} {command.arguments}: in force at frame {made.first_frame}")
        if realtime:
            begun = max(begun, time.monotonic() - (made.first_frame + len(made.frames)) / session.fps)
            time.sleep(max(0.0, begun + made.first_frame / session.fps - time.monotonic()))
        yield made if frames is None else _cut(made, frames)


def _cut(made: Emitted, frames: int) -> Emitted:
    return replace(made, frames=made.frames[: max(0, frames - made.first_frame)])


def _obey(session: Session, line: str, say: Callable[[str], None]) -> None:
    try:
        command = parse_line(line)
        if command is not None:
            session.command(command[0], **command[1])
    except ValueError as error:
        say(f"not understood: {error}")


class Window:
    """A window that shows chunks as they come; keys: space pauses and resumes, r restarts, q closes.

    It opens at once, which raises ValueError where it cannot, and plays from `begin` on.
    """

    def __init__(self) -> None:
        try:
            import tkinter
        except ImportError:
            raise ValueError("no window here: Python has no tkinter; write the video with -o FILE or -o -") from None
        try:
            self._window = tkinter.Tk()
        except tkinter.TclError as error:
            raise ValueError(f"no window here ({error}); write the video with -o FILE or -o -") from None
        self._label, self._photo = tkinter.Label(self._window, text="Loading the model", width=40, height=10), None
        self._label.pack()
        self._window.title("causalreel")
        self._window.update()

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self._window.destroy()

    def begin(self, session: Session, *, scale: int = 1) -> None:
        """From now on it is this session's window."""
        self.session, self.scale, self._shown_s = session, scale, time.monotonic()
        self._window.protocol("WM_DELETE_WINDOW", self._leave)
        self._window.bind("q", self._leave)
        self._window.bind("r", lambda _: session.command("restart"))
        self._window.bind("<space>", lambda _: session.command("resume" if session.paused else "pause"))

    def idle(self) -> None:
        """Attend to keys and the mouse."""
        self._window.update()

    def show(self, made: Emitted) -> None:
        """Show a chunk at the session's frame rate; returns with its last frame on the screen."""
        from PIL import Image, ImageTk

        self._window.title(f"causalreel: {made.prompt}")
        for picture in made.frames.numpy():
            self._shown_s = max(self._shown_s + 1 / self.session.fps, time.monotonic())
            image = Image.fromarray(picture)
            size = image.width * self.scale, image.height * self.scale
            self._photo = ImageTk.PhotoImage(image.resize(size, Image.Resampling.NEAREST))  # tkinter keeps none
            self._label.configure(image=self._photo, text="", width=size[0], height=size[1])
            self._window.update()
            while not self.session.closed and time.monotonic() < self._shown_s:
                self._window.update()
                time.sleep(0.002)

    def _leave(self, *_: object) -> None:
        self.session.close()
