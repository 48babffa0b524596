"""What the frames of a call read: the keys and values that blocks make of texts, kept from call to call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from causalreel.types import Conditioning

KeyValue = tuple[Tensor, Tensor]
"""Keys and values (B,K,N,D)."""

TextRun = tuple[int, Tensor, Tensor]
"""So many neighbouring frames, and the keys and values of what they read: (B,K,N,D) of one text, or (B,F,K,N,D) of a
text for each of them."""

MOST_RUNS = 2
"""Runs of frames that read one text each, beyond which all frames of a call read theirs in one attention."""


class TextKeys:
    """One text (B,K,text_dim) as blocks read it: its embedding, and the keys and values that each block makes of it.

    Without gradient both are kept from the first call on, so that a prompt is projected once and not once a call. A
    call with gradient needs one of its own.
    """

    def __init__(self, text: Tensor, pairs: Sequence[KeyValue] = ()) -> None:
        """pairs: of every block, where they are known already."""
        self.text, self.pairs = text, dict(enumerate(pairs))
        self._embedded: Tensor | None = None

    def embed(self, embedding: Callable[[Tensor], Tensor], layers: int) -> None:
        """Embed the text for a network of so many blocks, unless all of them have their keys."""
        if self._embedded is None and len(self.pairs) < layers:
            self._embedded = embedding(self.text)

    def of(self, layer: int, project: Callable[[Tensor], KeyValue]) -> KeyValue:
        """Keys and values of a block, which `project` makes of the embedding (B,K,E)."""
        if torch.is_grad_enabled():  # nothing is kept: a block that is recomputed makes them again
            assert self._embedded is not None
            return project(self._embedded)
        if layer not in self.pairs:
            assert self._embedded is not None
            self.pairs[layer] = project(self._embedded)
        return self.pairs[layer]


class CallText:
    """The texts of a call, and which of its frames read which."""

    def __init__(self, texts: Sequence[TextKeys], prompts: Sequence[int], together: int = 0) -> None:
        """prompts: each frame's text. together: P, where `texts` is one of all P texts, (B*P,K,E)."""
        self.prompts, self.together = tuple(prompts), together
        self.runs = [(len(list(same)), texts[0 if together else prompt]) for prompt, same in groupby(prompts)]

    @staticmethod
    def texts_of(conditioning: Conditioning) -> list[TextKeys]:
        """Every text that the conditioning has."""
        text = conditioning.text
        return [TextKeys(one) for one in ([text] if conditioning.prompts is None else text.unbind(1))]

    @staticmethod
    def of(conditioning: Conditioning, frames: int) -> CallText:
        """What the frames of a call read, kept from earlier calls where the conditioning was prepared."""
        kept = None if torch.is_grad_enabled() else conditioning.prepared
        prompts = (0,) * frames if conditioning.prompts is None else conditioning.prompts
        if kept is None and len(list(groupby(prompts))) > MOST_RUNS:
            return CallText([TextKeys(conditioning.text.flatten(0, 1))], prompts, conditioning.text.shape[1])
        return CallText(CallText.texts_of(conditioning) if kept is None else kept, prompts)

    def embed(self, embedding: Callable[[Tensor], Tensor], layers: int) -> None:
        """As TextKeys.embed, for every text that is read."""
        for _, text in self.runs:
            text.embed(embedding, layers)

    def of_block(self, layer: int, project: Callable[[Tensor], KeyValue]) -> list[TextRun]:
        """As TextKeys.of, for every run of frames; one run of all frames where there are many."""
        if len(self.runs) <= MOST_RUNS:
            return [(frames, *text.of(layer, project)) for frames, text in self.runs]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        if self.together:
            for kept, all_texts in zip((keys, values), self.runs[0][1].of(layer, project), strict=True):
                parts = all_texts.view(-1, self.together, *all_texts.shape[1:]).unbind(1)  # P of (B,K,N,D)
                kept += [parts[prompt] for prompt in self.prompts]
        else:
            for frames, text in self.runs:
                key, value = text.of(layer, project)
                keys += frames * [key]
                values += frames * [value]
        return [(len(self.prompts), torch.stack(keys, dim=1), torch.stack(values, dim=1))]  # (B,F,K,N,D)


def read_text(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, text: Sequence[TextRun]) -> Tensor:
    """q (B,F*S,N,D) -> what each run of frames reads of its own text (B,F*S,N,D)."""
    if len(text) == 1:
        frames, k, v = text[0]
        if k.ndim == 4:
            return attend(q, k, v)
        each = attend(
            q.reshape(-1, q.shape[1] // frames, *q.shape[2:]), k.flatten(0, 1), v.flatten(0, 1)
        )  # (B*F,S,N,D)
        return each.reshape(q.shape)
    tokens = q.shape[1] // sum(frames for frames, _, _ in text)
    parts = torch.split(q, [frames * tokens for frames, _, _ in text], dim=1)
    return torch.cat([attend(part, k, v) for part, (_, k, v) in zip(parts, text, strict=True)], dim=1)
