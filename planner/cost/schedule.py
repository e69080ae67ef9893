"""Seconds of one flush of a pipeline under each schedule, a bound below them, and the microbatches that it holds.

Times are per virtual stage in the order of the model, `[..., S]` with S = pp · vpp; everything broadcasts over the
axes before. A message between neighbours on different ranks takes a hop and its sender goes on. All results are
longest paths through the schedule's actions: sums of times, so that a slower stage never gives a faster flush.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.cost import recurrence
from planner.errors import PlannerError
from planner.spec.orders import (
    ONE_STAGE_A_RANK,
    SPLIT_BACKWARD,
    rank_stages,
    require_runnable,
    round_shape,
    stage_ranks,
    warmup_chunks,
)
from planner.spec.strategy import Schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_AT_A_TIME = 2**15  # numbers of a table of windows, so that it stays in the processor's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Flush:
    """Every microbatch through the pipeline and back, and the work of each rank in it."""

    seconds: Floats
    busy_seconds: Floats  # [..., rank]
    pace: Ints  # the rank with the most work

    @property
    def bubble_seconds(self) -> Floats:
        """Seconds that the rank with the most work does not work: bubbles and exposed hops."""
        bubble: Floats = self.seconds - self.busy_seconds.max(axis=-1)
        return bubble


def flush(
    schedule: Schedule,
    forward: Any,
    backward: Any,
    *,
    microbatches: Any,
    pp: int,
    vpp: int = 1,
    weight: Any = None,
    hop_seconds: Any = 0.0,
) -> Flush:
    """One flush: gpipe and 1f1b in closed form, the others by their recurrence, whose equal turns are added up.

    `weight` is the part of `backward` that only makes weight gradients; without it zb and zbv have nothing to
    put off. `hop_seconds` is one number a candidate or, with as many axes as `forward`, one per boundary.
    """
    case = _Case.of(schedule, forward, backward, weight, microbatches, hop_seconds, pp, vpp)
    seconds = _recurrence(case) if schedule in ("interleaved", "zb", "zbv") else _closed(case)
    busy = case.busy_seconds()
    return Flush(
        seconds=seconds.reshape(case.shape),
        busy_seconds=busy.reshape(*case.shape, pp),
        pace=busy.argmax(axis=-1).reshape(case.shape),
    )


def lower_bound_seconds(
    schedule: Schedule,
    forward: Any,
    backward: Any,
    *,
    microbatches: Any,
    pp: int,
    vpp: int = 1,
    weight: Any = None,
    hop_seconds: Any = 0.0,
) -> Floats:
    """Seconds that no flush is below: the most of a few paths through it, of gpipe and 1f1b those of `flush`.

    Over ranks, fill + work + drain (less the weight parts that run beside the drain); over virtual stages, one
    microbatch through all and the others through this one forward, or back.
    """
    case = _Case.of(schedule, forward, backward, weight, microbatches, hop_seconds, pp, vpp)
    if schedule in ONE_STAGE_A_RANK:
        return _closed(case).reshape(case.shape)
    back = case.backward - case.weight
    further = (case.microbatches - 1)[:, None] * np.maximum(case.forward, back)
    through = case.forward.sum(axis=1) + back.sum(axis=1) + 2 * case.hops.sum(axis=1)
    bound = through + further.max(axis=1)
    zero = np.zeros((len(case.microbatches), 1))
    ahead = np.concatenate([zero, np.cumsum(case.forward[:, :-1] + case.hops, axis=1)], axis=1)
    behind = np.concatenate([zero, np.cumsum(back[:, :-1] + case.hops, axis=1)], axis=1)
    busy = case.busy_seconds()
    for rank, stages in enumerate(rank_stages(schedule, pp, vpp)):
        late = np.minimum(rank + 1, case.microbatches[:, None]) * case.weight[:, stages]
        beside = late.sum(axis=1) if schedule == "zbv" else _latest(case, rank, stages)
        first = stages[0]
        after = np.maximum(behind[:, first] - beside, 0.0)
        bound = np.maximum(bound, ahead[:, first] + busy[:, rank] + after)
    shaped: Floats = bound.reshape(case.shape)
    return shaped


def in_flight(schedule: Schedule, pp: int, vpp: int, microbatches: int) -> Ints:
    """Microbatches whose activations a rank holds when it first holds most, `[rank, virtual stage of it]`.

    Held from the forward to the end of the backward, or of its input part where the schedule splits it.
    """
    require_runnable(schedule, pp, vpp, microbatches)
    ranks = np.arange(pp)
    if schedule == "gpipe":
        return np.full((pp, 1), microbatches)
    if schedule == "1f1b":
        return np.minimum(microbatches, pp - ranks)[:, None]
    if schedule == "zbv":
        return np.minimum(microbatches, np.stack([2 * pp - 1 - ranks, ranks + 1], axis=1))
    size, rounds = round_shape(pp, microbatches)
    ahead = [warmup_chunks(schedule, rank, pp, vpp, size) + 1 for rank in range(pp)]
    return _through(np.minimum(ahead, vpp * size * rounds), size, vpp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Microbatches of which ranks hold something at a moment, `[rank, virtual stage of it, …]`."""

    kept: Ints  # activations: forward has run, backward has not, or not to its end; or not its input part
    unfinished: Ints  # what the weight part reads of them, for the input part has run
    gradients: Ints  # … and gradients that the input part leaves for it, or is leaving

    @classmethod
    def stacked(cls, every: Sequence[Held], places: Ints) -> Held:
        """One of these for each place, along a further axis."""
        each = {item.name: np.stack([getattr(one, item.name) for one in every], axis=-1) for item in fields(cls)}
        return cls(**{name: counts[..., places] for name, counts in each.items()})

    def of_rank(self, rank: int) -> Held:
        """What one rank holds."""
        return Held(**{item.name: getattr(self, item.name)[rank] for item in fields(self)})

    @property
    def key(self) -> bytes:
        """Equal for equal numbers of one shape."""
        return b"".join(getattr(self, item.name).tobytes() for item in fields(self))


