"""Statistics of predictions, each worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.report.accuracy import errors, judge, noise, rank_correlation, regret
from planner.spec.estimate import Estimate
from planner.spec.runs_predicted import Prediction, left_out_errors, predicted, remembered
from tests.report.made_up_runs import made_up_estimate, made_up_prediction, made_up_run


def test_errors_are_relative_to_what_was_measured() -> None:
    found = errors([0.1, -0.3, 0.2, None])
    assert found is not None
    assert found.rows == 3
    assert found.mape == pytest.approx(0.2)
    assert found.bias == pytest.approx(0.0)
    assert found.median == pytest.approx(0.2)
    assert found.p90 == pytest.approx(0.28)  # between .2 and .3, at nine tenths of the way along three points
    assert errors([None]) is None


def test_ranks() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # ranks 1 2 3 4 against 1 2.5 2.5 4: 4.5 / sqrt(5 · 4.5)
    assert rank_correlation([1, 2, 3, 4], [1, 2, 2, 3]) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 2, 3], [5, 5, 5]) is None


@given(st.lists(st.floats(0.1, 1e3), min_size=3, max_size=20, unique=True))
def test_ranks_do_not_change_with_the_scale(values: list[float]) -> None:
    assert rank_correlation(values, [value**3 for value in values]) == pytest.approx(1.0)


def test_noise_is_how_far_repeats_lie_from_their_mean() -> None:
    runs = [made_up_run(seconds=0.9), made_up_run(seconds=1.1, software="newer"), made_up_run(seconds=5.0, tp=2)]
    found = noise(runs)
    assert found is not None
    assert (found.rows, found.configurations) == (2, 1)
    assert found.mean == pytest.approx(0.1)
    assert noise(runs[1:]) is None


def test_regret_is_what_the_layout_that_we_pick_costs() -> None:
    rows = [
        made_up_prediction(made_up_run(seconds=1.0, tp=1), 1.3),
        made_up_prediction(made_up_run(seconds=1.2, tp=2), 1.1),  # picked: 20 % slower than the best
        made_up_prediction(made_up_run(seconds=3.0, tp=4), 3.0),
        made_up_prediction(made_up_run(seconds=2.0, tp=1, model="n"), 2.0),  # picked, and the best
        made_up_prediction(made_up_run(seconds=2.5, tp=2, model="n"), 2.5),
        made_up_prediction(made_up_run(seconds=7.0, model="alone"), 1.0),
    ]
    found = regret(rows)
    assert found is not None
    assert (found.groups, found.best_picked) == (2, 1)
    assert found.mean == pytest.approx(0.1)
    assert found.worst == pytest.approx(0.2)


def test_repeats_and_other_software_are_no_other_layouts() -> None:
    rows = [made_up_prediction(made_up_run(seconds=1.0)), made_up_prediction(made_up_run(seconds=2.0))]
    assert regret(rows) is None
    rows = [made_up_prediction(made_up_run(seconds=1.0)),
            made_up_prediction(made_up_run(seconds=2.0, tp=2, software="newer"))]  # fmt: skip
    assert regret(rows) is None


@pytest.mark.parametrize(
    ("counts", "measured", "error"), [("allocated", 10e9, 0.0), ("reserved", 10e9, 0.1), ("device", 10e9, 0.2)]
)
def test_memory_is_compared_with_what_it_counts(counts: str, measured: float, error: float) -> None:
    row = made_up_prediction(made_up_run(seconds=None, memory=(measured, counts)))  # type: ignore[arg-type]
    assert row.memory_error == pytest.approx(error)
    assert row.time_error is None
    assert row.memory_below


def test_the_upper_end_of_memory_is_the_devices_and_leaves_what_is_counted_the_same_margin() -> None:
    # 10 GB allocated, 12 GB on the device, its interval ends at 13.2: a margin of 1.2
    assert made_up_prediction(made_up_run(memory=(11.1e9, "allocated"))).memory_below
    assert not made_up_prediction(made_up_run(memory=(11.3e9, "allocated"))).memory_below


def test_the_share_of_communication() -> None:
    assert made_up_prediction(made_up_run(), 2.0, waits=0.5).communication_share == pytest.approx(0.25)
    assert Prediction(run=made_up_run()).communication_share == 0.0


def test_sources_weigh_equally_and_doubtful_rows_stand_apart() -> None:
    rows = [made_up_prediction(made_up_run(source="big"), 1.1) for _ in range(9)]
    rows += [made_up_prediction(made_up_run(source="small"), 1.3)]
    rows += [made_up_prediction(made_up_run(source="big", trust="C"), 9.0)]
    rows += [Prediction(run=made_up_run(source="small", excluded="no time"))]
    rows += [Prediction(run=made_up_run(source="small"), reason="no such precision")]
    found = judge(["runs.csv"], rows, {"small": 0.4})
    assert found.macro_mape == pytest.approx(0.2), "neither has ten rows"
    assert [source.source for source in found.sources] == ["big", "small"]
    small = found.sources[1]
    assert (small.runs, small.excluded, small.not_predicted, small.left_out) == (3, 1, 1, 0.4)
    assert found.macro_left_out == 0.4
    assert found.macro_beside_left_out == pytest.approx(0.3)
    assert found.inside is not None
    assert (found.inside.rows, found.inside.share) == (10, pytest.approx(0.9))
    (apart,) = found.doubtful
    assert apart.time is not None
    assert apart.time.mape == pytest.approx(8.0)
    assert found.excluded_by_reason() == {("small", "no time"): 1}
    assert found.not_predicted_by_reason() == {("small", "no such precision"): 1}
    assert found.confidence == 0.8
    shares = [source.inside.share for source in found.sources if source.inside]
    assert shares == [1.0, 0.0], "1.0 lies inside .99 to 1.21 and outside 1.17 to 1.43"


def test_a_source_of_a_few_rows_stands_apart_beside_one_of_many() -> None:
    rows = [made_up_prediction(made_up_run(source="many", memory=(10e9, "device")), 1.1) for _ in range(10)]
    rows += [made_up_prediction(made_up_run(source="few", memory=(20e9, "device")), 1.5) for _ in range(9)]
    found = judge([], rows)
    assert [source.source for source in found.averaged] == ["many"]
    assert found.macro_mape == pytest.approx(0.1)
    assert found.macro_memory_mape == pytest.approx(0.2), "12 GB of 10"
    more = judge([], [*rows, made_up_prediction(made_up_run(source="few"), 1.5)])
    assert more.macro_mape == pytest.approx(0.3)
    assert [source.source for source in more.memory_averaged] == ["many"], "the tenth has no memory"


def test_small_peaks_are_counted_and_not_judged() -> None:
    rows = [made_up_prediction(made_up_run(memory=(size, "device"))) for size in (1.9e9, 2e9, 10e9)]
    found = judge([], rows)
    (source,) = found.sources
    assert source.memory is not None
    assert (source.memory.rows, source.memory_small) == (2, 1)
    assert (found.memory_below, found.memory_small) == (source.memory_below, 1)
    (tiny,) = judge([], rows[:1]).sources
    assert tiny.memory is None


def test_nothing_judged_is_an_answer() -> None:
    found = judge(["runs.csv"], [Prediction(run=made_up_run(excluded="no time"))])
    assert (found.macro_mape, found.macro_memory_mape, found.confidence) == (None, None, None)
    json.dumps(found.to_dict(rows=True), allow_nan=False)


def test_plain_data_has_every_row_where_asked() -> None:
    rows = [
        made_up_prediction(made_up_run("a", memory=(10e9, "device")), 1.05),
        Prediction(run=made_up_run("b", excluded="no time")),
        Prediction(run=made_up_run("c"), reason="no"),
    ]
    data = judge(["runs.csv"], rows).to_dict(rows=True)
    assert "rows" not in judge(["runs.csv"], rows).to_dict()
    first, second, third = json.loads(json.dumps(data, allow_nan=False))["rows"]
    assert first["time_error"] == pytest.approx(0.05)
    assert first["inside_interval"] is True
    assert first["memory_counts"] == "device"
    assert second["excluded"] == "no time"
    assert third["not_predicted"] == "no"


@pytest.mark.parametrize("wrong", [{}, {"theirs": 0.1}, {"ours": -0.1}, {"ours": "8 %"}, {"ours": True},
                                   {"ours": float("nan")}, {"ours": float("inf")}])  # fmt: skip
def test_errors_of_left_out_sources_are_shares_of_known_sources(wrong: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="left-out source") as given:
        left_out_errors(wrong, ["ours"])
    assert given.value.remedy
    file = tmp_path / "left_out.json"
    file.write_text(json.dumps(wrong))
    with pytest.raises(PlannerError) as read:
        left_out_errors(file, ["ours"])
    assert read.value.where.startswith(str(file))


def test_errors_of_left_out_sources_are_read(tmp_path: Path) -> None:
    file = tmp_path / "left_out.json"
    file.write_text('{"ours": 0.08, "not in this table": 1}\n')
    assert left_out_errors(file, ["ours"]) == {"ours": 0.08, "not in this table": 1.0}
    assert left_out_errors({"ours": 0}, ["ours"]) == {"ours": 0.0}
    file.write_text("[1, 2]")
    with pytest.raises(PlannerError, match="shares by source"):
        left_out_errors(file, ["ours"])


def test_a_refused_estimate_is_counted_with_its_reason() -> None:
    def refuse(**_: object) -> Estimate:
        raise PlannerError("the profile says nothing about fp8", value="fp8", remedy="use bf16", key="gemm.fp8")

    row = predicted(made_up_run(), refuse)
    assert row.estimate is None
    assert row.reason == "the profile says nothing about fp8 (gemm.fp8: fp8)"
    assert predicted(made_up_run(excluded="no time"), refuse).reason == "", "not even asked"


def test_repeats_are_estimated_once() -> None:
    asked: list[object] = []

    def estimate(**given: object) -> Estimate:
        asked.append(given["strategy"])
        return made_up_estimate()

    ask = remembered(estimate)
    for run in (made_up_run("a"), made_up_run("b", seconds=2.0), made_up_run("c", tp=2)):
        assert predicted(run, ask).estimate is not None
    assert asked == [{"tp": 1, "dp": 8}, {"tp": 2, "dp": 4}]


def test_what_does_not_fit_without_recompute_must_have_recomputed() -> None:
    asked = []

    def estimate(**given: object) -> Estimate:
        strategy = dict(given["strategy"])  # type: ignore[call-overload]
        asked.append(strategy.get("recompute", "none"))
        return made_up_estimate(2.0 if asked[-1] == "auto" else 1.0, capacity=1e9)

    run = made_up_run()
    assert predicted(run, estimate).step_seconds == 1.0
    assert predicted(replace(run, assumed=("recompute",)), estimate).step_seconds == 2.0
    assert asked == ["none", "none", "auto"]
