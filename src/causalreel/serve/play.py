"""A live video without a server: shown in a window or written away, steered by a timed script or by typed lines."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from causalreel.files import read_lines
from causalreel.foreign import parse_json
from causalreel.infer.commands import MOST_VALUES, Command, Keys, Prompt, Steps, describe, parse, parse_line
from causalreel.infer.inputs import read_picture
from causalreel.infer.live import understand
from causalreel.infer.live_video import steering_of
from causalreel.infer.models import Profile
from causalreel.infer.schedule import adapt
from causalreel.infer.values import Reads, Text
from causalreel.serve.emitted import Emitted
from causalreel.serve.records import MAX_COMMANDS
from causalreel.serve.session import Session


@dataclass(frozen=True, eq=False)
class Timed:
    """A command at a time of the video, in seconds from its first frame."""

    time_s: float
    command: Command


MOST_BYTES = 4 << 20
"""Of a script."""
MOST_TIME_S = 1e9
LINE = 'expected "12.5 prompt text" or a JSON object with time and command'


def read_script(path: Path, profile: Profile) -> list[Timed]:
    """A file of timed commands, in order, all of which the model takes; empty lines and those after # do not count.

    A line is a time and a prompt (12.5 a blue square moves left), a time and a command as it is typed (14 /keys w
    left), or JSON: {"time": 12.5, "command": "prompt", "text": ..., "mode": "fade"}. A picture is named by its path
    from the script's folder. ValueError names the line that is neither, goes back in time, or asks for what cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no script at {path}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES >> 20} MiB: it is no script")
    found, picture = [], picture_file(path.parent, profile.size)
    for row, line in enumerate(read_lines(path), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            timed = _timed(line, picture)
            check_order(found, timed)
            understand(profile.export, timed.command.prompts)
            if isinstance(timed.command, Steps):
                adapt(profile.sampling, steps=timed.command.steps)
            if isinstance(timed.command, Keys):
                steering_of(profile.export).check((*timed.command.pressed, *timed.command.tapped))
            found.append(timed)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}:{row}: {error}") from None
    if len(found) > MAX_COMMANDS:
        raise ValueError(f"{path} holds {len(found)} commands, at most {MAX_COMMANDS} are allowed")
    return found


def check_order(before: Sequence[Timed], timed: Timed) -> None:
    """ValueError for a line that goes back behind the one before it."""
    if before and timed.time_s < before[-1].time_s:
        raise ValueError(f"{timed.time_s:g} s is before {before[-1].time_s:g} s: a script cannot go back in time")


def picture_file(folder: Path, size: tuple[int, int]) -> Reads:
    """What reads pictures that are named by their paths from a folder, cut to the size (height, width)."""
    return lambda name: read_picture(folder / Text().read("image", name), size)[0]


def _timed(line: str, picture: Reads) -> Timed:
    if not line.startswith("{"):
        time_s, _, words = line.partition(" ")
        try:
            seconds = float(time_s)
        except ValueError:
            raise ValueError(f"{LINE}; got {line!r:.80}") from None
        if not words.strip():
            raise ValueError(f"{LINE}; got {line!r:.80}")
        if words.strip().startswith("/"):
            command = parse_line(words, picture=picture)
            assert command is not None
            return Timed(_time(seconds), command)
        return Timed(_time(seconds), Prompt(Text().read("text", words.strip())))
    entry = parse_json(line, "the line", items=MOST_VALUES)
    if "time" not in entry:
        raise ValueError(f"{LINE}; there is no time")
    time_s = _time(entry.pop("time"))
    if "command" in entry:
        entry["name"] = entry.pop("command")
    return Timed(time_s, parse({"name": Prompt.name, **entry}, picture=picture))


def _time(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MOST_TIME_S:
        raise ValueError(f"{LINE}; a time must be a number of seconds from 0 to {MOST_TIME_S:g}, got {value!r:.40}")
    return float(value)


def timed_at(words: str) -> float:
    """Seconds as they are written in a file; ValueError."""
    try:
        return _time(float(words))
    except ValueError:
        raise ValueError(f"expected seconds and what is held from then on; got {words!r:.40}") from None


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
    attend: Callable[[Session], None] | None = None,
) -> Iterator[Emitted]:
    """Yield chunks until `frames` pixel frames are made (the last chunk cut there; None: until close).

    script: commands that take effect at the first chunk border at or behind their time; ValueError at once for those
    that the model cannot obey. typed: what is wrong with a line goes to `say`, and so does each command that took
    effect. realtime: no chunk before its time of showing. idle: called again and again while the video is paused; a
    pause that neither it nor `typed` can end is a ValueError. attend: called before every chunk, to tell what is held.
    """
    waiting, begun = list(script), time.monotonic()
    for timed in waiting:
        timed.command.check(session.video)
    while not session.closed and (frames is None or session.frames < frames):
        while waiting and waiting[0].time_s <= session.frames / session.fps:
            timed = waiting.pop(0)
            session.command(timed.command)
        for line in () if typed is None else typed.lines():
            _obey(session, line, say)
        if attend is not None:
            attend(session)
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
    if line.strip() == "/help":
        for one in describe():
            say(f"{one['typed']}: {one['about']}")
        return
    try:
        command = parse_line(line, picture=picture_file(Path(), session.pipeline.size))
        if command is not None:
            session.command(command)
    except (ValueError, OSError) as error:
        say(f"not understood: {error}")


class Window:
    """A window that shows chunks as they come; keys: space pauses and resumes, r restarts, q closes, others steer.

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
        from causalreel.serve.keyboard import bind

        self.session, self.scale, self._shown_s = session, scale, time.monotonic()
        self._window.protocol("WM_DELETE_WINDOW", self._leave)
        self._window.bind("q", self._leave)
        self._window.bind("r", lambda _: session.command("restart"))
        bind(self._window, session)
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
