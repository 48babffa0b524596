"""Plans against what was measured on GPUs, and what they refuse; the recipes that ship for Wan2.1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from causalreel import cli
from causalreel.nn.presets import preset
from causalreel.train.ingredients import ROLES
from causalreel.train.operations import Clip
from causalreel.train.plan import GIB, RATES, Plan, clip_of, parameters, plan, sizes_of
from causalreel.train.recipe import resolve, shipped_recipes
from causalreel.types import LatentSpec

WAN, CLIP = preset("wan-1.3b"), Clip(21, LatentSpec(16, 60, 104))
ONE = "settings.batch=1"
SHARDED = "settings.rollout_weights=sharded"


def planned(name: str, *overrides: str, gpus: int = 1, large: tuple[str, ...] = ()) -> Plan:
    """large: roles of 14B."""
    recipe = resolve(name, overrides)
    roles = ROLES.get(recipe.stage, ("student",))
    return plan(recipe, {role: preset("wan-14b") if role in large else WAN for role in roles}, CLIP, gpus=gpus)


@pytest.mark.parametrize(
    ("name", "overrides", "gpus", "gib"),
    [
        ("wan/ar", (ONE,), 1, 66.6),
        ("wan/ar_frame", (ONE,), 1, 66.6),
        ("wan/causal_cd", (ONE,), 1, 69.3),
        ("wan/rcm_cd", (ONE,), 1, 69.3),
        ("wan/rcm_scm", (ONE,), 1, 69.3),
        ("wan/dmd_frame", (ONE, "settings.noisy_from=1"), 1, 86.3),
        ("wan/dmd", (ONE,), 1, 86.3),
        ("wan/dmd_frame", (ONE,), 1, 86.3),
        ("wan/ar", ("settings.batch=2",), 2, 56.5),
        ("wan/ar", ("settings.batch=4",), 4, 51.2),
        ("wan/dmd", ("settings.batch=2",), 2, 66.9),
        ("wan/dmd", ("settings.batch=2", SHARDED), 2, 59.6),
        ("wan/dmd", ("settings.batch=4", SHARDED), 4, 49.0),
        ("wan/dmd_14b", ("settings.batch=2", SHARDED), 2, 72.1),
    ],
)
def test_memory_is_what_was_measured(name: str, overrides: tuple[str, ...], gpus: int, gib: float) -> None:
    """Peaks in tensors on H200s, docs/performance.md and docs/training-at-scale.md."""
    large = ("teacher",) if name.endswith("14b") else ()
    assert planned(name, *overrides, gpus=gpus, large=large).peak / GIB == pytest.approx(gib, rel=0.03)


def test_a_critic_of_14b_is_widest_in_its_own_pass() -> None:
    """What the student's rollout leaves is gone by then."""
    how = "wan/dmd_14b", "settings.batch=4", "trainer.recompute=full", SHARDED
    found = planned(*how, gpus=4, large=("teacher", "critic"))
    assert found.peak / GIB == pytest.approx(91.1, rel=0.03)  # measured on four H200s
    assert {"context", "beside"} <= {part.name for part in planned(*how, gpus=4).parts} - {p.name for p in found.parts}


@pytest.mark.parametrize(("gpus", "large", "gib"), [(2, (), 37.0), (4, (), 19.2), (4, ("student",), 116.3)])
def test_processes_that_share_a_clip_share_the_networks_too(gpus: int, large: tuple[str, ...], gib: float) -> None:
    found = planned("wan/ar", ONE, f"trainer.parallel.context={gpus}", gpus=gpus, large=large)
    assert found.peak / GIB == pytest.approx(gib, rel=0.08)  # measured on H200s
    size = preset("wan-14b") if large else WAN
    masters = next(part.size for part in found.parts if part.name == "student, masters")
    assert masters == pytest.approx(4 * parameters(size) / gpus)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("wan/ar", 2.94),
        ("wan/ar_frame", 2.91),
        ("wan/causal_cd", 5.38),
        ("wan/rcm_cd", 5.30),
        ("wan/rcm_scm", 24.8),
        ("wan/dmd", 20.9),
        ("wan/dmd_frame settings.noisy_from=1", 20.6),
    ],
)
def test_seconds_are_near_those_that_were_measured(name: str, seconds: float) -> None:
    assert planned(*name.split(), ONE).seconds == pytest.approx(seconds, rel=0.06)


