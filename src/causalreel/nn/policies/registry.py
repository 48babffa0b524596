"""Context policies by name, and as text: `NAME` or `NAME:key=value,key=value`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable
from typing import Any

from causalreel.foreign import shown
from causalreel.nn.policies.deep_forcing import DeepForcing
from causalreel.nn.policies.infinity_rope import InfinityRope
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.memrope import MemRope
from causalreel.nn.policies.relax_forcing import RelaxForcing
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.nn.policies.rolling_sink import RollingSink
from causalreel.nn.policies.window import Context
from causalreel.spelling import nearest

AnyPolicy = Context | RollingSink | InfinityRope | DeepForcing | MemRope | RelaxForcing | RollingForcing
"""What an export may name: its key `policy` chooses, and `Context` where there is none."""

Fit = Callable[[int, int], dict[str, Any]]
"""Latent frames of a training clip and of a chunk -> the numbers with which a policy sees about as much."""


def _chosen(frames: int, chunk: int) -> dict[str, Any]:
    """A chunk sees a training clip's length: a third of what stays is the sink, the newest chunk and one in three."""
    budget = max(frames - chunk, chunk + 2)
    recent = max(budget // 4, chunk)
    return {"budget": budget, "recent": recent, "sink": min(budget // 3, budget - recent)}


POLICIES: dict[str, tuple[type[ContextPolicy], Fit]] = {
    "full": (Context, lambda frames, chunk: {}),
    "window": (Context, lambda frames, chunk: {"window": frames}),
    "sink": (Context, lambda frames, chunk: {"window": frames, "sink": chunk}),
    "re-indexed": (Context, lambda frames, chunk: {"window": frames, "sink": chunk, "last_position": frames - 1}),
    "rolling-sink": (RollingSink, lambda frames, chunk: {"sink_chunks": max(frames // chunk - 2, 1)}),
    "infinity-rope": (
        InfinityRope,
        lambda frames, chunk: {"cache_chunks": max(frames // chunk - 1, 2), "last_position": frames - 1},
    ),
    "deep-forcing": (DeepForcing, _chosen),
    "memrope": (MemRope, lambda frames, chunk: {"sink": chunk, "local": max(frames - 2 * chunk - 2, 1)}),
    "relax-forcing": (RelaxForcing, _chosen),
    "rolling-forcing": (
        RollingForcing,
        lambda frames, chunk: {"window": frames, "sink": chunk, "cache": frames + chunk},
    ),
}
"""Name -> class, and the numbers that it has for a model unless others are given."""


def policy_from(text: str, *, frames: int = 21, chunk: int = 3) -> ContextPolicy:
    """`NAME` or `NAME:key=value,...` for a model trained on clips of `frames` -> the policy; ValueError in one line."""
    name, _, rest = text.strip().partition(":")
    if name not in POLICIES:
        raise ValueError(
            f"policy must be one of {', '.join(POLICIES)}, got {shown(name, 40)!r}{_meant(name, POLICIES)}"
        )
    cls, fit = POLICIES[name]
    kinds = {key: kind for key, kind in typing.get_type_hints(cls).items() if key in numbers_of(cls)}
    given, told = fit(frames, chunk), set[str]()
    for entry in filter(None, (entry.strip() for entry in rest.split(","))):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if key not in kinds or not equals:
            takes = ", ".join(f"{key}=..." for key in kinds)
            raise ValueError(f"policy {name} takes {takes}; got {shown(entry, 40)!r}{_meant(key, kinds)}")
        if key in told:
            raise ValueError(f"policy {name}: {key} is given twice")
        told.add(key)
        given[key] = _number(name, key, value, kinds[key])
    try:
        policy = cls(**given)
        policy.check(chunk)
    except ValueError as error:
        raise ValueError(f"policy {name}: {error}") from None
    return policy


def _meant(word: str, known: Iterable[str]) -> str:
    found = nearest(word, known)
    return "" if found is None else f"; did you mean {found!r}?"


def numbers_of(cls: type[ContextPolicy]) -> dict[str, Any]:
    """The numbers of a policy, with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(typing.cast(Any, cls)) if field.name != "policy"}


def described(policy: ContextPolicy) -> str:
    """The policy as `policy_from` reads it."""
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(typing.cast(Any, policy))}
    name = values.pop("policy", None)
    if name is None:  # a plain one: named by what it has
        window, sink, last = values["window"], values["sink"], values["last_position"]
        name = "re-indexed" if last is not None else "sink" if sink else "full" if window is None else "window"
        values = {key: value for key, value in values.items() if value is not None and (key != "sink" or value)}
    return name + (":" + ",".join(f"{key}={str(value).lower()}" for key, value in values.items()) if values else "")


def without_own(policy: ContextPolicy, *, frames: int, chunk: int) -> str:
    """The policy as `policy_from` reads it, without the numbers that its name alone gives it for such a model."""
    name, _, numbers = described(policy).partition(":")
    _, _, own = described(policy_from(name, frames=frames, chunk=chunk)).partition(":")
    named = [number for number in numbers.split(",") if number not in own.split(",")]
    return ":".join(filter(None, (name, ",".join(named))))


def _number(name: str, key: str, text: str, kind: Any) -> Any:
    """A value as the field's type; `none` and `true` where it has them."""
    choices = typing.get_args(kind) or (kind,)
    words = {"none": None} if type(None) in choices else {"true": True, "false": False} if bool in choices else {}
    if text in words:
        return words[text]
    cls = bool if bool in choices else float if float in choices else int
    try:
        if cls is bool or len(text) > 20:
            raise ValueError
        return cls(text)
    except ValueError:
        told = {bool: "true or false", float: "a number", int: "a whole number"}[cls]
        raise ValueError(f"policy {name}: {key} must be {told}, got {shown(text, 40)!r}") from None
