"""What a misspelt word probably meant."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a third of the letters or less turns into `word`; None if none is so close."""
    word = word.lower()
    if len(word) > 40:
        return None
    found = min(((distance(word, one.lower()), one) for one in known), default=None)
    return found[1] if found is not None and found[0] <= max(1, max(len(word), len(found[1])) // 3) else None


def distance(a: str, b: str) -> int:
    """How many letters are to be put in, left out, replaced or swapped with the next to make one of the other."""
    before, row = list[int](), list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        earlier, before, row = before, row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], earlier[j - 2] + 1)
    return row[-1]
