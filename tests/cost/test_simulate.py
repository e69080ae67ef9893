"""The orders are those that torch runs, and the simulation plays them by their rules."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from planner.cost.simulate import simulate
from planner.errors import PlannerError
from planner.spec.orders import Action, orders, rank_stages
from planner.spec.strategy import Schedule
from tests.cost.pipelines import SCHEDULES, Pipeline, pipelines, sizes


def torch_orders(schedule: Schedule, pp: int, vpp: int, microbatches: int) -> list[list[tuple[str, int, int]]]:
    """The compute actions of torch's own schedule."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    nn = pytest.importorskip("torch.nn")
    classes = {
        "gpipe": schedules.ScheduleGPipe,
        "1f1b": schedules.Schedule1F1B,
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zb": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
    }
    stages = [
        SimpleNamespace(
            stage_index=stage, group_rank=0, group_size=pp, num_stages=pp * vpp, group=None, device="cpu",
            is_first=stage == 0, is_last=stage == pp * vpp - 1, has_backward=True, submod=nn.Module(),
            stage_index_to_group_rank=None,
        )
        for stage in rank_stages(schedule, pp, vpp)[0]
    ]  # fmt: skip
    single = schedule in ("gpipe", "1f1b")
    made = classes[schedule](stages[0] if single else stages, microbatches)
    listed = made._get_pipeline_order() if single else made.pipeline_order
    kinds = schedules._ComputationType
    names = {kinds.FORWARD: "F", kinds.FULL_BACKWARD: "B", kinds.BACKWARD_INPUT: "I", kinds.BACKWARD_WEIGHT: "W"}
    return [
        [(names[item[1]], item[0], item[2]) for item in listed[rank] if item is not None and item[1] in names]
        for rank in range(pp)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_the_orders_are_those_of_torch(schedule: Schedule, pp: int) -> None:
    for vpp in {"gpipe": (1,), "1f1b": (1,), "zbv": (2,)}.get(schedule, (2, 3, 4)):
        for microbatches in (1, 2, 3, 4, 5, 7, 8, 10, 12, 16, 17, 24, 32):
            if schedule == "1f1b" and microbatches < pp:
                continue
            if schedule in ("interleaved", "zb") and microbatches % max(1, microbatches // pp):
                continue
            theirs = torch_orders(schedule, pp, vpp, microbatches)
            ours = [[tuple(action) for action in rank] for rank in orders(schedule, pp, vpp, microbatches)]
            if schedule == "1f1b":
                # torch runs the last rank's microbatches from 0 on, and lists them from 1 on
                theirs[-1] = [(kind, stage, number - (kind == "F")) for kind, stage, number in theirs[-1]]
            assert ours == theirs, (vpp, microbatches)


@settings(deadline=None)
@given(sizes())
def test_every_rank_runs_each_of_its_actions_once(drawn: tuple[Schedule, int, int, int]) -> None:
    schedule, pp, vpp, microbatches = drawn
    kinds = "FIW" if schedule in ("zb", "zbv") else "FB"
    for order, stages in zip(orders(*drawn), rank_stages(schedule, pp, vpp), strict=True):
        every = [(kind, stage, number) for kind in kinds for stage in stages for number in range(microbatches)]
        assert sorted(order) == sorted(every)


@settings(deadline=None)
@given(pipelines())
def test_a_timeline_keeps_the_rules(pipeline: Pipeline) -> None:
    for blocking in (False, True):
        timeline = pipeline.timeline(blocking_sends=blocking)
        ends = {event[1:4]: event.end_seconds for events in timeline.ranks for event in events}
        for events in timeline.ranks:
            for before, after in itertools.pairwise(events):
                assert before.start_seconds <= before.end_seconds <= after.start_seconds
            for event in events:
                if event.kind == "F" and event.stage:
                    assert event.start_seconds >= ends["F", event.stage - 1, event.microbatch]
        work = (pipeline.forward + pipeline.backward) * pipeline.microbatches
        stages = rank_stages(pipeline.schedule, pipeline.pp, pipeline.vpp)
        assert timeline.busy_seconds == pytest.approx([work[list(held)].sum() for held in stages])
        assert np.all(timeline.bubble_seconds >= -1e-9 * timeline.seconds)
    assert timeline.seconds >= pipeline.timeline().seconds * (1 - 1e-12)


def test_two_ranks_by_hand() -> None:
    order = orders("1f1b", 2, 1, 2)
    timeline = simulate(order, [1, 1], [2, 2], hop_seconds=0.5)
    first = [(event.kind, event.start_seconds, event.end_seconds) for event in timeline.ranks[0]]
    assert first == [
        ("F", 0, 1), ("F", 1, 2), ("receive", 4.5, 5), ("B", 5, 7), ("receive", 7.5, 8), ("B", 8, 10),
    ]  # fmt: skip
    assert timeline.seconds == 10
    assert timeline.communication_seconds.tolist() == [1, 0.5]
    assert timeline.bubble_seconds.tolist() == [3, 3.5]

    blocking = simulate(order, [1, 1], [2, 2], hop_seconds=0.5, blocking_sends=True)
    second = [(event.kind, event.start_seconds, event.end_seconds) for event in blocking.ranks[1]]
    assert second == [
        ("receive", 1, 1.5), ("F", 1.5, 2.5), ("B", 2.5, 4.5), ("send", 4.5, 5), ("F", 5, 6), ("B", 6, 8),
        ("send", 8, 8.5),
    ]  # fmt: skip
    assert blocking.seconds == 10.5


def test_gpipe_of_eight_and_eight_idles_seven_fifteenths() -> None:
    timeline = simulate(orders("gpipe", 8, 1, 8), [1.0] * 8, [2.0] * 8)
    assert timeline.bubble_seconds / timeline.seconds == pytest.approx([7 / 15] * 8)


@pytest.mark.parametrize(("vpp", "microbatches"), [(2, 8), (2, 32), (4, 16)])
def test_interleaving_divides_the_bubble(vpp: int, microbatches: int) -> None:
    timeline = simulate(orders("interleaved", 8, vpp, microbatches), [1.0] * 8 * vpp, [2.0] * 8 * vpp)
    assert timeline.bubble_seconds / timeline.busy_seconds == pytest.approx([7 / (vpp * microbatches)] * 8)


def test_too_few_microbatches_leave_places_of_a_round_empty() -> None:
    full, short = (
        simulate(orders("interleaved", 4, 3, count), [1.0] * 12, [1.0] * 12).bubble_seconds.min()
        for count in (4, 3)
    )
    assert short == full + (3 - 1) * (4 - 3) * 2.0


@pytest.mark.parametrize("microbatches", [8, 16, 31])
def test_weight_parts_fill_the_bubble(microbatches: int) -> None:
    timeline = simulate(orders("zb", 8, 1, microbatches), [3.0] * 8, [7.0] * 8, [2.0] * 8)
    assert timeline.bubble_seconds.min() == pytest.approx(7 * (3.0 + 5.0 - 2.0))


def test_the_v_shape_leaves_no_bubble_but_filling_and_draining() -> None:
    timeline = simulate(orders("zbv", 4, 2, 12), [1.0] * 8, [2.0] * 8, [1.0] * 8)
    assert timeline.bubble_seconds == pytest.approx([3.0] * 4)


def test_every_action_of_sixteen_ranks_is_on_the_timeline() -> None:
    timeline = simulate(orders("interleaved", 16, 4, 128), [1.0] * 64, [2.0] * 64, hop_seconds=0.1)
    assert sum(len(events) for events in timeline.ranks) >= 2 * 64 * 128


@pytest.mark.parametrize(
    ("times", "key"),
    [
        ({"forward": [1.0]}, "forward"),
        ({"backward": [1.0] * 3}, "backward"),
        ({"weight": [1.0]}, "weight"),
        ({"hop_seconds": [0.1, 0.2]}, "hop_seconds"),
    ],
)
def test_wrong_lengths_are_named(times: dict[str, Any], key: str) -> None:
    with pytest.raises(PlannerError) as caught:
        simulate(orders("1f1b", 2, 1, 2), **({"forward": [1.0, 1.0], "backward": [2.0, 2.0]} | times))
    assert caught.value.key == key


def test_ranks_that_wait_for_each_other_are_an_error() -> None:
    stuck = ((Action("B", 0, 0), Action("F", 0, 0)), (Action("F", 1, 0), Action("B", 1, 0)))
    with pytest.raises(PlannerError, match="every action"):
        simulate(stuck, [1.0, 1.0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("schedule", "pp", "vpp", "microbatches", "key"),
    [("1f1b", 4, 2, 8, "vpp"), ("zbv", 4, 3, 8, "vpp"), ("zb", 0, 2, 8, "pp"), ("gpipe", 4, 1, 0, "microbatches")],
)
def test_sizes_that_a_schedule_cannot_have(
    schedule: Schedule, pp: int, vpp: int, microbatches: int, key: str
) -> None:
    with pytest.raises(PlannerError) as caught:
        orders(schedule, pp, vpp, microbatches)
    assert caught.value.key == key
