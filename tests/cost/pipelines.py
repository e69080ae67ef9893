"""Pipelines to draw, and their simulation, for the tests of orders, simulation and closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np

from planner.cost.simulate import Timeline, simulate
from planner.spec.orders import orders
from planner.spec.strategy import Schedule

SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zb", "zbv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A schedule, its sizes, and seconds per virtual stage and boundary."""

    schedule: Schedule
    pp: int
    vpp: int
    microbatches: int
    forward: Any
    backward: Any
    weight: Any
    hop_seconds: Any

    def arguments(self, **others: Any) -> dict[str, Any]:
        """What the closed forms take."""
        names = ("forward", "backward", "weight", "hop_seconds", "microbatches", "pp", "vpp")
        return {name: getattr(self, name) for name in names} | others

    def timeline(self, **options: Any) -> Timeline:
        """The simulation."""
        order = orders(self.schedule, self.pp, self.vpp, self.microbatches)
        return simulate(order, self.forward, self.backward, self.weight, self.hop_seconds, **options)


@st.composite
def sizes(draw: st.DrawFn, most_ranks: int = 8) -> tuple[Schedule, int, int, int]:
    """A schedule, ranks, virtual stages a rank, and microbatches."""
    schedule = draw(st.sampled_from(SCHEDULES))
    pp = draw(st.integers(1, most_ranks))
    vpp = {"gpipe": 1, "1f1b": 1, "zbv": 2}.get(schedule) or draw(st.integers(1, 4))
    return schedule, pp, vpp, draw(st.integers(1, 8 * pp))


@st.composite
def pipelines(draw: st.DrawFn, uneven: float = 0.3, most_ranks: int = 8) -> Pipeline:
    """Virtual stages up to `uneven` apart, the last one up to twice as heavy, hops up to a fifth of a stage."""
    schedule, pp, vpp, microbatches = draw(sizes(most_ranks))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    forward = 1.0 + uneven * rng.uniform(-1, 1, pp * vpp)
    forward[-1] += draw(st.sampled_from([0.0, 1.0])) * (uneven > 0) * rng.uniform()
    backward = forward * rng.uniform(1, 3) * (1.0 + uneven * rng.uniform(-0.3, 0.3, pp * vpp))
    hop = draw(st.sampled_from([0.0, 0.05, 0.2])) * float(np.mean(forward + backward))
    return Pipeline(
        schedule=schedule,
        pp=pp,
        vpp=vpp,
        microbatches=microbatches,
        forward=forward,
        backward=backward,
        weight=backward * rng.uniform(0.1, 0.6),
        hop_seconds=hop * (1.0 + uneven * rng.uniform(-1, 1, pp * vpp - 1)),
    )
