"""A run beside its plan: parts that both know, memory where it means the same, other layouts refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner.errors import PlannerError
from planner.report.run_comparison import show_run_comparison
from planner.spec.measured import RankMemory
from planner.spec.run_comparison import compare_run
from planner.units import GIB
from tests.report.plans import made_up_plan
from tests.spec.test_measured import RUN

PLAN = made_up_plan(
    model="gpt2", step={"matmul": 1.5, "dp": 0.25, "bubble": 1e-18}, gib=40.0, strategy={"dp": 2}, gpus=2
)
MEASURED = replace(
    RUN,
    layout=PLAN.layout_digest,
    backend="nccl",
    parts={"dp": 0.5, "data": 0.125},
    memory=(RankMemory(rank=1, stage=0, allocated_bytes=40 * GIB, reserved_bytes=50 * GIB),),
)


def test_time_and_memory_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare_run(PLAN, MEASURED)
    assert (found.predicted_seconds, found.measured_seconds) == (1.75, 2.0)
    assert not found.within  # the made-up interval is a tenth to each side
    parts = {part.part: (part.predicted_seconds, part.measured_seconds) for part in found.parts}
    assert parts == {"matmul": (1.5, None), "dp": (0.25, 0.5), "data": (0.0, 0.125)}
    assert found.memory[0].ratio == pytest.approx(1.25)
    assert found.to_dict()["ratio"] == pytest.approx(8 / 7)
    show_run_comparison(found)
    out = capsys.readouterr().out
    assert out.startswith("The step is 14 % slower than the plan predicts: 2.00 s ± ")
    assert "outside the prediction's interval" in out
    assert "+250 ms" in out
    assert "+25 %" in out
    assert max(map(len, out.splitlines())) <= 120


def test_memory_of_a_process_on_a_cpu_is_another_thing(capsys: pytest.CaptureFixture[str]) -> None:
    show_run_comparison(compare_run(PLAN, replace(MEASURED, backend="gloo", each_seconds=(1.75, 1.75))))
    out = capsys.readouterr().out
    assert out.startswith("The step takes what the plan predicts: 1.75 s ± 0 ns")
    assert "Memory is not compared" in out
    assert "+25 %" not in out


def test_a_run_of_another_layout_is_refused() -> None:
    with pytest.raises(PlannerError, match="compared with the plan that it ran"):
        compare_run(PLAN, RUN)


def test_a_run_of_other_software_than_was_planned_for_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = compare_run(PLAN, replace(MEASURED, compiled=True))
    assert (found.planned_stack, found.run_stack) == ("eager", "compiled")
    show_run_comparison(found)
    assert "the plan predicts stack eager, the run is compiled" in capsys.readouterr().out.replace("\n", " ")
    show_run_comparison(compare_run(PLAN, MEASURED))
    assert "stack" not in capsys.readouterr().out


def test_keys_that_went_around_a_ring_were_not_planned_for() -> None:
    def told(stack: str, cp: int = 2, **changed: Any) -> str:
        workload = {"stack": stack} if stack != "eager" else {}
        plan = made_up_plan(model="gpt2", strategy={"cp": cp} if cp > 1 else {"dp": 2}, gpus=2, workload=workload)
        run = replace(MEASURED, layout=plan.layout_digest, strategy=plan.strategy, **changed)
        return compare_run(plan, run).mismatch

    assert told("eager") == told("eager", cp=1, context="ring") == ""
    assert told("eager", context="ring").startswith(
        "the plan predicts keys and values gathered over cp 2, the run"
    )
    assert told("megatron", context="ring") == told("megatron")  # which is of another stack, and of a ring
    assert told("eager", context="ring", compiled=True).count("the plan predicts") == 2
