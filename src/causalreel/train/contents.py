"""What a run is made from, known by content: data, initial weights, codec, arithmetic. Places may change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from causalreel import config as configs

LATER = ("camera: none\n", "actions: 0\n")
"""Lines of a network's size that are newer than fingerprints: what does not have these is known as before."""


@dataclass(frozen=True)
class Content:
    """One thing that a result depends on."""

    what: str
    """Its part: data, codec, init.teacher ..."""
    place: str
    """Where it is now, for messages."""
    fingerprint: str


def fingerprints(contents: Iterable[Content]) -> dict[str, str]:
    """What to keep beside a result: part -> fingerprint."""
    return {content.what: content.fingerprint for content in contents}


def compare(contents: Iterable[Content], kept: Mapping[str, str], where: str) -> None:
    """ValueError naming the first part that is another than the one kept in `where`; parts not kept do not count."""
    for content in contents:
        before = kept.get(content.what, content.fingerprint)
        if before != content.fingerprint:
            raise ValueError(
                f"{content.what}: {content.place} is not what {where} was made from "
                f"({before[:12]} there, {content.fingerprint[:12]} here); give it the same or use another out"
            )


def facts_of(size: Any, context: Any) -> str:
    """What decides a network beside its weights, as text for a fingerprint: its ModelConfig and its context policy."""
    lines = configs.dump(size).splitlines(keepends=True)
    return "".join(line for line in lines if line not in LATER) + configs.dump(context)
