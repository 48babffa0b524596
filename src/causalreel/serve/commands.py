"""What a session can be told: the commands, what each takes, and the checks that need no session and no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from causalreel.infer.live import MODES

MOST_SEED = (1 << 53) - 1
"""Exact in JSON and JavaScript too."""
MOST_STEPS = 100
LEAST_FPS, MOST_FPS = 0.1, 240.0
MOST_TEXT = 10_000
MOST_CHUNKS = 1000
"""Of a step or a fade."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "prompt": ("text", "mode", "chunks"),
    "pause": (),
    "resume": (),
    "step": ("chunks",),
    "restart": ("seed", "prompt"),
    "steps": ("steps",),
    "fps": ("fps",),
    "image": ("image",),
    "close": (),
}
"""Command -> the names of what it takes."""


def check(name: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments with what was left out filled in; ValueError for what no session could obey.

    What depends on the model is the session's to check: words, steps of a many-step model, shape and use of a picture.
    """
    if not isinstance(name, str) or name not in ARGUMENTS:
        raise ValueError(f"name must be one of {', '.join(ARGUMENTS)}, got {name!r:.80}")
    if unknown := [key for key in arguments if key not in ARGUMENTS[name]]:
        raise ValueError(f"{name} takes {', '.join(ARGUMENTS[name]) or 'no arguments'}; got {unknown[0]!r:.80}")
    return _CHECKS[name](arguments) if name in _CHECKS else {}


ALWAYS = ("pause", "resume", "step", "close")
"""Commands that are taken however many there were: they change when chunks are made, and none of them."""
_SIDES = (("pause", "resume", "step"), ("fps",), ("steps",), ("prompt", "restart", "image"), ("close",))
"""Commands of different sides do not know of each other: in what order they are told makes no difference."""


def fold(log: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Append a command that took effect to a log of them; what it supersedes goes.

    Superseded is what was told at the same chunk border and shows in no chunk, since the later command alone leads to
    the same: a replay of the log makes the same frames.
    """
    side = next(side for side in _SIDES if entry["name"] in side)
    arguments = dict(entry["arguments"])
    while (last := _last(log, entry["at"], side)) is not None and _supersedes(entry["name"], arguments, log[last]):
        del log[last]
    log.append({**entry, "arguments": arguments})


def _last(log: list[dict[str, Any]], at: int, side: tuple[str, ...]) -> int | None:
    """Where the last command of a side is that was told at this border."""
    for place in range(len(log) - 1, -1, -1):
        if log[place]["at"] != at:
            return None
        if log[place]["name"] in side:
            return place
    return None


def _supersedes(name: str, arguments: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether the old command may go; what is left of it comes into the new one's arguments."""
    before = old["arguments"]
    match name, old["name"]:
        case ("pause" | "resume", _):
            return True
        case ("step", "step"):
            arguments["chunks"] = min(MOST_CHUNKS, arguments["chunks"] + before["chunks"])
            return True
        case ("restart", "restart"):
            arguments |= {key: before[key] for key in before if arguments.get(key) is None}
            return True
        case ("prompt", "prompt"):
            if arguments["mode"] != "fade" and before["mode"] == "recompute":
                arguments["mode"] = "recompute"  # the past is read again in any case
            return arguments["mode"] != "fade" or before["mode"] == "fade"
    return name == old["name"] and name in ("fps", "steps", "image")


def _prompt(arguments: dict[str, Any]) -> dict[str, Any]:
    mode = arguments.get("mode", "recompute")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    chunks = integer("chunks", arguments.get("chunks", 4), 1, MOST_CHUNKS)
    return {"text": text("text", arguments.get("text")), "mode": mode, "chunks": chunks}


def _restart(arguments: dict[str, Any]) -> dict[str, Any]:
    seed, prompt = arguments.get("seed"), arguments.get("prompt")
    return {
        "seed": None if seed is None else integer("seed", seed, 0, MOST_SEED),
        "prompt": None if prompt is None else text("prompt", prompt),
    }


def _image(arguments: dict[str, Any]) -> dict[str, Any]:
    if "image" not in arguments:
        raise ValueError("image needs the argument image: a picture, or None to begin without")
    return {"image": arguments["image"]}


_CHECKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "prompt": _prompt,
    "step": lambda arguments: {"chunks": integer("chunks", arguments.get("chunks", 1), 1, MOST_CHUNKS)},
    "restart": _restart,
    "steps": lambda arguments: {"steps": integer("steps", arguments.get("steps"), 1, MOST_STEPS)},
    "fps": lambda arguments: {"fps": number("fps", arguments.get("fps"), LEAST_FPS, MOST_FPS)},
    "image": _image,
}


def text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MOST_TEXT:
        size = f" of {len(value)} characters" if isinstance(value, str) and len(value) > MOST_TEXT else ""
        limit = f", of at most {MOST_TEXT} characters"
        raise ValueError(f"{name} must be a text that is not empty{limit if size else ''}, got {value!r:.80}{size}")
    return value


def integer(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {_shown(value)}")
    return value


def number(name: str, value: Any, least: float, most: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    """A value in a message; Python refuses to print whole numbers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 1 << 80:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r:.80}"
