"""The tiny text encoder: fixed codes, zero padding, refusals."""

from __future__ import annotations

import hashlib

import pytest
import torch

from causalreel.data.world import WorldConfig, prompts, render, simulate
from causalreel.text.tiny import WAYS, TinyTextEncoder, code_table, directions_in
from causalreel.types import TextEncoder
from causalreel.vocabulary import COLOR_RGB, COLORS, DIRECTIONS, complete, parse_caption

PROMPT = "a large red circle moves right slowly and a small blue square moves up quickly on a dark background"


def test_table_is_orthogonal_and_never_changes():
    table = code_table()
    product = table[1:].int() @ table[1:].int().T
    assert torch.equal(product, 64 * torch.eye(63, dtype=torch.int32))
    digest = hashlib.sha256(table.numpy().tobytes()).hexdigest()
    assert digest == "b019f20efc2516735c70dc8deb5de58a6bd49081b8bdf00201fde7274d57f27f"


def test_codes_are_pinned_and_have_unit_variance():
    text = TinyTextEncoder().encode([PROMPT])
    signs = text.sign().to(torch.int8).numpy().tobytes()
    assert hashlib.sha256(signs).hexdigest() == "eb90bb656beb2d6f4a9885972836395146f43948b3cbe67697e4b27af93d92d3"
    assert text[0, :11].var(unbiased=False).item() == pytest.approx(1.0, abs=0.05)


def test_shape_padding_and_protocol():
    encoder = TinyTextEncoder()
    assert isinstance(encoder, TextEncoder)
    text = encoder.encode([PROMPT, "red circle"])
    assert text.shape == (2, 16, 64) and text.dtype == torch.float32
    assert text[0, :11].abs().sum(-1).min() > 0 and text[0, 11:].abs().max() == 0
    assert text[1, :2].abs().sum(-1).min() > 0 and text[1, 2:].abs().max() == 0
    assert encoder.null(3).shape == (3, 16, 64) and encoder.null(3).abs().max() == 0
    assert encoder.encode([]).shape == (0, 16, 64)


def test_prompts_do_not_influence_each_other():
    encoder = TinyTextEncoder()
    assert torch.equal(encoder.encode([PROMPT, "red circle"])[1:], TinyTextEncoder().encode(["red circle"]))


def test_objects_and_words_are_told_apart():
    first, swapped, other = TinyTextEncoder().encode(
        ["red circle and blue square", "blue square and red circle", "red circle and green square"]
    )
    tokens = {tuple(row) for row in first[:4].tolist()}
    assert tokens.isdisjoint(tuple(row) for row in swapped[:4].tolist())  # a red first object is not a red second one
    assert torch.equal(first[[0, 1, 3]], other[[0, 1, 3]]) and not torch.equal(first[2], other[2])


@pytest.mark.parametrize("prompt", ["a purple circle", "", "   ", "a moving the"])
def test_bad_prompts_are_refused(prompt):
    with pytest.raises(ValueError):
        TinyTextEncoder().encode(["red circle", prompt])


def test_one_string_is_refused():
    with pytest.raises(TypeError, match="sequence"):
        TinyTextEncoder().encode("red circle")


def test_full_captions_are_complete_already() -> None:
    for caption in prompts(200, seed=3):
        assert complete(caption, 0) == caption


def test_short_prompts_are_completed_by_the_seed() -> None:
    short = "a red circle moves left and a square"
    made = [parse_caption(complete(short, seed)) for seed in range(40)]
    assert complete(short, 7) == complete(short, 7)
    assert len({str(caption) for caption in made}) > 20
    for caption in made:
        first, second = caption.objects
        assert (first.color, first.shape, first.direction, second.shape) == ("red", "circle", "left", "square")
        assert second.color != "red" and None not in (*vars(first).values(), *vars(second).values(), caption.background)


def test_where_things_go_is_read_from_the_last_frames() -> None:
    """Of rendered clips, as their state says; of what turned or bounced in these frames only what is sure."""
    state = simulate(64, seed=5, config=WorldConfig(frames=45))
    videos, moves = render(state), state.velocity
    read = turned = 0
    for clip in range(len(state)):
        colors = [COLORS[state.color[clip, i]] for i in range(2) if state.present[clip, i]]
        for end in (5, 9, 21, 33, 45):
            found = directions_in(videos[clip, :end], colors)
            for number, word in enumerate(found):
                last = moves[clip, end - 5 : end - 1, number]  # (4,2)
                way = last.sum(0) / last.sum(0).norm().clamp_min(1e-6)
                is_straight = bool((last - last[0]).abs().max() < 0.05)
                if word is not None:
                    assert float(torch.tensor(WAYS[DIRECTIONS.index(word)]) @ way) > 0.85
                    read, turned = read + 1, turned + (word != DIRECTIONS[state.direction[clip, number]])
                elif is_straight:
                    assert float(way.abs().max()) < 0.95
    assert read > 300 and turned > 60
    one = videos[0]
    here = COLORS[state.color[0, 0]]
    assert directions_in(one[:4], [here]) == [None]  # too few
    assert directions_in(one[:5], [COLORS[state.color[0, 0] - 1]]) == [None] or state.present[0, 1]  # not there
    assert directions_in(one[:1].expand(5, -1, -1, -1), [here]) == [None]  # stands
    assert directions_in(torch.full((9, 3, 32, 32), torch.nan), [here]) == [None]


def test_what_has_just_turned_round_goes_nowhere_for_sure() -> None:
    frames = torch.full((5, 3, 64, 64), -0.8)
    for frame, left in zip(frames, (10, 16, 22, 21, 20), strict=True):
        frame[:, 20:32, left : left + 12] = torch.tensor(COLOR_RGB[0]).view(3, 1, 1) / 127.5 - 1
    assert directions_in(frames[:3].repeat_interleave(2, dim=0), [COLORS[0]]) == ["right"]
    assert directions_in(frames, [COLORS[0]]) == [None]
