"""The scheduler: order, fairness, buffers that end, admission, and sessions that fail alone."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from causalreel.infer import live
from causalreel.infer.schedule import Schedule
from causalreel.nn.masks import Context
from causalreel.serve import memory
from causalreel.serve.emitted import Emitted, Timings
from causalreel.serve.handle import Ended, Handle, Limits, Lost
from causalreel.serve.memory import held_bytes
from causalreel.serve.scheduler import Busy, Scheduler
from causalreel.serve.session import Options, Session
from patience import PATIENCE_S, wait_until
from test_infer import PROMPTS, pipeline
from test_live import TWO_STEP
from test_session import Clock


@pytest.fixture
def started() -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def start(limits: Limits = Limits(), **how: object) -> Scheduler:
        scheduler = Scheduler(pipeline(TWO_STEP), limits, warm=None, **how)
        scheduler.start()
        made.append(scheduler)
        return scheduler

    yield start
    for scheduler in made:
        scheduler.close()
        assert not scheduler._thread.is_alive()


def take(handle: Handle, count: int, after: int = -1) -> list[Emitted]:
    """`count` chunks behind `after`, in order."""
    taken = []
    for _ in range(count):
        chunk = handle.pull(after, PATIENCE_S)
        assert isinstance(chunk, Emitted), chunk
        after = chunk.sequence
        taken.append(chunk)
    return taken


def still(scheduler: Scheduler) -> bool:
    return scheduler.facts()["queue_depth"] == 0


# ---- chunks


def test_chunks_come_in_order_and_a_replay_has_the_same_bits(started: Callable) -> None:
    scheduler = started()
    handle = scheduler.open(Options(PROMPTS[0], seed=2), pace="max")
    taken = take(handle, 3)
    handle.command("prompt", text=PROMPTS[1])
    taken += take(handle, 12, after=2)
    assert [chunk.sequence for chunk in taken] == list(range(15))
    assert [len(chunk.commands) for chunk in taken].count(1) == 1
    assert scheduler.get(handle.id) is handle and handle in scheduler.handles() and scheduler.get("x") is None
    handle.close()
    assert handle.pull(handle.newest, PATIENCE_S) == Ended("closed by client")
    wait_until(lambda: handle.session.closed)
    again = list(Session.replay(pipeline(TWO_STEP), handle.session.record()))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(taken, again, strict=False))


def test_a_reader_that_waits_is_not_run_for(started: Callable) -> None:
    scheduler = started(Limits(buffer_chunks=3))
    handle = scheduler.open(Options(PROMPTS[0]), pace="max")
    wait_until(lambda: handle.newest == 2)
    time.sleep(0.3)
    assert handle.newest == 2 and still(scheduler) and len(handle._kept) == 3
    handle.pull(0, PATIENCE_S)  # chunk 0 has arrived
    wait_until(lambda: handle.newest == 3)
    time.sleep(0.3)
    assert handle.newest == 3


def test_a_dropped_reader_resumes_inside_the_window_only(started: Callable) -> None:
    handle = started(Limits(buffer_chunks=2, resume_chunks=4)).open(Options(PROMPTS[0]), pace="max")
    first = take(handle, 10)
    again = take(handle, 4, after=4)
    assert [chunk.sequence for chunk in again] == [5, 6, 7, 8]
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(first[5:9], again, strict=True))
    with pytest.raises(Lost, match="chunk 4 is no longer kept; the oldest kept is 5"):
        handle.pull(3, 0)
    with pytest.raises(ValueError, match=f"after must be from -1 to {handle.newest}, .*, got 99|got 99"):
        handle.pull(99, 0)
    with pytest.raises(ValueError, match="got -2"):
        handle.pull(-2, 0)
    assert len(handle._kept) <= 2 + 4


def test_nothing_in_time_is_none(started: Callable) -> None:
    scheduler = started()
    handle = scheduler.open(Options(PROMPTS[0]), pace="max")
    handle.command("pause")
    wait_until(lambda: handle.session.paused)
    assert handle.pull(handle.newest, 0.01) is None
    handle.command("step")
    assert isinstance(handle.pull(handle.newest, PATIENCE_S), Emitted)


def test_listeners_hear_of_chunks_and_the_end(started: Callable) -> None:
    handle = started().open(Options(PROMPTS[0]), pace="max")
    heard = threading.Semaphore(0)
    stop = handle.listen(heard.release)
    take(handle, 2)
    assert heard.acquire(timeout=PATIENCE_S)
    handle.command("pause")
    wait_until(lambda: handle.session.paused)
    while heard.acquire(blocking=False):
        pass
    handle.close()
    assert heard.acquire(timeout=PATIENCE_S)
    stop()
    stop()


# ---- who comes next, with a clock of our own and no thread


def manual(limits: Limits = Limits(), *paces: str) -> tuple[Scheduler, Clock, list[Handle]]:
    clock = Clock()
    scheduler = Scheduler(pipeline(TWO_STEP), limits, warm=None, clock=clock)
    handles = [scheduler.open(Options(PROMPTS[0], fps=4), pace=pace) for pace in paces]
    for handle in handles:
        handle.session.next_chunk = lambda session=handle.session, **how: canned(session)
    return scheduler, clock, handles


def canned(session: Session) -> Emitted:
    """A second of video without the work."""
    session.sequence += 1
    return Emitted(session.sequence - 1, 0, torch.zeros(4, 2, 2, 3, dtype=torch.uint8), "", Timings(0.0, 0.0))


def turn(scheduler: Scheduler, clock: Clock, cost_s: float) -> Handle | None:
    """One decision and, if there is one, a chunk that takes `cost_s`."""
    now = clock.now
    ready = [h for h in scheduler.handles() if h.may_run(now)]
    if not ready:
        return None
    handle = scheduler._next()
    made = handle.session.next_chunk()
    clock.now += cost_s
    handle.add(made, now, clock.now)
    return handle


def read_all(handles: list[Handle]) -> None:
    for handle in handles:
        if handle.newest > handle.taken:
            handle.pull(handle.newest, 0)


def test_real_time_is_not_overtaken_by_more_than_the_buffer() -> None:
    scheduler, clock, (handle,) = manual(Limits(buffer_chunks=2), "realtime")
    begin = clock.now
    while clock.now < begin + 30:
        read_all([handle])
        if turn(scheduler, clock, 0.1) is None:
            clock.now += 0.05
    assert abs(handle.newest - 30) <= 3  # a chunk of 4 frames at 4 frames a second is a second


def test_sessions_share_evenly_when_the_model_cannot_keep_up() -> None:
    scheduler, clock, handles = manual(Limits(), "realtime", "max", "realtime", "max")
    for _ in range(40):
        read_all(handles)
        assert turn(scheduler, clock, 2.0) is not None
    assert all(abs(handle.newest - 9) <= 1 for handle in handles), [handle.newest for handle in handles]


def test_a_fast_reader_does_not_slow_real_time_down_and_gets_the_rest() -> None:
    scheduler, clock, (real, fast) = manual(Limits(), "realtime", "max")
    begin = clock.now
    for _ in range(100):
        read_all([real, fast])
        turn(scheduler, clock, 0.25)
    seconds = clock.now - begin
    assert real.newest >= 0.85 * seconds and fast.newest > 60


def test_a_late_session_does_not_hurry_to_catch_up() -> None:
    scheduler, clock, (handle,) = manual(Limits(idle_s=1e6), "realtime")
    turn(scheduler, clock, 0.1)
    read_all([handle])
    clock.now += 1000  # such as a pause
    made = 0
    while handle.may_run(clock.now):
        turn(scheduler, clock, 0.01)
        read_all([handle])
        made += 1
    assert made <= 4


def test_queue_time_is_that_behind_others() -> None:
    scheduler, clock, handles = manual(Limits(), "max", "max")
    for _ in range(6):
        read_all(handles)
        turn(scheduler, clock, 2.0)
    read_all(handles)
    assert [chunk.timings.queue_s for chunk in handles[0]._kept][1:] == [2.0, 2.0]


# ---- room


def test_admission_by_number(started: Callable) -> None:
    scheduler = started(Limits(sessions=2))
    first = scheduler.open(Options(PROMPTS[0]))
    scheduler.open(Options(PROMPTS[0]))
    with pytest.raises(Busy, match="all 2 sessions are taken"):
        scheduler.open(Options(PROMPTS[0]))
    first.close()
    with pytest.raises(ValueError, match="unknown word"):
        scheduler.open(Options("an elephant"))
    scheduler.open(Options(PROMPTS[0]))
    assert scheduler.facts()["sessions"] == 2
    with pytest.raises(ValueError, match="pace must be realtime or max, got 'slow'"):
        scheduler.open(Options(PROMPTS[0]), pace="slow")


def test_admission_by_measured_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(pipeline(TWO_STEP), Limits(sessions=100, memory_share=0.5), warm=PROMPTS[0])
    scheduler.start()
    try:
        wait_until(lambda: scheduler.is_ready)
        assert scheduler.session_bytes > 10_000
        scheduler._budget = 6 * scheduler.session_bytes
        for _ in range(3):
            scheduler.open(Options(PROMPTS[0]))
        with pytest.raises(Busy, match="no memory for another session"):
            scheduler.open(Options(PROMPTS[0]))
    finally:
        scheduler.close()
    with pytest.raises(Busy, match="shutting down"):
        scheduler.open(Options(PROMPTS[0]))


def test_what_a_session_holds_stays_flat() -> None:
    one = Session(pipeline(TWO_STEP), Options(PROMPTS[0]))
    sizes = []
    for _ in range(20):
        one.next_chunk()
        sizes.append(held_bytes(one, without=(one.pipeline,)))
    assert max(sizes[10:]) <= max(sizes[:10]) and sizes[9] > sum(p.nbytes for p in one.video.live._kept)
    cache = max(sizes)
    one.close()
    assert held_bytes(one, without=(one.pipeline,)) < cache / 4


def test_held_bytes_counts_storages_once() -> None:
    x = torch.zeros(100, dtype=torch.float64)
    assert held_bytes([x, x[10:], {"a": (x.view(10, 10),)}]) == 800
    assert held_bytes(lambda: x) == 800
    assert held_bytes([torch.nn.Linear(5, 5), x], without=(x,)) == 0
    assert memory.steady_heap() in (True, False)
    assert memory.free_bytes(torch.device("cpu")) > 2**20 and memory.process_bytes() > 2**20


def test_idle_sessions_are_reaped_and_forgotten() -> None:
    scheduler, clock, (idle, used) = manual(Limits(idle_s=10), "max", "max")
    turn(scheduler, clock, 1)
    clock.now += 9
    used.command("pause")
    used.pull(-1, 0)
    clock.now += 5
    scheduler._reap()
    assert idle.ended == Ended("nobody read it for 10 s") and idle.session.closed and used.ended is None
    assert scheduler.get(idle.id) is None and scheduler.facts()["sessions"] == 1
    used.close()
    scheduler._reap()
    assert scheduler.get(used.id) is used  # to tell its reader, for a while
    clock.now += 11
    scheduler._reap()
    assert scheduler.get(used.id) is None


def test_ended_sessions_do_not_pile_up() -> None:
    scheduler, _, _ = manual(Limits(sessions=2))
    for _ in range(10):
        scheduler.open(Options(PROMPTS[0])).close()
        scheduler._reap()
    assert len(scheduler.handles()) == 2


# ---- failures


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ZeroDivisionError("secret"), "the session failed; the server's log says why"),
    ],
)
def test_a_failure_ends_one_session_with_a_message(
    started: Callable, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = started()
    good = scheduler.open(Options(PROMPTS[0]), pace="max")
    bad = scheduler.open(Options(PROMPTS[0]), pace="max")
    take(bad, 1)

    def fail(**how: Any) -> None:
        raise error

    monkeypatch.setattr(bad.session, "next_chunk", fail)
    after, ended = 0, None
    while not isinstance(ended, Ended):
        ended = bad.pull(after, PATIENCE_S)
        after = ended.sequence if isinstance(ended, Emitted) else after
    assert ended.is_error and ended.reason.startswith(message) and "secret" not in ended.reason
    assert bad.session.closed and bad.session.video.live is None
    assert len(take(good, 8)) == 8 and scheduler.facts()["sessions"] == 1


def test_commands_reach_a_session_whose_buffer_is_full(started: Callable) -> None:
    handle = started(Limits(buffer_chunks=1)).open(Options(PROMPTS[0]))
    wait_until(lambda: handle.newest == 0)
    handle.command("close")
    wait_until(lambda: handle.ended == Ended("closed by client"))
    assert handle.pull(-1, 0).sequence == 0  # what was made is still there
    assert handle.pull(0, 0) == Ended("closed by client")


def test_closing_the_scheduler_ends_everybody(started: Callable) -> None:
    scheduler = started()
    handle = scheduler.open(Options(PROMPTS[0]), pace="max")
    take(handle, 1)
    scheduler.close()
    assert handle.ended == Ended("the server is shutting down")
    assert handle.session.closed and not scheduler.facts()["is_ready"]
    with pytest.raises(RuntimeError, match="started before"):
        scheduler.start()


def test_a_model_that_cannot_be_warmed_up_still_serves(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler(pipeline(TWO_STEP), warm="an elephant")
    scheduler.start()
    wait_until(lambda: scheduler.is_ready)
    assert take(scheduler.open(Options(PROMPTS[0])), 1) and "could not be warmed up" in caplog.text
    scheduler.close()


def test_impossible_limits() -> None:
    for changes in ({"sessions": 0}, {"buffer_chunks": 0}, {"resume_chunks": -1}, {"idle_s": 0}, {"memory_share": 2}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            Limits(**changes)


def test_many_readers_slow_ones_and_ones_that_come_back(started: Callable) -> None:
    scheduler = started(Limits(sessions=9))
    handles = [scheduler.open(Options(PROMPTS[0], seed=i), pace="max") for i in range(9)]
    seen: list[list[int]] = [[] for _ in handles]

    def read(index: int) -> None:
        row, falls = seen[index], {4, 7, 8}
        while len(row) < 12:
            chunk = handles[index].pull(row[-1] if row else -1, PATIENCE_S)
            if not isinstance(chunk, Emitted):
                return
            if index % 3 == 0:
                time.sleep(0.02)
            if index % 3 == 1 and chunk.sequence in falls:  # lost on the way, and three before it
                falls.remove(chunk.sequence)
                del row[-3:]
                continue
            row.append(chunk.sequence)

    threads = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(9)]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(len(row) >= 12 for row in seen))
    assert seen == [list(range(12))] * 9


def test_early_prompts_are_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every number of frames that is read again is met once before the first client, to record its calls."""
    read_again = []

    def spy(length: int, prefix: int, *rest: Any) -> Schedule:
        read_again.append(prefix)
        return Schedule(length, prefix, *rest)

    monkeypatch.setattr(live, "Schedule", spy)
    made = pipeline(TWO_STEP)
    made = dataclasses.replace(made, export=dataclasses.replace(made.export, context=Context(4)))
    scheduler = Scheduler(made, policy="slide", warm=None)
    scheduler._warm_up_early_prompts(PROMPTS[0], 3)
    assert [n for n in read_again if n] == [1, 2]


