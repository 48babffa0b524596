"""The walkable world's keys are those that live sessions hold: the same poses, actions and cameras, frame by frame."""

from __future__ import annotations

import numpy as np
import torch

from causalreel.control.steering import Course
from causalreel.data import walk
from causalreel.families import FAMILIES
from causalreel.infer.live import first_prompt, understand
from causalreel.scenery import KEYS, parse
from causalreel.text.walk import WalkTextEncoder
from test_weights import small_export


def test_a_course_gives_the_fields_of_the_world() -> None:
    control = FAMILIES["walk"].control
    assert control is not None
    state = walk.simulate(8, seed=3, config=walk.WalkConfig())
    fields = walk.fields(state)
    for row in range(8):
        course = Course(control)
        for frame, held in enumerate(state.keys[row]):
            course.press([key for key, on in zip(KEYS, held.tolist(), strict=True) if on])
            (made,) = course.next(1)
            assert np.abs(made.w2c - fields["w2c"][row, frame].numpy()).max() < 1e-5
            assert torch.equal(torch.tensor(made.actions), fields["actions"][row, frame])
            assert np.allclose(made.intrinsics, fields["intrinsics"][row, frame].numpy())


def test_what_a_new_prompt_leaves_open_stays() -> None:
    encoder = WalkTextEncoder()
    before = encoder.complete("a red pillar ahead, sand floor, day sky", 3)
    after = encoder.complete("night sky", 4, before=before)
    assert (
        parse(after).objects == parse(before).objects and parse(after).floor == "sand" and parse(after).sky == "night"
    )
    assert encoder.complete("night sky", 4) != after


def test_what_is_shown_where_nobody_says_is_understood() -> None:
    """By the page, streams and benchmarks: a prompt of the model's own world."""
    export = small_export(text="walk", family="walk")
    assert first_prompt(export) == FAMILIES["walk"].text.examples[0]
    understand(export, FAMILIES["walk"].text.examples)
    assert first_prompt(small_export()) == FAMILIES["tiny"].text.examples[0]
