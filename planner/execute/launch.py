"""The ranks of one machine started by torchrun's own agent, and the one that ended the run named."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from planner.errors import PlannerError
from planner.execute.checkpoint_folder import claim, whole_step
from planner.execute.failure import EXIT_TERMINATED, RECORDS, RunFailed, read_report, read_where
from planner.execute.free_memory import require_memory
from planner.execute.job import Job, checkpoint_bytes, open_job, require_kernels, require_places
from planner.execute.parameters import replaced
from planner.execute.process import device_kind, ending_seconds, require_ranks
from planner.spec.measured import Measured, load_measured
from planner.spec.training_run import RankArguments

EXIT_INTERRUPTED = 130

_LOOPBACK = "lo"
_WORST_FIRST = ("input", "error", "memory", "dead", "hang", "peer", "ended")


class Ended(RunFailed):
    """A run that was asked to end before its last step."""

    def __init__(self, code: int, checkpoint: str) -> None:
        step = whole_step(Path(checkpoint)) if checkpoint else 0
        kept = f"go on after step {step} with --checkpoint {checkpoint} --resume"
        remedy = kept if step else "nothing was kept: start it again, with --checkpoint"
        super().__init__("the run was asked to end", value=signal.strsignal(code - 128), remedy=remedy, key="run")
        self.exit_code = code


def launch(asked: RankArguments, nproc: int = 0) -> Measured:
    """Run a plan on this machine to its end, and what it measured.

    Everything that can be checked is checked before the first rank starts.
    """
    job = open_job(Path(asked.plan), asked.run)
    require_ranks(job.plan, nproc or job.plan.gpus)
    device = device_kind(job.run.device, job.plan.gpus)
    if device == "cpu":
        require_memory(job.plan)
    require_kernels(job, device)
    with contextlib.ExitStack() as until_then:
        if job.checkpoint_folder is not None:
            until_then.enter_context(claim(job.checkpoint_folder))
        require_places(job)
        folder = Path(until_then.enter_context(tempfile.TemporaryDirectory(prefix="tp-plan-run-")))
        until_then.enter_context(_environment(folder, job.plan.gpus))
        _follow(asked, job, folder)
    return load_measured(job.measured_path)


def _follow(asked: RankArguments, job: Job, records: Path) -> None:
    seconds = ending_seconds(job.plan, checkpoint_bytes(job))
    told: dict[str, Any] = {"shutdown_timeout": seconds} if _hears_how_long() else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.plan.gpus,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
        **told,
    )
    try:
        with contextlib.nullcontext() if told else waiting(seconds):
            elastic_launch(config, sys.executable)("-m", "planner.execute", *asked.words())
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        raise failure_of(records, codes, job) from None
    except SignalException as ended:
        code = EXIT_INTERRUPTED if ended.sigval == signal.SIGINT else EXIT_TERMINATED
        raise Ended(code, job.run.checkpoint) from None


def _hears_how_long() -> bool:
    return "shutdown_timeout" in {item.name for item in dataclasses.fields(LaunchConfig)}


@contextlib.contextmanager
def waiting(seconds: int) -> Iterator[None]:
    """An agent that waits so long for ranks that it was told to end: that of torch 2.11 cannot be asked to."""
    close = PContext.close

    def patient(context: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        close(context, death_sig, timeout if death_sig is None else seconds)  # none: one failed, the others go

    with replaced(PContext, "close", patient):
        yield


def failure_of(records: Path, codes: dict[int, int], job: Job) -> PlannerError:
    """The error of the rank that began it: of those with a reason of their own the earliest.

    A rank that left no report died, or had to be killed. One that hangs is told from those that wait for it by
    where it stands.
    """
    ranks = range(job.plan.gpus)
    reports = {rank: read_report(records, rank) for rank in ranks}
    if set(codes.values()) == {EXIT_TERMINATED} and not any(reports.values()):
        return Ended(EXIT_TERMINATED, job.run.checkpoint)

    def order(rank: int) -> tuple[int, float]:
        report = reports[rank]
        if report is None:  # SIGTERM is the agent's, which ends the others once one has failed
            dead = "ended" if codes.get(rank) == -signal.SIGTERM else "dead"
            return _WORST_FIRST.index(dead), codes.get(rank, 0)
        behind = report.where.events if report.kind == "hang" else report.seconds
        return _WORST_FIRST.index(report.kind), behind

    culprit = min(ranks, key=order)
    report = reports[culprit]
    return report.error() if report is not None else _death(records, culprit, codes.get(culprit))


def _death(records: Path, rank: int, code: int | None) -> PlannerError:
    where = read_where(records, rank)
    told = where.told if where is not None else f"rank {rank}, before it could tell where"
    remedy = "go on with --resume"
    if code is None:
        how = "answered no more"
    elif code < 0:
        how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        if -code == signal.SIGKILL:
            remedy = "see whether the machine ran out of memory (dmesg), then go on with --resume"
    else:
        how = f"ended with exit code {code}"
    return RunFailed("a rank died, and the run with it", value=f"{told}: {how}", remedy=remedy, key=f"rank.{rank}")


@contextlib.contextmanager
def _environment(records: Path, ranks: int) -> Iterator[None]:
    """What ranks inherit: where to leave records, this package, few threads each. The agent logs nothing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    package = str(Path(__file__).parents[2])
    changed = {
        RECORDS: str(records),
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }
    usual = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "THP_MEM_ALLOC_ENABLE": "1",  # huge pages: new tensors on a CPU cost as much as their copies without
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if Path("/sys/class/net", _LOOPBACK).exists():
        usual["GLOO_SOCKET_IFNAME"] = _LOOPBACK
    before = dict(os.environ)
    quiet = {logger: logger.level for logger in _agent_loggers()}
    os.environ.update({**{key: value for key, value in usual.items() if key not in before}, **changed})
    for logger in quiet:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in quiet.items():
            logger.setLevel(level)
        os.environ.clear()
        os.environ.update(before)


def _agent_loggers() -> list[logging.Logger]:
    """Those of torchrun's agent: some have a level of their own, which that of their parent does not change."""
    name = "torch.distributed.elastic"
    below = [found for found in logging.root.manager.loggerDict if found.startswith(f"{name}.")]
    return [logging.getLogger(found) for found in (name, *below)]
