"""Stage 3, asymmetric DMD: the few-step causal student matches the distribution of a bidirectional teacher.

One trainer step is a cycle: several critic updates, each on fresh samples of the student, then one student update. (The
released code updates the student first, at step 0 against a critic that has seen none of its samples.)
What the student is trained *on* is exchangeable: its own rollout (the method; Self Forcing), noised data (CausVid), or
single chunks behind the true past with causal scores (causal score distillation, a negative result of the papers).
Causal Forcing (arXiv 2602.02214), stage 3; DMD (arXiv 2311.18828); Causal Forcing++ (arXiv 2605.15141), section 3.4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from causalreel.flow import SCORE_SIGMA_RANGE, add_noise, shift_sigma, velocity_to_x0, warp_steps
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.policies.registry import described
from causalreel.parallel.fast import FastDiT
from causalreel.parallel.sharding import copy_weights
from causalreel.rollout import Plan, chunk_sizes, fuse
from causalreel.train.kit import (
    EMAConfig,
    RolloutNoise,
    Viewer,
    draw_index,
    draw_levels,
    probe,
    randn,
    uniform,
)
from causalreel.train.losses import critic_loss, distribution_matching_gradient, surrogate_loss
from causalreel.train.self_rollout import (
    Piece,
    Record,
    as_clip,
    parallel_pass,
    record_rollout,
    replay_passes,
    rolling_training_plan,
    training_plan,
)
from causalreel.train.stage import Loss, StepContext, Update
from causalreel.types import Conditioning, Denoise, Denoiser, LatentBatch, ReplayCache


@dataclass(frozen=True)
class DMDConfig:
    """Distribution matching of the student's samples."""

    batch: int = 64
    """Clips per update."""
    chunk: int = 3
    """Latent frames per chunk."""
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    """Step list of every chunk, 0..1000 before the shift."""
    first_steps: tuple[float, ...] | None = None
    """Step list of the first chunk, if another: 1- and 2-step models give it 4."""
    shift: float = 5.0
    """Shift of the step lists and of the scores' noise levels."""
    samples: Literal["self_rollout", "data", "teacher_forced"] = "self_rollout"
    """What is matched: the student's rollout, its estimates of noised data (CausVid), or single chunks behind true
    context with causal scores (causal score distillation)."""
    exits: Literal["independent", "shared", "in_turn", "last"] = "independent"
    """Exit steps of self-rollouts: drawn for each rollout (released), once for all of a cycle, each in its turn from
    cycle to cycle and the same for all chunks as far as they have it (Causal-rCM), or always the last."""
    critic_updates: int = 5
    """Critic updates per student update."""
    critic_repeats: int = 1
    """Critic updates in a row on the same samples, each with its own noise; more than 1 saves rollouts."""
    critic_rollouts: int | None = None
    """Rollouts that the samples of these updates share, each with its own exit step; null: one for each samples."""
    student_samples: Literal["fresh", "critic"] = "fresh"
    """What the student is updated on: samples of its own (released), or the last ones that the critic saw."""
    rollout_precision: Literal["bf16", "fp8", "fp8-attention"] = "bf16"
    """What rollouts compute in (`parallel.fast`); scores and everything with gradient stay as they are. fp8 is faster
    and changes the samples slightly: the released code has no such mode."""
    rollout_weights: Literal["whole", "sharded"] = "whole"
    """How several processes hold the copy that rolls out: each of them whole, 2 bytes a parameter, on the inference
    path as on one GPU; or sharded as other networks are, whose every call gathers every block again."""
    guidance: float = 4.0
    """Guidance of the teacher, standard convention; the released `guidance_scale: 3` is 4 here."""
    given: float = 0.0
    """Share of rollouts that continue the data's first latent frame, which scores see clean: image to video."""
    context_sigma: float = 0.0
    """Noise level at which finished chunks are written to the cache."""
    noisy_from: int | None = None
    """Chunks from this number on are written to the cache as their last call of all steps reads them, a call less for
    each (noisy context, Causal-rCM); those that leave earlier are noised to its level. null: all are read once more."""
    prompt_changes: float = 0.0
    """Share of the clips of a self-rollout that go over to another prompt of the data at a chunk border, one for all of
    them, as live videos do; their context stays as it was read, and the scores see text by frame."""
    student_pass: Literal["parallel", "replay"] = "parallel"
    """How the student's gradient is computed: all chunks at once, or one after the other in less memory."""
    longest: int | None = None
    """Latent frames of the longest self-rollout; each one's length is drawn, in whole chunks, from a clip's to this.
    What is matched is the end of it, as long as a clip, see docs/stages.md. null: all are as long as clips."""
    rolling: float = 0.0
    """Share of rollouts that are rolling, a window of chunks at rising noise levels (Rolling Forcing; released: 0.5).
    Needs student_pass: replay."""
    policy: str | None = None
    """Context policy of the student, as `causalreel policy` lists them; null: that of the weights it starts from."""
    ema: EMAConfig = EMAConfig()
    """The average that is exported."""

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_changes <= 1:
            raise ValueError(f"prompt_changes must be 0 to 1, got {self.prompt_changes}")
        if self.prompt_changes and self.samples != "self_rollout":
            raise ValueError("prompt_changes needs samples: self_rollout, in which the student sees its own past")
        if self.prompt_changes and self.longest is not None:
            raise ValueError("prompt_changes and longest do not go together: a rollout beyond a clip has one prompt")
        if not 1 <= self.critic_repeats <= max(1, self.critic_updates):
            raise ValueError(f"critic_repeats must be 1 to {self.critic_updates}, got {self.critic_repeats}")
        if self.critic_rollouts is not None and not 1 <= self.critic_rollouts <= self.critic_samples:
            raise ValueError(f"critic_rollouts must be 1 to {self.critic_samples}, got {self.critic_rollouts}")
        if not 0 <= self.rolling <= 1:
            raise ValueError(f"rolling must be from 0 to 1, got {self.rolling}")
        if self.noisy_from is not None and (self.noisy_from < 0 or self.rolling or self.samples != "self_rollout"):
            raise ValueError(
                f"noisy_from must be null or at least 0, with samples: self_rollout and without rolling; got "
                f"{self.noisy_from}, samples={self.samples}, rolling={self.rolling}"
            )
        if self.rolling and self.student_pass != "replay":
            raise ValueError("rolling needs student_pass: replay: its windows cannot be made again in one pass")
        if (self.rolling or self.longest is not None) and self.samples != "self_rollout":
            raise ValueError(f"rolling and longest are for samples: self_rollout, got {self.samples}")
        if self.longest is not None and (self.longest < self.chunk or self.longest % self.chunk):
            raise ValueError(f"longest must be a multiple of the chunk's {self.chunk} frames, got {self.longest}")
        if self.noisy_from is not None and len(self.steps) < 2:
            raise ValueError("noisy_from needs two steps or more: in one, a chunk's last call reads nothing but noise")
        if not 0 <= self.given <= 1:
            raise ValueError(f"given must be 0 to 1, a share of the rollouts; got {self.given}")
        if self.given and (self.chunk != 1 or self.samples != "self_rollout" or self.rolling or self.longest):
            raise ValueError(
                f"given needs chunk: 1 and samples: self_rollout, without rolling and longest, so that a first frame "
                f"alone can be given; got chunk={self.chunk}, samples={self.samples}, rolling={self.rolling}, "
                f"longest={self.longest}"
            )
        if self.student_samples == "critic" and self.critic_rollouts not in (None, self.critic_samples):
            raise ValueError("student_samples: critic needs critic_rollouts: null, so that a rollout is of one batch")

    @property
    def critic_samples(self) -> int:
        """Batches of samples that a cycle's critic updates see."""
        return -(-self.critic_updates // self.critic_repeats)

    @property
    def sigmas(self) -> tuple[float, ...]:
        return warp_steps(self.steps, self.shift)

    @property
    def first_sigmas(self) -> tuple[float, ...] | None:
        return None if self.first_steps is None else warp_steps(self.first_steps, self.shift)


@dataclass(frozen=True)
class Samples:
    """What the student made, how to make it again with gradient, and what the scores are conditioning beside it."""

    latents: Tensor
    conditioning: Conditioning
    again: Callable[[], list[Piece]]
    """-> the latents again, in pieces along the frames, with gradient."""
    bind: Callable[[Denoiser], Denoise]
    """Score network -> denoiser of these samples: itself, or itself behind their true context."""
    given: int = 0
    """Leading latent frames that the student did not make."""

    def rows(self, start: int, stop: int) -> Samples:
        """Some rows, for critic updates only: they cannot be made again."""
        return Samples(self.latents[start:stop], self.conditioning[start:stop], list, self.bind, self.given)


def _whole(make: Callable[[], Tensor], latents: Tensor) -> list[Piece]:
    return [Piece(0, latents.shape[1], make)]


class DMD:
    """roles: student, average, critic (fake score), teacher (real score)."""

    def __init__(
        self,
        config: DMDConfig,
        *,
        student: DiTDenoiser,
        critic: DiTDenoiser,
        teacher: DiTDenoiser,
        null: Tensor,
        viewer: Viewer,
    ) -> None:
        self.config, self.student, self.critic, self.viewer = config, student, critic, viewer
        self.teacher = Guided(teacher, Conditioning(null), config.guidance)
        self.roles: dict[str, nn.Module] = {"student": student, "critic": critic, "teacher": teacher}
        self.average, self.averages = config.ema.follow(student)
        self.roles["average"] = self.average
        self._make = {"self_rollout": self._roll_out, "data": self._denoise_data, "teacher_forced": self._behind_data}[
            config.samples
        ]
        if config.samples == "teacher_forced" and config.critic_rollouts not in (None, config.critic_samples):
            raise ValueError(
                "critic_rollouts must be null with samples: teacher_forced, whose scores see each batch's past"
            )
        if config.student_pass == "parallel" and (student.context.selects or student.context.tells_done):
            raise ValueError(
                f"student_pass must be replay with the policy {described(student.context)}: what its chunks see is not "
                "known in one pass"
            )
        if config.rolling:
            student.context.check(config.chunk * len(config.steps))
            if student.context.selects:
                raise ValueError(f"rolling has no rule for the policy {described(student.context)}")
        self.sampler = _sampler(student)
        self.derived = () if self.sampler is student else (self.sampler,)
        self.whole: Sequence[nn.Module] = ()
        """Of networks that are no state, those that every process holds whole."""
        self._is_behind = True
        """Whether the student may have changed since the sampler was made as it is."""

    # ---- the cycle

    def updates(self, step: StepContext) -> Iterator[Update]:
        config = self.config
        rollouts = config.critic_rollouts or config.critic_samples
        share = -(-config.critic_samples // rollouts)  # samples per rollout, rounded up
        self._is_behind = True
        updates, made = iter(range(config.critic_updates)), None
        for first in range(0, config.critic_samples, share):
            count = min(share, config.critic_samples - first)
            made = samples = None  # gone before others are made
            made = self._make(step, step.batch(count * config.batch, LatentBatch), f"critic {first}")
            if config.student_samples == "fresh":  # without what the student would be trained with
                made = made.rows(0, len(made.conditioning))
            rows = len(made.conditioning) // count
            for row in range(count):
                samples = made if share == 1 else made.rows(row * rows, (row + 1) * rows)
                for update in islice(updates, config.critic_repeats):
                    yield Update("critic", [lambda u=update, s=samples: self._critic_loss(step, s, f"critic {u}")])
        if made is None or config.student_samples == "fresh":
            made = self._make(step, step.batch(config.batch, LatentBatch), "student")
        held, made, samples = [made], None, None
        yield Update("student", self._student_losses(step, held.pop()))  # the update alone holds what was made

    def _score_sigma(self, step: StepContext, purpose: str, made: Samples) -> Tensor:
        """One level a clip, (B,1), kept where scores say something; (B,F), 0 in given frames, if there are."""
        batch, frames = made.latents.shape[:2]
        u = uniform(step, f"{purpose} score sigma", batch, 1)
        sigma = shift_sigma(u, self.config.shift).clamp(*SCORE_SIGMA_RANGE)
        if not self.config.given:
            return sigma
        return sigma * (torch.arange(frames, device=sigma.device) >= made.given)

    def _critic_loss(self, step: StepContext, made: Samples, purpose: str) -> Loss:
        sigma = self._score_sigma(step, purpose, made)
        noise = randn(step, f"{purpose} score noise", made.latents)
        how = {"sigma": sigma, "noise": noise, "given": made.given}
        return critic_loss(made.bind(self.critic), made.latents, made.conditioning, **how), {}

    def _student_losses(self, step: StepContext, made: Samples) -> list[Callable[[], Loss]]:
        sigma = self._score_sigma(step, "student", made)
        noise = randn(step, "student score noise", made.latents)
        real, fake = made.bind(self.teacher), made.bind(self.critic)
        how = {"sigma": sigma, "noise": noise, "given": made.given}
        gradient = distribution_matching_gradient(made.latents, real, fake, made.conditioning, **how)
        pieces = made.again()
        metrics = {"gradient_size": gradient.abs().mean(), "latent_std": made.latents.std()}

        def piece_loss(piece: Piece) -> Loss:
            part = gradient[:, piece.start : piece.start + piece.frames]
            scale = len(pieces) * piece.frames / counted  # the trainer takes the mean over pieces
            return surrogate_loss(piece(), part) * scale, metrics

        counted = sum(piece.frames for piece in pieces)
        return [lambda piece=piece: piece_loss(piece) for piece in pieces]

    # ---- samples

    def _roll_out(self, step: StepContext, batch: LatentBatch, purpose: str) -> Samples:
        """The student's own rollout: every chunk leaves at the exit step, or in the window, drawn for it."""
        config, conditioning = self.config, self._changing(step, batch, purpose)
        sizes = chunk_sizes(self._length(step, batch, purpose), config.chunk)
        begin = sum(sizes) - batch.frames  # what is before it only leads there
        given = self._given(step, purpose)
        first = begin + config.chunk if begin else given  # its first chunk holds a frame that the student has not made
        noise = RolloutNoise(step, f"{purpose} rollout", len(batch), batch.spec)
        sampler = self._current_sampler()
        with torch.no_grad():
            prepared = sampler.prepare(conditioning)
        is_trained_on = purpose == "student" or config.student_samples == "critic"
        record = record_rollout(
            sampler,
            self._plan(step, sizes, purpose, given),
            told=prepared,
            noise=noise,
            cache=self._cache(sampler, batch),
            keep_caches=config.student_pass == "replay" and is_trained_on,
            first=first,
            given=batch.latents[:, :given].float() if given else None,
        )
        latents = record.latents if not begin else as_clip(self.viewer.codec, record.latents, begin)
        return Samples(latents, conditioning, lambda: self._again(record, conditioning, begin), lambda net: net, given)

    def _changing(self, step: StepContext, batch: LatentBatch, purpose: str) -> Conditioning:
        """The conditioning of a rollout, whose prompts may change to those of further rows of the data."""
        told, share, chunks = batch.conditioning, self.config.prompt_changes, batch.frames // self.config.chunk
        if not share or chunks < 2:
            return told
        other = step.batch(len(batch) * step.parts, LatentBatch).conditioning
        border = self.config.chunk * (1 + draw_index(step, f"{purpose} prompt change", chunks - 1))
        rows = uniform(step, f"{purpose} changed prompts", len(batch)) <= share
        return told.changing(other, rows, border, batch.frames)

    def _given(self, step: StepContext, purpose: str) -> int:
        """Frames that a rollout is given: 1 for the share of rollouts that the config says, else 0."""
        if not self.config.given:
            return 0
        return int(draw_index(step, f"{purpose} given", 1 << 20) < self.config.given * (1 << 20))

    def _length(self, step: StepContext, batch: LatentBatch, purpose: str) -> int:
        """Latent frames of a rollout."""
        longest, chunk = self.config.longest, self.config.chunk
        if longest is None or longest == batch.frames:
            return batch.frames
        if longest < batch.frames:
            raise ValueError(f"longest must be at least the {batch.frames} frames of the data's clips, got {longest}")
        if batch.conditioning.fields or batch.conditioning.prompts is not None:
            raise ValueError("longest is for clips with one prompt: nothing says what is beyond their last frame")
        return batch.frames + chunk * draw_index(step, f"{purpose} length", (longest - batch.frames) // chunk + 1)

    def _plan(self, step: StepContext, sizes: Sequence[int], purpose: str, given: int = 0) -> Plan:
        config = self.config
        share = torch.rand((), generator=step.generator(f"{purpose} rolling", device="cpu")) if config.rolling else 1
        if share < config.rolling:
            turn = draw_index(step, f"{purpose} rolling exit", len(config.sigmas))
            return rolling_training_plan(sizes, config.sigmas, turn, context_sigma=config.context_sigma)
        exits = self._exits(step, purpose)
        first, prefix = config.first_sigmas, sizes[:given]
        how: dict[str, Any] = {"first": first, "prefix": prefix, "context_sigma": config.context_sigma}
        how["noisy_from"] = config.noisy_from
        plan = training_plan(sizes[given:], config.sigmas, exits, **how)
        return fuse(plan) if self.student.context.fuses else plan

    def _exits(self, step: StepContext, purpose: str) -> list[int]:
        """Exit step of the first chunk and of the others."""
        lists = [levels for levels in (self.config.first_sigmas, self.config.sigmas) if levels is not None]
        if self.config.exits == "last":
            return [len(levels) - 1 for levels in lists]
        if self.config.exits == "in_turn":
            return [min(step.step % len(lists[0]), len(levels) - 1) for levels in lists]
        who = purpose if self.config.exits == "independent" else "cycle"
        return [draw_index(step, f"{who} exit {i}", len(levels)) for i, levels in enumerate(lists)]

    def _again(self, record: Record, conditioning: Conditioning, begin: int) -> list[Piece]:
        """Pieces of the latents that are matched, which begin at this frame of the rollout."""
        if self.config.student_pass == "replay":
            return [replace(p, start=p.start - begin) for p in replay_passes(self.student, record, conditioning)]
        given = 0 if record.given is None else record.given.shape[1]  # they lead in the pass, and are not matched
        frames = record.latents.shape[1] - record.first
        return [
            Piece(record.first - begin, frames, lambda: parallel_pass(self.student, record, conditioning)[:, given:])
        ]

    def _denoise_data(self, step: StepContext, batch: LatentBatch, purpose: str) -> Samples:
        """CausVid: clean estimates of data noised chunk by chunk to levels of the step list, behind noisy chunks."""
        x, sigma, sizes, _ = self._noised(step, batch, purpose)

        def make() -> Tensor:
            return velocity_to_x0(x, self.student(x, sigma, batch.conditioning, sizes=sizes), sigma)

        with torch.no_grad():
            latents = make()
        return Samples(latents, batch.conditioning, lambda: _whole(make, latents), lambda net: net)

    def _behind_data(self, step: StepContext, batch: LatentBatch, purpose: str) -> Samples:
        """Causal score distillation: the same behind the true past, and scored there by causal networks."""
        x, sigma, sizes, x0 = self._noised(step, batch, purpose)
        conditioning = batch.conditioning

        def make() -> Tensor:
            return velocity_to_x0(x, self.student.teacher_forced(x, sigma, conditioning, clean=x0, sizes=sizes), sigma)

        def bind(net: Denoiser) -> Denoise:
            def behind(x: Tensor, sigma: Tensor, conditioning: Conditioning, **_: object) -> Tensor:
                return net.teacher_forced(x, sigma.expand(-1, x.shape[1]), conditioning, clean=x0, sizes=sizes)

            return behind

        with torch.no_grad():
            latents = make()
        return Samples(latents, conditioning, lambda: _whole(make, latents), bind)

    def _noised(
        self, step: StepContext, batch: LatentBatch, purpose: str
    ) -> tuple[Tensor, Tensor, Sequence[int], Tensor]:
        sizes, x0 = chunk_sizes(batch.frames, self.config.chunk), batch.latents.float()
        sigma = draw_levels(step, f"{purpose} level", len(batch), sizes, self.config.sigmas)
        return add_noise(x0, randn(step, f"{purpose} noise", x0), sigma), sigma, sizes, x0

    def _current_sampler(self) -> DiTDenoiser:
        """The sampler, with the student's weights as they are in this cycle."""
        if self.sampler is not self.student and self._is_behind:
            copy_weights(self.student, self.sampler)
            if isinstance(self.sampler.run, FastDiT):
                self.sampler.run.refresh()
            self._is_behind = False
        return self.sampler

    def _cache(self, sampler: DiTDenoiser, batch: LatentBatch) -> ReplayCache:
        """For one rollout; in memory that stays where it is, where calls are recorded and nothing is replayed."""
        if not isinstance(sampler.run, FastDiT) or self.config.student_pass == "replay":
            return sampler.new_cache()
        size, how = (
            batch.spec.shape[1:],
            {"chunk": self.config.chunk, "frames": self.config.longest or batch.frames, "batch": len(batch)},
        )
        return cast(ReplayCache, sampler.run.new_cache(sampler.context, size=size, **how))

    def probe(self, step: StepContext) -> dict[str, Tensor]:
        def velocity(x: Tensor, sigma: Tensor, clean: Tensor, told: Conditioning) -> Tensor:
            sizes = chunk_sizes(x.shape[1], self.config.chunk)
            return self.student.behind(self.student.context_of(clean, told, sizes=sizes), x, sigma, told, sizes=sizes)

        return probe(step, self.config.batch, velocity)

    def preview(self, step: StepContext) -> Tensor:
        return self.viewer.show(self.average, step)


def _sampler(student: DiTDenoiser) -> DiTDenoiser:
    """What rolls out: the student, or where it computes in another type a copy in that type.

    The copy spares every call of a rollout the casting of every weight. It is derived, not state: no role.
    """
    if student.compute is None or student.compute == student.model.dtype:
        return student
    return copy.deepcopy(student).to(student.compute).requires_grad_(False)