# ---- the next chunk of the same session is begun early where nobody else is to be run first --------------------------


def asked(scheduler: Scheduler, handle: Handle) -> bool:
    return scheduler._goes_on(handle)


def test_a_session_is_begun_early_only_if_it_is_the_next_one() -> None:
    scheduler, _, (fast, other) = manual(Limits(buffer_chunks=2), "max", "max")
    assert not asked(scheduler, fast)  # the other one waits
    scheduler._run_one(other)
    scheduler._run_one(other)
    assert asked(scheduler, fast) and not asked(scheduler, other)  # whose reader has two to take
    scheduler._run_one(fast)
    assert not asked(scheduler, fast)  # so would its reader have
    fast.taken = fast.newest
    assert asked(scheduler, fast)
    fast.close()
    assert not asked(scheduler, fast)


def test_a_session_at_real_time_is_begun_early_only_where_it_is_behind() -> None:
    scheduler, clock, (handle,) = manual(Limits(buffer_chunks=2), "realtime")
    for _ in range(2):
        scheduler._run_one(handle)
        handle.taken = handle.newest
    assert not handle.may_run(clock.now) or not asked(scheduler, handle)
    while not handle.may_run(clock.now):
        clock.now += 0.01
    assert not asked(scheduler, handle)  # on time: the next one is due later
    clock.now += 5
    assert asked(scheduler, handle)


def test_chunks_begun_early_are_the_same_and_commands_keep_their_order(started: Callable) -> None:
    """Through the thread, with a reader who takes at once: some chunks are begun early, and the record replays."""
    scheduler = started()
    handle, early = scheduler.open(Options(PROMPTS[0], seed=3), pace="max"), []
    inner = handle.session._begin_ahead
    handle.session._begin_ahead = lambda: (early.append(handle.session.sequence), inner())
    taken = []
    for chunk in range(20):
        if chunk % 4 == 1:
            handle.command("prompt", text=PROMPTS[chunk % 2], mode="switch")
        taken += take(handle, 1, after=chunk - 1)
    wait_until(lambda: early, "a chunk that is begun early")
    numbers = [command.number for made in taken for command in made.commands]
    assert numbers == sorted(numbers)
    handle.command("pause")
    wait_until(lambda: handle.session.paused)
    handle.close()
    again = list(Session.replay(pipeline(TWO_STEP), handle.session.record()))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(taken, again, strict=False))
