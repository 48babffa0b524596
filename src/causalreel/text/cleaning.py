"""Prompts as released Wan2.1 pipelines clean them before tokenisation.

More than white space changes: ftfy's defaults straighten curly quotes, narrow full-width letters and punctuation,
split ligatures, compose accents, drop control characters and repair mis-decoded UTF-8. The models were trained on text
cleaned so; leaving it out moves the tokens of, say, a Chinese prompt with full-width commas.
"""

from __future__ import annotations

from types import ModuleType


def clean(prompt: str) -> str:
    """One line of text: ftfy, HTML entities decoded twice, runs of Unicode white space as one space, none at the ends.

    Not idempotent for text with entities: each application decodes two more levels where the text has a `<`.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
    import html  # a table of entities that no other model needs

    decoded = html.unescape(html.unescape(_ftfy().fix_text(prompt)))
    return " ".join(decoded.split())


def _ftfy() -> ModuleType:
    try:
        import ftfy
    except ImportError as error:
        raise ImportError("cleaning prompts needs ftfy: pip install 'causalreel[wan]'") from error
    return ftfy