def fullest_moments(schedule: Schedule, pp: int, vpp: int, microbatches: int) -> tuple[Held, ...]:
    """Moments of which one is the fullest of a rank whose virtual stages are alike, but perhaps for the last.

    Where backward is split, what waits for weight parts decides. Of zb: when a weight part first makes room, and
    a round later. Of zbv: at the first input part, and at the last one before weight parts alone are left; with
    fewer than 2p − 1 microbatches the second may hold too many.
    """
    if schedule == "zb":
        return tuple(_in_rounds(pp, vpp, microbatches, turn) for turn in range(min(vpp, 2)))
    most = in_flight(schedule, pp, vpp, microbatches)
    nothing = np.zeros_like(most)
    if schedule != "zbv":
        return (Held(kept=most, unfinished=nothing, gradients=nothing),)
    return Held(kept=most, unfinished=nothing, gradients=nothing + np.array([0, 1])), _last_of_v(pp, microbatches)


def _last_of_v(pp: int, microbatches: int) -> Held:
    """When backward has come down for the last time: rank i has put off i weight parts of both its stages."""
    ranks = np.arange(pp)
    waiting = np.minimum(microbatches, np.stack([ranks, ranks], axis=1))
    left = np.minimum(microbatches - waiting, np.stack([pp - ranks, 0 * ranks], axis=1))
    gradients = np.minimum(microbatches, np.stack([ranks + 1, ranks], axis=1))
    return Held(kept=left, unfinished=waiting, gradients=_without_first(gradients))


def _in_rounds(pp: int, vpp: int, microbatches: int, turn: int) -> Held:
    """At the input part that is the rank's number after a turn's first: all of them wait for weight parts."""
    size, _ = round_shape(pp, microbatches)
    every, late = vpp * microbatches, np.arange(pp)
    place = np.minimum(turn * size + late, every - 1)
    ahead = np.array([warmup_chunks("zb", rank, pp, vpp, size) for rank in range(pp)])
    back, done = (_through(actions, size, vpp)[:, ::-1] for actions in (place, np.maximum(place - late, 0)))
    return Held(
        kept=_through(np.minimum(ahead + place + 1, every), size, vpp) - back,
        unfinished=back - done,
        gradients=_without_first(_through(place + 1, size, vpp)[:, ::-1] - done),
    )


def _without_first(gradients: Ints) -> Ints:
    """The first virtual stage hands no gradient back: all of its backward is the weight part."""
    others = np.ones_like(gradients)
    others[0, 0] = 0
    return gradients * others


