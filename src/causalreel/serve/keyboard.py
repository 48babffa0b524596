"""Keys without a page: those of a terminal or of a window, and timed ones from a file.

A terminal tells when a key goes down and again while it repeats, never when it is let go of: a key counts as held for
`HELD_S` after it was heard, which bridges the pause before it begins to repeat, and the space bar lets go of all.
"""

from __future__ import annotations

import codecs
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from causalreel.control.steering import Steering
from causalreel.files import read_lines
from causalreel.foreign import shown
from causalreel.infer.commands import Keys, parse_line
from causalreel.infer.live_video import steering_of
from causalreel.infer.models import Profile
from causalreel.infer.steered import read_held
from causalreel.serve.play import MOST_BYTES, Timed, check_order, timed_at
from causalreel.serve.records import MAX_COMMANDS
from causalreel.serve.session import Session

HELD_S = 0.6
"""Longer than the pause before a key repeats, on most systems half a second."""
ARROWS = {"A": "up", "B": "down", "C": "right", "D": "left"}
"""Last letters of the sequences that a terminal sends."""
LONGEST = 32
"""Letters of such a sequence; a longer one is none."""
INSTEAD = {"left": ("left", "j", "a"), "right": ("right", "l", "d"), "up": ("up", "i", "w"), "down": ("down", "k", "s")}
"""What an arrow can mean: the first of these that the model has."""


def read_keys(given: str, profile: Profile, fps: float) -> list[Timed]:
    """Keys by time: the name of a file of them, or else keys and for how many latent frames, as `generate` takes them
    (w*5,left+w*3). ValueError for what is neither, which names the nearest key."""
    steering = steering_of(profile.export)
    if os.path.isfile(given):  # which many keys are too long a name for
        return _read_file(Path(given), steering)
    try:
        held = read_held(given, steering)
    except ValueError as error:
        raise ValueError(f"there is no file {shown(given)!r}, and read as keys: {error}") from None
    found: list[Timed] = []
    for at, pressed in enumerate((*held, ())):  # of latent frame 1 + at; in the first one no key counts
        if pressed != (found[-1].command.arguments["pressed"] if found else ()):
            frames = 1 + at * profile.geometry.temporal if at else 0
            found.append(Timed(frames / fps, Keys(pressed)))
    return found


def _read_file(path: Path, steering: Steering) -> list[Timed]:
    """A line has seconds and all keys that are held from then on (1.5 w left), none to let go of all; empty lines and
    those after # do not count. ValueError names the line, one that goes back in time too, and the nearest key."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES >> 20} MiB: it is no file of keys")
    found = []
    for row, line in enumerate(read_lines(path), start=1):
        if not line or line.startswith("#"):
            continue
        seconds, _, held = line.partition(" ")
        try:
            command = parse_line(f"/keys {held}")
            assert isinstance(command, Keys)
            steering.check(command.pressed)
            timed = Timed(timed_at(seconds), command)
            check_order(found, timed)
            found.append(timed)
        except ValueError as error:
            raise ValueError(f"{path}:{row}: {error}") from None
    if len(found) > MAX_COMMANDS:
        raise ValueError(f"{path} holds {len(found)} changes of the keys, at most {MAX_COMMANDS} are allowed")
    return found


def named(key: str, steering: Steering) -> str | None:
    """The model's key for a letter or an arrow's name; None if it has none."""
    return next((name for name in INSTEAD.get(key, (key.lower(),)) if name in steering.names), None)


class Terminal:
    """Keys of a terminal, while it is entered; ValueError where standard input is none."""

    def __init__(self, file: TextIO = sys.stdin, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self.clock = file, clock
        self.heard: dict[str, float] = {}
        """Key -> when it was heard last, in the order in which they were pressed."""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._cut = ""
        """The beginning of a sequence whose end has not come yet."""
        if not file.isatty():
            raise ValueError("--keys terminal needs a terminal to listen to; give a file of timed keys otherwise")

    def __enter__(self) -> Terminal:
        import termios
        import tty

        self._before = termios.tcgetattr(self.file.fileno())
        tty.setcbreak(self.file.fileno())
        return self

    def __exit__(self, *_: object) -> None:
        import termios

        termios.tcsetattr(self.file.fileno(), termios.TCSADRAIN, self._before)

    def attend(self, session: Session) -> None:
        """Tell the session which keys are held now, if they are others than before."""
        steering, now = steering_of(session.pipeline.export), self.clock()
        tapped: list[str] = []
        for key in self._typed():
            if key == " ":
                tapped += self.heard
                self.heard.clear()
            elif (name := named(key, steering)) is not None:
                self.heard[name] = now
        tapped = [name for name in tapped if name not in session.video.pressed and name not in self.heard]
        self.heard = {name: at for name, at in self.heard.items() if now - at <= HELD_S}
        if not session.closed and not session.video.holds(tuple(self.heard), tapped):
            session.command("keys", pressed=list(self.heard), tapped=tapped)

    def _typed(self) -> list[str]:
        """Letters and names of arrows that have come, without waiting."""
        number, data = self.file.fileno(), b""
        while select.select([number], [], [], 0)[0] and (more := os.read(number, 1024)):
            data += more
        found, self._cut = keys_in(self._cut + self._decode(data))
        return found


def keys_in(text: str) -> tuple[list[str], str]:
    """What a terminal sent -> letters, spaces and the names of arrows, other sequences left out; and a sequence at its
    end that goes on in what it sends next."""
    found, at = [], 0
    while at < len(text):
        if text[at] == "\x1b" and text[at + 1 : at + 2] in ("", "[", "O"):
            end = at + 2
            while end < len(text) and not text[end].isalpha() and text[end] != "~":
                end += 1
            if end >= len(text):
                return found, text[at:] if len(text) - at < LONGEST else ""
            found += [ARROWS[letter] for letter in text[end] if letter in ARROWS]
            at = end + 1
        else:
            found += [text[at]] if text[at].isprintable() else []
            at += 1
    return found, ""


def bind(window: Any, session: Session) -> None:
    """Have a tkinter window's keys steer, if the model has some: W, A, S, D, other letters of keys, and arrows."""
    steering = session.pipeline.control
    if steering is None:
        return
    held: dict[str, str | None] = {}
    """Key -> the call that lets go of it: X tells of a repeating key as released and pressed."""

    def tell() -> None:
        if not session.closed:
            session.command("keys", pressed=list(held))

    def press(key: str) -> None:
        waiting = held.get(key)
        if waiting is not None:
            window.after_cancel(waiting)
        is_new = key not in held
        held[key] = None
        if is_new:
            tell()

    def lift(key: str) -> None:
        held.pop(key, None)
        tell()

    for symbol in (*"wasdijklu", "Left", "Right", "Up", "Down"):
        key = named(symbol.lower(), steering)
        if key is not None:
            window.bind(f"<KeyPress-{symbol}>", lambda _, key=key: press(key))
            window.bind(
                f"<KeyRelease-{symbol}>",
                lambda _, key=key: held.update({key: window.after(40, lift, key)}) if key in held else None,
            )
    window.bind("<FocusOut>", lambda _: (held.clear(), tell()) if held else None)
