"""Which plan is the fastest: the verdict, what qualifies it, names, and the file that is written."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.report.compare import comparison_data, show_comparison, side_by_side, write_comparison
from planner.report.compare_verdict import LONGEST_NAME, Compared, shortened, unbroken, verdict
from planner.spec.estimate import StepTime
from planner.spec.plan import Plan
from tests.report.plans import made_up_plan, proof
from tests.report.test_estimate import Screen

FAST = made_up_plan({"matmul": 8.0, "tp": 1.0}, strategy={"tp": 4})
SLOW = made_up_plan({"matmul": 8.0, "bubble": 3.0, "tp": 0.5}, strategy={"pp": 4})


def compared(*plans: Plan) -> tuple[Compared, ...]:
    return side_by_side(plans)


def test_the_faster_plan_and_what_makes_it_so() -> None:
    found = verdict(compared(SLOW, FAST))
    assert found.answer == "B is 1.28x faster than A: 3.0 s less bubble, 0.5 s more tp exposed."
    assert found.best == 1
    assert found.notes == ()


def test_parts_that_hardly_matter_are_not_named() -> None:
    slow = made_up_plan({"matmul": 8.2, "bubble": 3.0, "tp": 1.0})
    assert verdict(compared(FAST, slow)).answer == "A is 1.36x faster than B: 3.0 s less bubble."


def test_of_many_the_fastest_and_the_next() -> None:
    slowest = made_up_plan({"matmul": 20.0})
    assert verdict(compared(slowest, SLOW, FAST)).answer.startswith("C is the fastest of 3, 1.28x faster than B: ")


def test_equal_plans() -> None:
    same = made_up_plan({"matmul": 8.01, "tp": 1.0})
    assert verdict(compared(FAST, same)).answer.startswith("The two plans are equally fast within 0.5 %: 9.00 s a")
    assert verdict(compared(FAST, same, SLOW)).answer.startswith("Of 3 plans A and B are equally fast")


def test_a_difference_within_the_interval_is_called_so() -> None:
    close = made_up_plan({"matmul": 8.5, "tp": 1.0})
    assert verdict(compared(FAST, close)).notes == (
        "The difference is smaller than the interval of the estimate, ±10 %.",
    )


def test_what_does_not_fit_never_wins() -> None:
    huge = made_up_plan({"matmul": 1.0}, gib=100.0)
    found = verdict(compared(huge, FAST, SLOW))
    assert found.answer.startswith("B is the fastest of 3, 1.28x faster than C")
    assert found.notes == ("A is 9.00x faster, but up to 30.0 GiB too large for its GPUs.",)
    alone = verdict(compared(huge, FAST))
    assert alone.answer == "Only B fits: 9.00 s a step ±10 %, 40.0 of 80.0 GiB."
    assert alone.best == 1
    slow = verdict(compared(made_up_plan({"matmul": 90.0}, gib=100.0), FAST))
    assert slow.notes == ("A is left out: up to 30.0 GiB too large for its GPUs.",)


def test_where_nothing_fits_the_closest_is_named() -> None:
    found = verdict(compared(made_up_plan(gib=100.0), made_up_plan(gib=90.0)))
    assert found.answer == "No plan fits: B comes closest, 19.0 GiB too much."
    assert found.best is None


def test_different_models_have_no_faster_plan() -> None:
    other = made_up_plan({"matmul": 1.0}, model="other")
    found = verdict(compared(FAST, other))
    assert found.answer == "No plan is called faster: the plans are of different models (m, other)."
    assert found.notes == ("The highest MFU has B, 80.0 %.",)
    assert found.best is None
    renamed = replace(FAST, digests=replace(FAST.digests, model="f" * 64))
    assert "one name, other contents" in verdict(compared(FAST, renamed)).answer


def test_different_work_has_no_faster_plan() -> None:
    other = made_up_plan({"matmul": 1.0}, workload={"seq_len": 2048, "precision": "fp8"})
    answer = verdict(compared(FAST, other)).answer
    assert answer.endswith("different work (seq len 1,024, 2,048; precision bf16, fp8).")


def test_more_gpus_are_said_and_weighed() -> None:
    more = made_up_plan({"matmul": 3.0}, gpus=16)
    more = replace(more, estimate=replace(more.estimate, tokens_per_second_per_gpu=50.0))
    found = verdict(compared(FAST, more))
    assert found.answer.startswith("B is 3.00x faster than A on 16 GPUs against 8: ")
    assert found.notes == ("The most tokens/s/GPU has A, 111 on 8 GPUs.",)


def test_one_plan_is_described() -> None:
    assert verdict(compared(FAST)).answer == (
        "A: 9.00 s a step ±10 %, 111 tokens/s/GPU, MFU 8.9 %; 40.0 of 80.0 GiB, fits."
    )
    assert verdict(compared(made_up_plan(gib=100.0))).answer.endswith("does not fit, up to 30.0 GiB too much.")


def test_an_edited_plan_is_marked() -> None:
    edited = replace(FAST, recompute={"blocks.0-7": "full"})
    assert edited.edited
    assert verdict(compared(edited, SLOW)).notes[-1].startswith("A was edited since it was made")


def test_a_step_of_no_time_breaks_nothing(tmp_path: Path) -> None:
    never = replace(FAST, estimate=replace(FAST.estimate, breakdown=StepTime()))
    huge = replace(never, estimate=replace(never.estimate, capacity_bytes=1.0))
    for plans in ((never, SLOW), (never, never), (never, huge, SLOW), (huge, FAST), (never,)):
        entries = compared(*plans)
        assert "nan" not in verdict(entries).answer
        write_comparison(entries, tmp_path / "out.html")
        write_comparison(entries, tmp_path / "out.png")


def test_names_stay_apart() -> None:
    long = ["a" * 100 + middle + "b" * 99 for middle in "xy"]
    found = side_by_side([FAST] * 5, ["plan", "plan", *long, "new\nline"])
    assert [entry.name for entry in found] == ["plan", "plan (2)", *long, "new�line"]
    assert len({entry.short for entry in found}) == 5
    assert all(len(entry.short) <= LONGEST_NAME + 4 for entry in found)
    assert shortened("abcdefghij", 7) == "abc…hij"
    assert side_by_side([FAST] * 28)[27].name == "AB"


def test_what_is_given_must_match() -> None:
    with pytest.raises(PlannerError, match="names for each of the 2 plans"):
        side_by_side([FAST, SLOW], ["one"])
    with pytest.raises(PlannerError, match="timelines for each of the 2 plans"):
        side_by_side([FAST, SLOW], timelines=[None])
    with pytest.raises(PlannerError, match="at least one plan"):
        side_by_side([])


def test_numbers_stay_with_their_units() -> None:
    assert unbroken("1.5 s less, 20 % of 3 GiB, 4 stages") == "1.5\xa0s less, 20\xa0% of 3\xa0GiB, 4 stages"


def test_the_ending_says_what_is_written(tmp_path: Path) -> None:
    entries = compared(FAST, SLOW)
    write_comparison(entries, tmp_path / "out.HTML")
    write_comparison(entries, tmp_path / "out.png")
    assert (tmp_path / "out.HTML").read_text().startswith("<!doctype html>")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PlannerError, match="a page or a picture") as caught:
        write_comparison(entries, tmp_path / "out.pdf")
    assert caught.value.key == "output"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.HTML", "out.png"]


def test_the_data(tmp_path: Path) -> None:
    data = comparison_data(compared(FAST, SLOW))
    assert data["best"] == "A"
    assert {"group": "layout", "name": "pp", "values": ["1", "4"]} in data["differences"]
    assert data["plans"][1]["estimate"]["step_seconds"] == pytest.approx(11.5)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    names = ["x" * 200, *map(str, range(11))]
    proven = made_up_plan({"matmul": 2.0}, certificate=proof(), strategy={"tp": 8, "sp": True, "zero": 1})
    with monkeypatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys, "stdout", screen)
        show_comparison(side_by_side([proven, FAST, SLOW, *[SLOW] * 9], names))
    lines = screen.getvalue().splitlines()
    assert lines[0].startswith("xxxxxxxxxxxxx…xxxxxxxxxxxx is the fastest of 12, 4.50x")
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("10  ") for line in lines) == 1
    (row,) = [line.split() for line in lines if line.startswith("0  ")]
    assert "9.0" in row
    assert "4.50" in row
    assert ("tp4" in row) == (width > 60)