def test_no_seconds_are_promised_of_a_stage_that_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RATES, "causal_scm")
    found = planned("wan/rcm_scm", "trainer.accumulate=32")
    assert found.seconds is None and found.work.flop > planned("wan/rcm_cd", "trainer.accumulate=32").work.flop


def test_parameters() -> None:
    assert parameters(WAN) == pytest.approx(1.419e9, rel=1e-3)


def test_parts_are_shared_by_processes() -> None:
    one, eight = (
        planned("wan/ar", "settings.batch=8", "trainer.accumulate=8"),
        planned("wan/ar", "settings.batch=8", gpus=8),
    )
    sizes = {part.name: part.size for part in eight.parts}
    for part in one.parts:
        if part.name in ("student, masters", "student, moments", "average"):
            assert sizes[part.name] == part.size / 8
        if part.name == "activations":
            assert sizes[part.name] == part.size
    assert one.work == eight.work
    assert one.seconds == pytest.approx(8 * (eight.seconds or 0))
    assert {part.name for part in one.parts} - sizes.keys() == {"gradients"}  # of the parts of a batch before


def test_a_teacher_of_14b_is_cut_in_bfloat16() -> None:
    frozen = next(
        part
        for part in planned("wan/dmd", "settings.batch=8", gpus=8, large=("teacher",)).parts
        if "frozen" in part.name
    )
    assert frozen.size == pytest.approx(2 * parameters(preset("wan-14b")) / 8)


def test_other_recomputation_keeps_other_tensors() -> None:
    found = {
        mode: next(p.size for p in planned("wan/ar", ONE, f"trainer.recompute={mode}").parts if p.name == "activations")
        for mode in ("none", "selective", "full")
    }
    assert found["none"] > found["selective"] > found["full"]


def test_what_waits_on_the_host_is_not_the_gpus() -> None:
    averages, frozen = "trainer.offload_averages=true", "trainer.offload_frozen=true"
    plain, found = planned("wan/dmd", ONE), planned("wan/dmd", ONE, averages, frozen)
    there = {part.name: part.size for part in found.parts if part.is_on_host}
    here = {part.name: part.size for part in found.parts if part.name.endswith(", here")}
    assert there.keys() == {"average", "teacher, frozen"}
    assert there["average"] == pytest.approx(4 * parameters(WAN), rel=0.03)  # what is outside the blocks stays
    assert there["teacher, frozen"] == there["average"] / 2
    assert plain.peak - found.peak == pytest.approx(6 * parameters(WAN) - sum(here.values()))
    assert sum(here.values()) < 0.1 * 6 * parameters(WAN)
    assert planned("wan/dmd", ONE, averages, frozen, "trainer.recompute=full").peak / GIB < 68
    for parts in (averages, frozen):  # the processes' parts: nothing but what is gathered anyway
        two = planned("wan/dmd", "settings.batch=2", parts, gpus=2)
        assert not [part for part in two.parts if part.name.endswith(", here")]
    activations = planned("wan/ar", ONE, "trainer.offload_activations=true")
    assert activations.peak < 0.7 * planned("wan/ar", ONE).peak
    assert [part.name for part in activations.parts if part.is_on_host] == ["activations"]


