"""The closed forms agree with the simulation, their bound is never above it, and both hold what they should."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from planner.cost.schedule import flush, fullest_moments, in_flight, lower_bound_seconds
from planner.errors import PlannerError
from planner.spec.orders import orders, rank_stages
from planner.spec.strategy import Schedule
from tests.cost.pipelines import SCHEDULES, Pipeline, pipelines, sizes

ROUNDING = 1e-9
LOW = {"1f1b": 0.01}  # by how much a closed form may be too low; the others are exact


def agrees(pipeline: Pipeline) -> None:
    seconds = float(flush(pipeline.schedule, **pipeline.arguments()).seconds)
    exact = pipeline.timeline().seconds
    assert exact * (1 - LOW.get(pipeline.schedule, ROUNDING)) <= seconds <= exact * (1 + ROUNDING)


@settings(deadline=None, max_examples=300)
@given(pipelines())
def test_uneven_stages_agree_with_the_simulation(pipeline: Pipeline) -> None:
    agrees(pipeline)


@settings(deadline=None, max_examples=100)
@given(pipelines(uneven=0.0))
def test_even_stages_agree_exactly(pipeline: Pipeline) -> None:
    seconds = float(flush(pipeline.schedule, **pipeline.arguments()).seconds)
    assert seconds == pytest.approx(pipeline.timeline().seconds, rel=1e-3)


@settings(deadline=None, max_examples=12)
@given(pipelines(most_ranks=32))
def test_many_ranks_agree(pipeline: Pipeline) -> None:
    agrees(pipeline)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("microbatches", [200, 203])
def test_turns_that_are_added_up_agree(schedule: Schedule, microbatches: int) -> None:
    vpp = 1 if schedule in ("gpipe", "1f1b") else 2
    rng = np.random.default_rng(7)
    for _ in range(10):
        forward = rng.uniform(0.7, 1.3, 4 * vpp)
        agrees(
            Pipeline(
                schedule=schedule, pp=4, vpp=vpp, microbatches=microbatches, forward=forward,
                backward=2 * forward, weight=forward * rng.uniform(0.5, 1), hop_seconds=0.2,
            )
        )  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(pipelines(uneven=0.6))
def test_the_bound_is_never_above_the_simulation(pipeline: Pipeline) -> None:
    bound = float(lower_bound_seconds(pipeline.schedule, **pipeline.arguments()))
    timeline = pipeline.timeline()
    assert timeline.busy_seconds.max() * (1 - ROUNDING) <= bound <= timeline.seconds * (1 + ROUNDING)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bound_is_met_by_even_stages(schedule: Schedule) -> None:
    vpp = 1 if schedule in ("gpipe", "1f1b") else 2
    times = {"forward": np.ones(8 * vpp), "backward": np.full(8 * vpp, 2.0), "weight": np.ones(8 * vpp)}
    sizes_ = {"microbatches": 32, "pp": 8, "vpp": vpp}
    seconds = float(flush(schedule, **times, **sizes_).seconds)
    assert float(lower_bound_seconds(schedule, **times, **sizes_)) == pytest.approx(seconds, rel=0.03)


@settings(deadline=None, max_examples=300)
@given(pipelines(), st.sampled_from(["forward", "backward", "weight"]), st.integers(0, 99), st.floats(0, 3))
def test_a_slower_stage_never_makes_a_faster_flush(
    pipeline: Pipeline, slower: str, place: int, factor: float
) -> None:
    stages = len(pipeline.forward)
    more = np.zeros(stages)
    more[place % stages] = factor
    changed = {slower: getattr(pipeline, slower) + more}
    if slower == "weight":  # a weight part is a part of the backward
        changed["backward"] = pipeline.backward + more
    other = dataclasses.replace(pipeline, microbatches=pipeline.microbatches * 3, **changed)
    same = dataclasses.replace(pipeline, microbatches=pipeline.microbatches * 3)
    for function in (lambda case: flush(case.schedule, **case.arguments()).seconds, _bound):
        assert float(function(other)) >= float(function(same)) * (1 - ROUNDING)


def _bound(pipeline: Pipeline) -> Any:
    return lower_bound_seconds(pipeline.schedule, **pipeline.arguments())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 7, 100])
def test_one_rank_works_all_the_time(schedule: Schedule, microbatches: int) -> None:
    vpp = {"gpipe": 1, "1f1b": 1}.get(schedule, 2)
    found = flush(
        schedule, np.full(vpp, 1.0), np.full(vpp, 2.5), weight=np.full(vpp, 0.5), microbatches=microbatches,
        pp=1, vpp=vpp, hop_seconds=0.3,
    )  # fmt: skip
    assert float(found.seconds) == pytest.approx(microbatches * 3.5 * vpp, rel=1e-12)
    assert float(found.bubble_seconds) == pytest.approx(0.0, abs=1e-9)


def test_known_bubbles() -> None:
    gpipe = flush("gpipe", np.ones(8), np.full(8, 2.0), microbatches=8, pp=8)
    assert float(gpipe.bubble_seconds / gpipe.seconds) == pytest.approx(7 / 15)
    even = {"forward": np.ones(16), "backward": np.full(16, 2.0), "pp": 8, "vpp": 2}
    interleaved = flush("interleaved", **even, microbatches=16)
    assert float(interleaved.bubble_seconds / interleaved.busy_seconds[0]) == pytest.approx(7 / (2 * 16))
    late = flush("zb", np.full(8, 3.0), np.full(8, 7.0), weight=np.full(8, 2.0), microbatches=24, pp=8)
    assert float(late.bubble_seconds) == pytest.approx(7 * (3.0 + 5.0 - 2.0))


def test_exposed_hops_are_paid_in_every_circle() -> None:
    found = flush("1f1b", np.ones(4), np.full(4, 2.0), microbatches=100, pp=4, hop_seconds=0.5)
    # each four microbatches go forward and back over three boundaries: t + 2c · 3/4 a microbatch
    assert float(found.seconds) / 100 == pytest.approx(3 + 0.75, rel=0.04)


def test_the_rank_with_the_most_work_sets_the_pace() -> None:
    forward = np.array([[1.0, 1.0, 1.0, 1.5], [2.0, 1.0, 1.0, 1.0]])
    found = flush("zbv", forward, 2 * forward, microbatches=10, pp=2, vpp=2)
    assert found.busy_seconds.tolist() == [[75.0, 60.0], [90.0, 60.0]]  # rank 0 has the first and the last
    assert found.pace.tolist() == [0, 0]
    found = flush("interleaved", forward, 2 * forward, microbatches=10, pp=2, vpp=2)
    assert found.busy_seconds.tolist() == [[60.0, 75.0], [90.0, 60.0]]
    assert found.pace.tolist() == [1, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_candidates_cost_what_each_costs_alone(schedule: Schedule) -> None:
    pp, vpp = 4, 1 if schedule in ("gpipe", "1f1b") else 2
    rng = np.random.default_rng(3)
    forward = rng.uniform(1, 2, (5, 60, pp * vpp))
    counts = rng.integers(1, 60, 60)
    for hops in (rng.uniform(0, 0.3, (5, 60)), rng.uniform(0, 0.3, (5, 1, pp * vpp - 1))):
        together = flush(
            schedule, forward, 2 * forward, weight=0.8 * forward, microbatches=counts, pp=pp, vpp=vpp,
            hop_seconds=hops,
        )  # fmt: skip
        assert together.seconds.shape == together.pace.shape == (5, 60)
        assert together.busy_seconds.shape == (5, 60, pp)
        for row, column in ((0, 0), (2, 31), (4, 59)):
            alone = flush(
                schedule, forward[row, column], 2 * forward[row, column], weight=0.8 * forward[row, column],
                microbatches=counts[column], pp=pp, vpp=vpp,
                hop_seconds=hops[row, column] if hops.ndim == 2 else hops[row, 0],
            )  # fmt: skip
            assert alone.seconds.shape == ()
            assert together.seconds[row, column] == pytest.approx(float(alone.seconds), rel=1e-12)


def test_no_candidates_are_no_error() -> None:
    for schedule in SCHEDULES:
        vpp = 1 if schedule in ("gpipe", "1f1b") else 2
        nothing = np.zeros((0, 4 * vpp))
        found = flush(schedule, nothing, nothing, microbatches=8, pp=4, vpp=vpp)
        assert found.seconds.shape == (0,)


@settings(deadline=None, max_examples=300)
@given(sizes())
def test_what_is_in_flight_is_what_the_simulation_holds(drawn: tuple[Schedule, int, int, int]) -> None:
    schedule, pp, vpp, microbatches = drawn
    ones = np.ones(pp * vpp)
    timeline = Pipeline(
        schedule=schedule, pp=pp, vpp=vpp, microbatches=microbatches, forward=ones, backward=2 * ones, weight=ones,
        hop_seconds=0.0,
    ).timeline()  # fmt: skip
    assert in_flight(*drawn).tolist() == timeline.in_flight.tolist()


@settings(deadline=None, max_examples=300)
@given(sizes(), st.floats(0.0, 1.5), st.sampled_from([1.0, 0.25]))
def test_a_rank_holds_most_at_one_of_the_fullest_moments(
    drawn: tuple[Schedule, int, int, int], gradients: float, last: float
) -> None:
    """A stage keeps 1 of a microbatch until it is done, and gradients from its input part to its weight part.

    The very last stage may keep less. The first one hands nothing back.
    """
    schedule, pp, vpp, microbatches = drawn
    stages = rank_stages(schedule, pp, vpp)
    size = np.ones(pp * vpp)
    size[-1] = last if schedule == "zb" else 1.0
    left = gradients * size * (np.arange(pp * vpp) > 0)
    moments = fullest_moments(*drawn)
    for rank, order in enumerate(orders(*drawn)):
        held = most = 0.0
        for kind, stage, _ in order:
            held += {"F": size[stage], "B": -size[stage], "I": left[stage], "W": -size[stage] - left[stage]}[kind]
            most = max(most, held)
        own, later = size[list(stages[rank])], left[list(stages[rank])]
        found = [moment.of_rank(rank) for moment in moments]
        sums = [(of.kept + of.unfinished) @ own + of.gradients @ later for of in found]
        assert max(sums) >= most - 1e-9
        if schedule != "zbv" or microbatches >= 2 * pp - 1:
            assert max(sums) == pytest.approx(most)


def test_known_microbatches_in_flight() -> None:
    assert in_flight("gpipe", 4, 1, 9).tolist() == [[9]] * 4
    assert in_flight("1f1b", 4, 1, 9).tolist() == [[4], [3], [2], [1]]
    # 1 + (p − 1) / (p · v) of one-stage memory on the first rank, in chunks: (v − 1) p + 2 (p − 1) + 1
    assert in_flight("interleaved", 4, 2, 8).sum(axis=1).tolist() == [11, 9, 7, 5]
    assert in_flight("interleaved", 4, 2, 8)[0].tolist() == [7, 4]
    assert in_flight("zb", 4, 2, 8).sum(axis=1).tolist() == [8, 7, 6, 5]
    assert [moment.unfinished.tolist() for moment in fullest_moments("zb", 4, 2, 8)] == [
        [[0, 0], [0, 1], [0, 2], [0, 3]],
        [[0, 0], [1, 0], [2, 0], [3, 0]],
    ]
    assert in_flight("zbv", 4, 2, 8).tolist() == [[7, 1], [6, 2], [5, 3], [4, 4]]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"forward": np.ones(3)}, "forward"),
        ({"backward": np.float64(1.0)}, "backward"),
        ({"weight": np.ones(2)}, "weight"),
        ({"microbatches": [4, 0]}, "microbatches"),
        ({"vpp": 3, "forward": np.ones(6), "backward": np.ones(6), "weight": None}, "vpp"),
        ({"hop_seconds": np.zeros(2)}, "hop_seconds"),
    ],
)
def test_wrong_input_is_named(changes: dict[str, Any], key: str) -> None:
    right = {"forward": np.ones(4), "backward": np.ones(4), "weight": np.zeros(4), "microbatches": 4, "pp": 2}
    with pytest.raises(PlannerError) as caught:
        flush("zbv", **(right | {"vpp": 2} | changes))
    assert caught.value.key == key
