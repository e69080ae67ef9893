"""Which rank is told of when a run fails: the one that began it."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from planner.errors import PlannerError
from planner.execute.failure import RECORDS, Record, RunFailed, read_report, read_where
from planner.execute.launch import failure_of
from planner.execute.process import require_ranks, timeout_seconds
from planner.spec.training_run import TrainingRun
from tests.execute.training import job_of, plan_for
from tests.tiny import tiny_spec

LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:2")


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(RECORDS, str(tmp_path))
    return tmp_path


def error_of(records: Path, codes: dict[int, int], ranks: int = 4) -> str:
    job = job_of(plan_for(tiny_spec("llama"), 4, gpus=ranks), records)
    return str(failure_of(records, codes, job))


def test_a_reason_of_its_own_comes_before_lost_peers(records: Path) -> None:
    Record(0).report(LOST)
    Record(2, 1).report(ValueError("boom"))
    Record(3).report(RuntimeError("Timed out waiting 5000ms for recv operation to complete"))
    told = error_of(records, {0: 1, 2: 1, 3: 1})
    assert "rank 2 (stage 1)" in told
    assert "boom" in told


def test_within_a_compiled_block_no_module_is_followed(records: Path) -> None:
    record = Record(0)
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    record.follow(module, closed=[module[0]])
    where = []
    for part in (module[0], module[0][0], module[1]):
        part.register_forward_pre_hook(lambda *_: where.append(record.where.module))
    module(torch.ones(1, 2))
    assert where == ["0", "0", "1"]


def test_what_a_compiler_says_is_told_as_such(records: Path) -> None:
    told = Record(0).report(torch._dynamo.exc.Unsupported("no such thing", case_name="none"))
    assert told.rule == "torch.compile makes kernels of each block"
    assert "without --compile" in told.remedy
    assert "no such thing" in told.value


def test_a_rank_that_was_killed_is_named_with_what_it_did(records: Path) -> None:
    for rank in (0, 2):
        Record(rank).report(LOST)
    dead = Record(1, 1)
    dead.begin(6)
    module = nn.Sequential(nn.Linear(2, 2))
    dead.follow(module)
    where = []
    module[0].register_forward_pre_hook(lambda *_: where.append(read_where(records, 1)))
    module(torch.ones(1, 2))
    assert where[0].module == "0"
    assert read_where(records, 1).module == ""
    told = error_of(records, {1: -signal.SIGKILL, 0: 1, 2: 1})
    assert "rank 1 (stage 1), step 7" in told
    assert "signal 9" in told
    assert "dmesg" in told


def test_of_ranks_that_hang_the_one_that_is_behind(records: Path) -> None:
    for rank, events in ((0, 9), (1, 8), (2, 9)):
        record = Record(rank)
        report = record.report(RunFailed("a step goes on", remedy="see"))
        where = dataclasses.replace(report.where, events=events)
        record.leave(dataclasses.replace(report, kind="hang", where=where, value=f"rank {rank} hangs"))
    Record(3).report(LOST)
    assert "rank 1 hangs" in error_of(records, dict.fromkeys(range(4), 1))


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (PlannerError("a rule", value=3, remedy="a remedy", key="data"), "input", 2),
        (RunFailed("a rule", remedy="a remedy"), "input", 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory", 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "memory", 1),
        (LOST, "peer", 1),
        (IndexError("index 7 is out of bounds"), "error", 1),
        (KeyboardInterrupt(), "error", 1),
    ],
)
def test_a_report_tells_what_kind_of_failure(records: Path, error: BaseException, kind: str, code: int) -> None:
    before = time.time()
    Record(0).report(error)
    report = read_report(records, 0)
    assert report is not None
    assert (report.kind, report.exit_code) == (kind, code)
    assert before <= report.seconds <= time.time()
    assert report.error().exit_code == code


def test_ranks_and_patience_follow_from_the_plan() -> None:
    plan = plan_for(tiny_spec("llama"), 4, gpus=4, tp=2)
    with pytest.raises(PlannerError, match="the plan is for 4 ranks"):
        require_ranks(plan, 8)
    assert timeout_seconds(TrainingRun(), plan) == max(300.0, 30 * plan.estimate.step_seconds)
    assert timeout_seconds(TrainingRun(timeout=7.0), plan) == 7.0