def _through(actions: Ints, size: int, vpp: int) -> Ints:
    """Of a rank's first forwards those through each of its virtual stages, in rounds of `size` microbatches."""
    whole, rest = np.divmod(actions[:, None], vpp * size)
    return whole * size + np.clip(rest - size * np.arange(vpp), 0, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Candidates in rows."""

    schedule: Schedule
    pp: int
    vpp: int
    shape: tuple[int, ...]
    forward: Floats  # [candidate, virtual stage]
    backward: Floats
    weight: Floats
    hops: Floats  # [candidate, boundary]
    microbatches: Ints

    @classmethod
    def of(
        cls, schedule: Schedule, forward: Any, backward: Any, weight: Any, microbatches: Any, hop_seconds: Any,
        pp: int, vpp: int,
    ) -> _Case:  # fmt: skip
        """Broadcast and checked."""
        stages = pp * vpp
        split = schedule in SPLIT_BACKWARD and weight is not None
        given = {"forward": forward, "backward": backward, "weight": weight if split else np.zeros(stages)}
        times = {key: np.asarray(value, dtype=float) for key, value in given.items()}
        for key, value in times.items():
            if value.ndim == 0 or value.shape[-1] != stages:
                raise PlannerError(
                    f"{key} has seconds for each of pp · vpp = {stages} virtual stages",
                    value=value.shape,
                    remedy=f"give an array whose last axis has {stages} numbers",
                    key=key,
                )
        counts = np.asarray(microbatches)
        require_runnable(schedule, pp, vpp, int(counts.min(initial=1)))
        hops = np.asarray(hop_seconds, dtype=float)
        if hops.ndim < times["forward"].ndim:
            hops = hops[..., None]
        elif hops.shape[-1] not in (1, stages - 1):
            raise PlannerError(
                f"hop_seconds is one number a candidate, or one for each of {stages - 1} boundaries",
                value=hops.shape,
                remedy=f"give an array whose last axis has {stages - 1} numbers, or one axis less",
                key="hop_seconds",
            )
        leading = [value.shape[:-1] for value in (*times.values(), hops)]
        shape = np.broadcast_shapes(counts.shape, *leading)
        placed = np.array(stage_ranks(schedule, pp, vpp))
        rows = {key: _rows(value, shape, stages) for key, value in times.items()}
        return cls(
            schedule=schedule,
            pp=pp,
            vpp=vpp,
            shape=shape,
            hops=_rows(hops, shape, stages - 1) * (placed[1:] != placed[:-1]),
            microbatches=np.broadcast_to(counts, shape).reshape(-1).astype(np.int64),
            **rows,
        )

    def take(self, rows: slice) -> _Case:
        """Some candidates."""
        return _Case(
            schedule=self.schedule,
            pp=self.pp,
            vpp=self.vpp,
            shape=self.microbatches[rows].shape,
            forward=self.forward[rows],
            backward=self.backward[rows],
            weight=self.weight[rows],
            hops=self.hops[rows],
            microbatches=self.microbatches[rows],
        )

    def busy_seconds(self) -> Floats:
        """Work of each rank, [candidate, rank]."""
        both = (self.forward + self.backward).reshape(-1, self.vpp, self.pp)
        if self.schedule == "zbv":
            both = np.stack([both[:, 0], both[:, 1, ::-1]], axis=1)
        busy: Floats = both.sum(axis=1) * self.microbatches[:, None]
        return busy


def _rows(values: Floats, shape: tuple[int, ...], last: int) -> Floats:
    return np.broadcast_to(values, (*shape, last)).reshape(math.prod(shape), last)


def _latest(case: _Case, rank: int, stages: tuple[int, ...]) -> Floats:
    """At least the weight parts that a rank of zb runs after its last input part."""
    late = np.minimum(rank + 1, case.vpp * case.microbatches)
    most: Floats = late * case.weight[:, stages].max(axis=1)
    return most


def _recurrence(case: _Case) -> Floats:
    times = recurrence.Times(
        forward=np.ascontiguousarray(case.forward.T),
        backward=np.ascontiguousarray((case.backward - case.weight).T),
        weight=np.ascontiguousarray(case.weight.T),
        hops=np.ascontiguousarray(case.hops.T),
    )
    return recurrence.flush_seconds(case.schedule, case.pp, case.vpp, case.microbatches, times)


def _closed(case: _Case) -> Floats:
    if case.schedule == "gpipe":
        return _gpipe(case)
    width = max(1, _AT_A_TIME // case.pp**2)
    parts = [slice(first, first + width) for first in range(0, len(case.microbatches), width)]
    return np.concatenate([np.empty(0), *(_one_forward_one_backward(case.take(part)) for part in parts)])


def _gpipe(case: _Case) -> Floats:
    """Σf + Σb + 2 Σhop + (m − 1)(max f + max b), exact: two flow shops one after the other."""
    slowest = case.forward.max(axis=1) + case.backward.max(axis=1)
    once = (case.forward + case.backward).sum(axis=1) + 2 * case.hops.sum(axis=1)
    seconds: Floats = once + (case.microbatches - 1) * slowest
    return seconds


def _one_forward_one_backward(case: _Case) -> Floats:
    """The longest of the paths that enter, circle and leave: in(i) + out(i) + circles(i, m − p + i − 1), over i.

    w = min(m, p − j) forwards run ahead on rank j. A path that enters goes forward to some rank j ≥ i, stays
    w − 1 times on the slowest rank so far, and back to i; one that leaves does the same in reverse. Between them
    it goes forward and back over windows of ranks: a window of n ranks takes n of the microbatches left and
    Σt + 2 Σhop of time, so exposed hops are paid in every circle. Windows that do not start at i need a path that
    went all the way to the last rank. With m ≤ p, ranks up to p − m run all forwards, then all backwards: a path
    may also enter once and stay m − 1 times on one of these. Left out are circles of more than two sizes.
    """
    p, count = case.pp, case.microbatches[:, None]
    ranks = np.arange(p)
    spare = np.minimum(count, p - ranks) - 1  # w − 1
    hop = np.concatenate([np.zeros((len(count), 1)), case.hops], axis=1)  # to the rank from the one before
    ahead, back = (np.cumsum(times + hop, axis=1) for times in (case.forward, case.backward))
    enter = ahead + spare * np.maximum.accumulate(case.forward, axis=1)
    leave = back + spare * np.maximum.accumulate(case.backward, axis=1)
    to_rank = ahead - case.forward  # hop included
    from_rank = back - case.backward

    entered = enter + back
    left = leave + ahead
    entered_any = np.maximum.accumulate(entered[:, ::-1], axis=1)[:, ::-1] - from_rank
    left_any = np.maximum.accumulate(left[:, ::-1], axis=1)[:, ::-1] - to_rank
    entered_last = entered[:, -1:] - from_rank
    left_last = left[:, -1:] - to_rank

    windows = _windows(case.forward + case.backward, case.hops)
    further = count - p + ranks - 1
    anchored = _circles(windows, further)
    within = _circles(np.maximum.accumulate(windows[:, :, ::-1], axis=2)[:, :, ::-1], further)
    anywhere = np.maximum(entered_last + left_any, entered_any + left_last) + within
    paths = np.maximum(entered_any + left_any + anchored, anywhere)
    paths = np.where(further >= 0, paths, 0.0)
    slow_back = entered_any + leave - case.backward
    slow_ahead = left_any + enter - case.forward
    once = np.take_along_axis(np.maximum(slow_back, slow_ahead), np.maximum(p - count, 0), axis=1)[:, 0]
    longest: Floats = np.maximum(paths.max(axis=1), np.where(count[:, 0] <= p, once, 0.0))
    return longest


def _windows(both: Floats, hops: Floats) -> Floats:
    """Time of one circle over n ranks from rank i, [candidate, n, i]; nothing where ranks end."""
    candidates, p = both.shape
    windows = np.zeros((candidates, p + 1, p))
    for size in range(1, p + 1):
        starts = p - size + 1
        windows[:, size, :starts] = windows[:, size - 1, :starts] + both[:, size - 1 :]
        if size > 1:
            windows[:, size, :starts] += 2 * hops[:, size - 2 :]
    return windows


def _circles(windows: Floats, further: Ints) -> Floats:
    """Most time that circles over `further` ranks take, most of them of one size, [candidate, i]."""
    p = windows.shape[2]
    rest = windows.copy()  # of fewer ranks: one circle, or one and single ranks
    for size in range(2, p + 1):
        np.maximum(rest[:, size], rest[:, size - 1] + windows[:, 1], out=rest[:, size])
    left = np.maximum(further, 0)
    most = np.zeros(left.shape)
    for size in range(1, p + 1):
        whole, remaining = np.divmod(left, size)
        tail = np.take_along_axis(rest, remaining[:, None, :], axis=1)[:, 0]
        np.maximum(most, whole * windows[:, size] + tail, out=most)
    return most
