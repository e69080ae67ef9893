"""A step out of what its pipeline ranks do: the flush, gradients and parameters exchanged once, the optimizer.

With one stage a rank the exchanges lengthen paths through the pipeline: a rank cannot start before its parameters
are there, and is done when its gradients are. So a rank that waits anyway pays nothing for them, and a slower
stage never makes a faster step. With several stages a rank the longest exposed exchange comes on top of the flush.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from planner.cost import data_parallel
from planner.cost.layouts import Bools, Floats, Ints
from planner.cost.schedule import flush, lower_bound_seconds
from planner.spec.orders import SPLIT_BACKWARD
from planner.spec.strategy import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """Seconds of every virtual stage with one microbatch, [virtual stage, layout]."""

    ahead: Floats
    back: Floats  # recomputation and the weights' gradients included
    weight: Floats  # of back, what only makes gradients of weights
    hop: Floats  # to the next stage, [layout]

    def take(self, rows: Ints) -> StageWork:
        """Some of the layouts."""
        return StageWork(**{item.name: getattr(self, item.name)[..., rows] for item in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class OnceAStep:
    """Seconds of every rank's exchanges and optimizer, [rank, layout]."""

    reduce: Floats
    gather: Floats
    last: Floats  # the share of them that comes first or last and runs beside nothing
    alone: Floats  # beside nothing: copies for these exchanges, sums of parts of gradients
    optimizer: Floats
    overlapped: Bools  # whether the rest runs beside computation, [layout]

    @property
    def behind(self) -> Floats:
        """What runs beside nothing on each rank."""
        return self.alone + self.optimizer

    def take(self, rows: Ints) -> OnceAStep:
        """Some of the layouts."""
        return OnceAStep(**{item.name: getattr(self, item.name)[..., rows] for item in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Seconds of a step by what takes them, [layout]."""

    pipeline: Floats
    exposed: Floats  # of the exchanges, with what runs beside nothing
    optimizer: Floats
    pace: Ints  # the rank with the most work

    @property
    def seconds(self) -> Floats:
        """Of the step, without what the host does once."""
        return np.asarray(self.pipeline + self.exposed + self.optimizer)


def step(
    schedule: Schedule,
    work: StageWork,
    once: OnceAStep,
    *,
    rank_of: Ints,
    microbatches: Ints,
    pp: int,
    vpp: int,
) -> Step:
    """The step of layouts that share their schedule and stages."""
    given = _stages_last(schedule, work)
    pipeline = flush(schedule, **given, microbatches=microbatches, hop_seconds=work.hop, pp=pp, vpp=vpp)
    exposed = _exposed(work, once, rank_of, microbatches, pipeline.seconds, pp, vpp)
    last, rows = once.behind.argmax(axis=0), np.arange(once.behind.shape[1])
    return Step(
        pipeline=pipeline.seconds,
        exposed=exposed + once.alone[last, rows],
        optimizer=once.optimizer[last, rows],
        pace=pipeline.pace,
    )


def least_seconds(
    schedule: Schedule,
    work: StageWork,
    once: OnceAStep,
    *,
    rank_of: Ints,
    microbatches: Ints,
    pp: int,
    vpp: int,
) -> Floats:
    """Seconds that no step of these layouts is below, found faster than `step`; of gpipe and 1f1b the step."""
    given = _stages_last(schedule, work)
    least = lower_bound_seconds(schedule, **given, microbatches=microbatches, hop_seconds=work.hop, pp=pp, vpp=vpp)
    exposed = _exposed(work, once, rank_of, microbatches, least, pp, vpp)
    return np.asarray(least + exposed + once.behind.max(axis=0))


def put_off(schedule: Schedule, work: StageWork) -> Floats | None:
    """Of backward the weight part, where it comes apart: all of it in the first stage, that hands nothing back."""
    return np.concatenate([work.back[:1], work.weight[1:]]) if schedule in SPLIT_BACKWARD else None


def _stages_last(schedule: Schedule, work: StageWork) -> dict[str, Floats | None]:
    weight = put_off(schedule, work)
    return {
        "forward": np.moveaxis(work.ahead, 0, -1),
        "backward": np.moveaxis(work.back, 0, -1),
        "weight": None if weight is None else np.moveaxis(weight, 0, -1),
    }


def _exposed(
    work: StageWork, once: OnceAStep, rank_of: Ints, microbatches: Ints, flushed: Floats, pp: int, vpp: int
) -> Floats:
    """What the exchanges add to a flush."""
    if vpp == 1:
        return np.maximum(lengthened(work, once, microbatches) - flushed, 0.0)
    ahead, back = np.zeros((2, pp, work.ahead.shape[1]))
    np.add.at(ahead, rank_of, work.ahead)
    np.add.at(back, rank_of, work.back)
    return _on_top(ahead, back, once, microbatches, vpp)


def exposed_exchanges(work: StageWork, once: OnceAStep) -> tuple[Floats, Floats]:
    """What of gathering and reducing runs beside no microbatch of the rank's own, [rank, layout] each."""
    gather = data_parallel.exposed(once.gather, work.ahead, once.last, once.overlapped)
    return gather, data_parallel.exposed(once.reduce, work.back, once.last, once.overlapped)


def lengthened(work: StageWork, once: OnceAStep, microbatches: Ints) -> Floats:
    """The longest path through one rank's whole work, [layout], with the exchanges at either end.

    max over i of start_i + m·(f_i + b_i) + finish_i; start_i = max over r ≤ i of gather_r + Σ_{r≤j<i} (f_j + hop),
    finish_i likewise of reduce_r and b_j. What of an exchange runs beside the rank's own microbatch is left out.
    """
    gather, reduce = exposed_exchanges(work, once)
    start, finish = gather[0], reduce[0]
    longest = start + microbatches * (work.ahead[0] + work.back[0]) + finish
    for rank in range(1, len(gather)):
        start = np.maximum(start + work.ahead[rank - 1] + work.hop, gather[rank])
        finish = np.maximum(finish + work.back[rank - 1] + work.hop, reduce[rank])
        longest = np.maximum(longest, start + microbatches * (work.ahead[rank] + work.back[rank]) + finish)
    return np.asarray(longest)


def _on_top(ahead: Floats, back: Floats, once: OnceAStep, microbatches: Ints, vpp: int) -> Floats:
    """The longest exposed exchange of any rank; each waits for the ranks before it, and is done before them."""
    ahead_slack = (np.cumsum(ahead, axis=0) - ahead) / vpp
    back_slack = (np.cumsum(back, axis=0) - back) / vpp
    # each chunk's gradients wait for its own last microbatch, a round of the pipeline apart
    chunks = 1.0 + (vpp - 1) / vpp * (np.minimum(len(ahead), microbatches) - 1)
    reduce = data_parallel.exposed(once.reduce, back * chunks + back_slack, once.last, once.overlapped)
    gather = data_parallel.exposed(once.gather, ahead * chunks + ahead_slack, once.last, once.overlapped)
    shown = np.maximum(reduce - back_slack, once.reduce * once.last) + gather
    return np.asarray(shown.max(axis=0))
