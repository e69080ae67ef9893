"""Measurements of a run: totals that follow from the steps, a file that reads back, files that are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.spec.measured import Measured, RankMemory, load_measured
from planner.spec.plan import read_plan
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload

RUN = Measured(
    model="gpt2",
    hardware="laptop",
    gpus=2,
    layout="0" * 64,
    workload=TrainWorkload(seq_len=64, global_batch=8, precision="bf16"),
    strategy=Strategy(dp=2),
    device="cpu",
    backend="gloo",
    torch="2.13.0",
    date="2026-01-02T03:04:05+00:00",
    first_step=0,
    each_seconds=(9.0, 1.0, 2.0, 4.0),
    settling_steps=1,
    memory=(
        RankMemory(rank=0, stage=0, allocated_bytes=10.0, reserved_bytes=20.0),
        RankMemory(rank=1, stage=0, allocated_bytes=11.0, reserved_bytes=21.0),
    ),
    first_loss=5.0,
    last_loss=4.0,
)


def test_totals_follow_from_the_steps_that_count() -> None:
    assert RUN.step_seconds == 2.0
    assert RUN.spread_seconds == 1.0
    assert RUN.tokens_per_second == 64 * 8 / 2.0
    assert RUN.peak_by_stage[0].rank == 1


def test_the_file_reads_back(tmp_path: Path) -> None:
    RUN.save(tmp_path / "measured.json")
    assert json.loads((tmp_path / "measured.json").read_text())["step_seconds"] == 2.0
    assert load_measured(tmp_path / "measured.json") == RUN


def test_what_does_not_agree_is_refused(tmp_path: Path) -> None:
    data = RUN.to_dict()
    (tmp_path / "edited.json").write_text(json.dumps(data | {"step_seconds": 1.0}))
    with pytest.raises(PlannerError, match="follows from the others"):
        load_measured(tmp_path / "edited.json")
    with pytest.raises(PlannerError, match="degrees take 2 GPUs"):
        Measured.from_dict(data | {"gpus": 4})
    with pytest.raises(PlannerError, match="stages below 1"):
        Measured.from_dict(data | {"memory": [data["memory"][0] | {"stage": 7}]})
    (tmp_path / "text.json").write_text("no json")
    with pytest.raises(PlannerError, match="is JSON"):
        load_measured(tmp_path / "text.json")
    with pytest.raises(PlannerError, match="at least one step"):
        dataclasses.replace(RUN, settling_steps=4)


def test_measurements_in_a_plans_place_are_called_by_their_name(tmp_path: Path) -> None:
    RUN.save(tmp_path / "measured.json")
    with pytest.raises(PlannerError, match="a plan is wanted here") as caught:
        read_plan(tmp_path / "measured.json")
    assert "got: measurements of a run" in str(caught.value)
    assert caught.value.key == "file"
