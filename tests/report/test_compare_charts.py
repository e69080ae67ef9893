"""What is drawn: parts that add up, capacity where it belongs, and pipelines with their idle time."""

from __future__ import annotations

import pytest

from planner.report.compare_charts import (
    COLOURS,
    Row,
    kind_name,
    memory_chart,
    pipeline_charts,
    sections,
    step_chart,
)
from planner.report.compare_verdict import side_by_side
from planner.spec.estimate import Memory, StepTime
from tests.report.plans import made_up_plan, pipeline

PLANS = (
    made_up_plan({"matmul": 6.0, "tp": 2.0}, strategy={"pp": 4}),
    made_up_plan({"matmul": 8.0, "bubble": 8.0}, gib=100.0, strategy={"pp": 2}),
)
ENTRIES = side_by_side(PLANS, timelines=[pipeline(4, 8), pipeline(2, 4, hop=0.5)])


def drawn(row: Row, kind: str) -> float:
    return sum(piece.end - piece.start for piece in row.pieces if piece.kind == kind)


def test_bars_of_the_step_share_a_scale() -> None:
    first, second = step_chart(ENTRIES).rows
    assert [(piece.kind, piece.start, piece.end) for piece in first.pieces] == [
        ("matmul", 0.0, 6 / 16), ("tp", 6 / 16, 0.5),
    ]  # fmt: skip
    assert second.pieces[-1].end == pytest.approx(1.0)
    assert second.pieces[-1].title == "bubble: 8.00 s, 50 %"
    assert (first.value, second.value) == ("8.0 s", "16.0 s, does not fit")


def test_memory_stands_against_the_device() -> None:
    fits, over = map(memory_chart, ENTRIES)
    assert [row.value for row in fits.rows] == ["40.0", "40.0", "40.0", "20.0"]
    assert fits.mark is not None
    assert drawn(fits.rows[0], "weights") / fits.mark[0] == pytest.approx(40 / 80)
    assert fits.note == "40.0 of 80.0 GiB on stage 0, up to 44.0; fits"
    assert over.mark is not None
    assert over.mark[0] == pytest.approx(80 / 102)
    assert drawn(over.rows[0], "weights") == pytest.approx(1 / 1.02), "and nothing is cut off"
    assert over.note.endswith("does not fit: up to 30.0 GiB too much")


def test_idle_time_is_what_the_pipeline_leaves() -> None:
    first, second = pipeline_charts(ENTRIES)
    ranks = pipeline(4, 8)["ranks"]
    for row, rank in zip(first.rows, ranks, strict=True):
        assert row.pieces[0].kind == "idle"
        idle = drawn(row, "idle") - drawn(row, "forward") - drawn(row, "backward") - drawn(row, "message")
        assert idle == pytest.approx(rank["bubble_seconds"] / 33.0, abs=1e-3)
    assert first.note == "1f1b, 33.0 s; idle 27.3 % on average"  # 3 (pp - 1) of 3 (microbatches + pp - 1)
    assert first.rows[0].value == "27 %"
    assert drawn(second.rows[1], "message") > 0
    assert second.scale == first.scale == "33.0 s", "plans of the same work share a scale"


def test_pipelines_of_different_work_have_their_own_scales() -> None:
    other = made_up_plan(model="other", strategy={"pp": 2})
    first, second = pipeline_charts(side_by_side([PLANS[0], other], timelines=[pipeline(4, 8), pipeline(2, 4)]))
    assert (first.scale, second.scale) == ("33.0 s", "15.0 s")
    assert second.rows[0].pieces[0].end == 1.0


def test_backward_in_two_parts_is_told_apart() -> None:
    plan = made_up_plan(strategy={"pp": 2, "schedule": "zb"})
    (chart,) = pipeline_charts(side_by_side([plan], timelines=[pipeline(2, 4, schedule="zb")]))
    assert chart.kinds == ("forward", "backward", "weight_gradients", "idle")


@pytest.mark.parametrize(("microbatches", "most"), [(500, 500), (3000, 500), (3000, 5000)])
def test_many_events_are_drawn_coarsely_and_idle_stays(microbatches: int, most: int) -> None:
    plan = made_up_plan(strategy={"pp": 8})
    timeline = pipeline(8, microbatches, hop=0.01)
    entries = side_by_side([plan] * 3, timelines=[timeline] * 3)
    charts = pipeline_charts(entries, most_pieces=most)
    assert sum(len(row.pieces) for chart in charts for row in chart.rows) <= most
    assert charts[0].note.endswith("too fine to tell forward from backward")
    for row, rank in zip(charts[0].rows, timeline["ranks"], strict=True):
        computing = rank["busy_seconds"] / timeline["seconds"]
        assert drawn(row, "computing") == pytest.approx(computing, abs=0.02)


def test_a_few_events_are_drawn_one_by_one() -> None:
    timeline = pipeline(8, 100)
    (chart,) = pipeline_charts(side_by_side([made_up_plan(strategy={"pp": 8})], timelines=[timeline]))
    for row in chart.rows:
        assert sum(piece.kind == "forward" for piece in row.pieces) == 100
        assert sum(piece.kind == "backward" for piece in row.pieces) == 100


def test_sections_without_content_are_left_out() -> None:
    assert [part.anchor for part in sections(ENTRIES)] == ["time", "memory", "pipeline"]
    assert [part.anchor for part in sections(side_by_side(PLANS))] == ["time", "memory"]
    alone = side_by_side([made_up_plan()], timelines=[pipeline(1, 4)])
    assert [part.anchor for part in sections(alone)] == ["time", "memory"], "one stage is no pipeline"


def test_every_part_has_a_colour_and_a_name() -> None:
    time = {key.removesuffix("_seconds") for key in StepTime().parts}
    plan = made_up_plan(dict.fromkeys(time, 1.0))
    chart = step_chart(side_by_side([plan]))
    assert len(chart.rows[0].pieces) == len(time)
    assert set(chart.kinds) == time
    memory = Memory(**dict.fromkeys(Memory().parts, 1e9))
    whole = made_up_plan(gib=12e9 / 2**30)
    object.__setattr__(whole.estimate, "memory_per_stage", (memory,))
    assert len(memory_chart(side_by_side([whole])[0]).kinds) == len(memory.parts)
    assert len({kind_name(kind) for kind in chart.kinds}) == len(time)
    assert all(len(pair) == 2 and pair[0].startswith("#") for pair in COLOURS.values())
