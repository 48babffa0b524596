"""Networks that wait on the host: what a call that fails leaves behind."""

from __future__ import annotations

import pytest
import torch

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.presets import preset
from causalreel.parallel.hosted import host_blocks
from causalreel.types import Conditioning


@torch.no_grad()
def test_a_call_after_one_that_failed_has_the_weights_of_now() -> None:
    config = preset("tiny-smoke")
    plain, hosted = DiTDenoiser(config), DiTDenoiser(config)
    for parameter in plain.parameters():
        parameter.normal_(std=0.1)
    hosted.load_state_dict(plain.state_dict())
    host_blocks(hosted, torch.device("cpu"))
    x, sigma = torch.randn(1, 2, config.channels, 4, 4), torch.full((1, 2), 0.5)
    told = Conditioning(torch.randn(1, 3, config.text_dim))

    def fail(*_: object) -> None:
        raise RuntimeError("in the first block")

    failing = hosted.model.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the first block"):
        hosted(x, sigma, told)
    failing.remove()
    for net in (plain, hosted):
        for parameter in net.model.blocks[1].parameters():
            parameter.mul_(2)
    assert torch.equal(hosted(x, sigma, told), plain(x, sigma, told))
