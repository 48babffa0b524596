"""VisionReward's sum (arXiv 2412.21059): what its model's answers to yes/no questions about a video come to.

The model itself is not here; its repository has the questions and their weights.
"""

from __future__ import annotations

from collections.abc import Sequence


def vision_reward(answers: Sequence[str], weights: Sequence[float]) -> float:
    """The mean over the questions of weight times 1 for an answer that begins with yes, -1 for any other.

    Published tables have it times 100. ValueError unless there is a weight for each answer.
    """
    if not answers or len(answers) != len(weights):
        raise ValueError(f"answers and weights must be as many, got {len(answers)} and {len(weights)}")
    signs = [1.0 if answer.strip().lower().startswith("yes") else -1.0 for answer in answers]
    return sum(sign * weight for sign, weight in zip(signs, weights, strict=True)) / len(answers)
