"""Which rank is told of when a run fails: the one that began it."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

from planner.errors import PlannerError
from planner.execute.failure import RECORDS, Record, RunFailed, Watch, read_report, read_where
from planner.execute.job import checkpoint_bytes
from planner.execute.launch import PContext, failure_of, waiting
from planner.execute.process import ending_seconds, require_ranks, timeout_seconds, waiting_seconds
from planner.models.build import build_model
from planner.spec.plan import Plan
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
    assert waiting_seconds(TrainingRun(timeout=7.0), plan) == 300.0
    assert waiting_seconds(TrainingRun(timeout=400.0), plan) == 400.0
    assert waiting_seconds(TrainingRun(timeout=7.0, compile=True), plan) == 3600.0


def test_ranks_get_the_time_to_end_that_their_checkpoint_takes(tmp_path: Path) -> None:
    plan = plan_for(tiny_spec("gpt", layers=2), 4)
    weights = sum(value.numel() for value in build_model(plan.model_spec, device="meta").parameters())
    assert checkpoint_bytes(job_of(plan, tmp_path)) == 0
    assert checkpoint_bytes(job_of(plan, tmp_path, checkpoint="kept")) == 3 * 8 * weights  # two moments, fp64
    assert checkpoint_bytes(job_of(plan, tmp_path, checkpoint="kept", dtype="fp32")) == 3 * 4 * weights
    plan = cast("Plan", SimpleNamespace(estimate=SimpleNamespace(step_seconds=2.0)))
    assert [ending_seconds(plan, held) for held in (0, 10**9, 5 * 10**9)] == [30, 30, 106]


def test_a_rank_that_is_asked_to_end_may_stand_still_while_it_writes() -> None:
    record = Record(0)
    watch = Watch(record, 600.0)
    assert watch.broken(record.changed + 1000.0) is None
    watch.armed = True
    assert "within 600 s" in watch.broken(record.changed + 1000.0)[0]
    watch._asked = record.changed + 1.0
    assert "asked to end" in watch.broken(watch._asked + 6.0)[0]
    watch.armed = False  # it loads, or compiles
    assert watch.broken(watch._asked + 29.0) is None
    assert "asked to end" in watch.broken(watch._asked + 31.0)[0]
    watch.writes = True
    assert watch.broken(watch._asked + 1000.0) is None


def test_an_agent_that_takes_no_time_is_told_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(PContext, "close", lambda _, __, timeout: given.append(timeout))
    with waiting(106):
        PContext.close(None, signal.SIGTERM)
        PContext.close(None)
    assert given == [106, 30]