def test_rollouts_with_sharded_weights_hold_no_memory_of_their_own() -> None:
    one, two = (planned("wan/dmd", f"settings.batch={n}", SHARDED, gpus=n).parts for n in (1, 2))
    names = [{part.name for part in parts} for parts in (one, two)]
    assert names[0] - names[1] == {"rollouts"} and names[1] - names[0] == {"gathered"}
    sizes = {p.name: p.size for p in planned("wan/dmd", "settings.batch=2", gpus=2).parts}
    assert sizes["sampler"] == 2 * parameters(WAN) and sizes.keys() == names[1] | {"rollouts"}
    tokens = planned("wan/dmd", ONE, "trainer.parallel.context=2", gpus=2).parts  # never whole
    assert {p.name: p.size for p in tokens}["sampler"] == parameters(WAN) and "rollouts" not in {p.name for p in tokens}
    assert "rollouts" not in {part.name for part in planned("wan/dmd", ONE, "speed=plain").parts}


def test_a_batch_that_cannot_be_shared_is_named() -> None:
    with pytest.raises(ValueError, match=r"settings\.batch: 3 rows cannot be shared by 2 processes in 1 parts"):
        planned("wan/ar", "settings.batch=3", gpus=2)
    with pytest.raises(ValueError, match="needs 16 processes, this launch has 8"):
        planned("wan/ar", "trainer.parallel.shard=8", "trainer.parallel.replicate=2", gpus=8)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "wan/ar", ONE, "--memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "student: 30 blocks of 1536" in said
    assert "on each of 1 GPUs: fits 80" in said
    assert cli.main(["plan", "wan/dmd", ONE, "--memory", "40", "--gpus", "1"]) == 1
    assert "DOES NOT FIT 40" in capsys.readouterr().out
    assert cli.main(["plan", "tiny/codec"]) == 2
    assert "codecs are not planned" in capsys.readouterr().err
    assert cli.main(["plan", "tiny/ar", "--size", "wan-3b"]) == 2
    assert "unknown model preset 'wan-3b'" in capsys.readouterr().err


WAN_RECIPES = [name for name in shipped_recipes() if name.startswith("wan/")]


@pytest.mark.parametrize("name", WAN_RECIPES)
def test_recipes_resolve_and_begin_where_others_end(name: str) -> None:
    recipe = resolve(name)
    made = {str(resolve(other).trainer.out / "export") for other in WAN_RECIPES}
    for place in map(str, recipe.init.values()):
        assert place in made or place.startswith("wan2.1-t2v-"), place
    assert recipe.trainer.recompute == "selective"
    assert recipe.settings.batch == {"wan/rcm_ar": 256, "wan/rcm_cd": 32, "wan/rcm_scm": 32}.get(name, 64)


def test_released_hyper_parameters() -> None:
    ar, ode, cd, dmd = (resolve(f"wan/{name}") for name in ("ar", "causal_ode", "causal_cd", "dmd"))
    for recipe in (ar, ode, cd, dmd):
        student: Any = recipe.trainer.optimisers["student"]
        assert (student.lr, student.weight_decay, student.clip, student.eps) == (2e-6, 0.01, 10.0, 1e-8)
        assert student.betas == ((0.9, 0.999) if recipe is ode else (0.0, 0.999))
    assert dmd.trainer.optimisers["critic"].lr == 4e-7
    assert (cd.settings.grid, cd.settings.guidance, cd.settings.target_decay) == (48, 3.0, 0.99)
    assert (ode.settings.grid, ode.settings.guidance) == (48, 6.0)
    assert (dmd.settings.critic_updates, dmd.settings.guidance, dmd.settings.shift) == (5, 4.0, 5.0)
    assert dmd.settings.ema.from_step == 40  # cycles; 200 critic steps of the released code
    assert resolve("wan/dmd_1step").settings.first_steps == (1000, 750, 500, 250)


def test_clips_without_data_are_wans() -> None:
    recipe = replace(resolve("wan/ar"), data=None)
    assert clip_of(recipe, 81, (480, 832)) == CLIP
    with pytest.raises(ValueError, match="nearest: 77 or 81"):
        clip_of(recipe, 80, (480, 832))
    assert sizes_of(recipe, "wan-14b")["student"] == WAN  # a released name says its size


def test_adapters_are_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "wan/ar", "lora.student={rank: 8}", "trainer.accumulate=64"]) == 2
    assert "lora.student: runs with adapters are not planned" in capsys.readouterr().err
