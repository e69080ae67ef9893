"""One rank of a training run: steps, their metrics, checkpoints, and what was measured."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from planner.errors import EXIT_DONE
from planner.execute.checkpoint import Checkpoints
from planner.execute.checkpoint_folder import Facts, claim
from planner.execute.checkpoint_items import Parts
from planner.execute.compiled import wait_at_least, waiting_for_compilers
from planner.execute.failure import EXIT_TERMINATED, RECORDS, Record, RunFailed, Watch
from planner.execute.gradients import are_finite, whole_backward
from planner.execute.job import Job, open_job, require_kernels, require_places
from planner.execute.metrics import Log, Predicted, Reader, Silence, StepMetrics, peak_bytes, watched
from planner.execute.optimizer import LocalOptimizer, learning_rate
from planner.execute.order import mixed
from planner.execute.parts import held_values, parts_of
from planner.execute.process import Placed, join, place, timeout_seconds, waiting_seconds
from planner.execute.roll_call import spread_over_hosts, start_roll_call
from planner.spec.measured import Measured, RankMemory, context_mismatch, stack_mismatch
from planner.spec.strategy import Strategy
from planner.spec.training_run import RankArguments

_MOST_SETTLING = 3


def run_rank(asked: RankArguments) -> int:
    """A rank from its start to its end; the exit code. What goes wrong is told, and left for who started it."""
    rank = int(os.environ.get("RANK", "0"))
    record = Record(rank)
    try:
        return _run(asked, record)
    except BaseException as error:  # an interrupt and a failed checkpoint are told as well
        report = record.report(error)
        if asked.verbose:
            print(f"rank {rank}:\n{report.traceback}", file=sys.stderr)
        if RECORDS not in os.environ and (rank == 0 or dist.is_initialized()):
            print(report.error(), file=sys.stderr, flush=True)
        return report.exit_code


def _run(asked: RankArguments, record: Record) -> int:
    job = open_job(Path(asked.plan), asked.run)
    placed = place(job.run, job.plan)
    record.stage = stage_of(job.plan.strategy, placed.rank)
    if RECORDS not in os.environ:
        require_kernels(job, placed.device.type)
    join(placed, waiting_seconds(job.run, job.plan))
    claimed = None  # as long as this process lives
    if RECORDS not in os.environ and placed.rank == 0:  # else whoever started the ranks has looked
        claimed = claim(job.checkpoint_folder) if job.checkpoint_folder is not None else None
        require_places(job)
    if RECORDS not in os.environ and spread_over_hosts():
        record.roll_call = start_roll_call(lambda: record.where)
    watch = Watch(record, timeout_seconds(job.run, job.plan))
    watch.listen()
    watch.start()
    training = Training(job, placed, record, watch)
    with watched(job.run.steps, training.step, quiet=asked.quiet or placed.rank > 0) as reader:
        reader.say(
            f"{job.plan.model} on {placed.ranks} × {placed.name}, {placed.backend}: {job.plan.strategy.label}"
        )
        for told in (
            stack_mismatch(job.workload.stack, job.run.stack),
            context_mismatch(job.workload.stack, job.run.context, job.plan.strategy),
            whole_backward(job.plan.strategy.schedule),
        ):
            if told:
                reader.say(f"warning: {told}")
        for line in training.beginning:
            reader.say(line)
        ended = training.go(reader)
    dist.barrier()
    if claimed is not None:
        claimed.close()
    return EXIT_DONE if ended else EXIT_TERMINATED


class Training:
    """A run from a first or a resumed step on."""

    def __init__(self, job: Job, placed: Placed, record: Record, watch: Watch) -> None:
        self.job, self.placed, self.record, self.watch = job, placed, record, watch
        run = job.run
        self.runner = job.trained.runner(placed.device)
        patience = waiting_seconds(run, job.plan)
        wait_at_least(patience)
        record.stage = self.runner.meshes.pp_rank
        self.runner.module.train()
        self.optimizer = LocalOptimizer(
            job.workload.optimizer, self.runner.named_parameters(), self.runner.module, run
        )
        self.predicted = Predicted.of(job.plan)
        self.shapes = job.trained.shapes()
        self.step, self.sequences = 0, 0  # done so far
        self.sound = True  # all gradients of this rank were numbers, where no norm over all ranks tells
        self.seconds: list[float] = []
        self.losses: list[float] = []
        folder = job.checkpoint_folder
        self.checkpoints = None if folder is None else Checkpoints(folder, keep=run.keep, seconds=patience)
        self.saved = 0
        self.beginning = beginning(self._resume(), job.trained.reads) if run.resume else []
        for module, blocks in self.runner.followed():
            record.follow(module, closed=blocks if run.compile else ())

    def go(self, reader: Reader) -> bool:
        """All steps that are left; False where it was asked to end before."""
        readers = [reader, self._log()]
        first, asked_to_end = self.step, False
        while self.step < self.job.run.steps and not asked_to_end:
            with self._watched_step():
                metrics = self._one_step()
                asked_to_end, broken = self._any_rank(self.watch.asked_to_end, not self.sound)
            if broken:
                raise not_finite("sum of each rank's gradients", "gradients", "nan or infinite", self.step)
            for each in readers:
                each.step(metrics)
            self._save_when_due(last=asked_to_end or self.step == self.job.run.steps)
        if self.checkpoints is not None:
            self.checkpoints.finish()
        if asked_to_end and self.step < self.job.run.steps:
            reader.say(
                f"asked to end after step {self.step}" + ("; checkpoint written" if self.checkpoints else "")
            )
            return False
        self._write_measured(first)
        self.job.trained.export(self.runner, writes=self.placed.rank == 0)
        return True

    def _one_step(self) -> StepMetrics:
        run, runner, work = self.job.run, self.runner, self.job.workload
        rows = work.global_batch // runner.meshes.strategy.dp
        number = runner.meshes.data_rank // runner.meshes.strategy.cp  # ranks of one cp group share sequences
        batch = self.job.trained.batch(self.sequences + number * rows, rows, self.placed.device)
        started = time.perf_counter()
        runner.start_drawing(mixed(run.seed, self.step) >> 8)  # by step, so that a resumed run drops alike
        loss = runner.step(batch)
        norm = float(runner.clip(run.clip)) if run.clip else None
        self.sound = norm is not None or are_finite(runner.module)
        rate = learning_rate(run, self.step)
        self.optimizer.step(rate)
        runner.zero_grad()
        value = float(loss)
        seconds = time.perf_counter() - started
        require_finite(value, norm, self.step + 1)
        self.step += 1
        self.sequences += work.global_batch
        if not self._compiles:
            self.watch.patience = max(self.watch.patience, 3 * seconds)
        self.seconds.append(seconds)
        self.losses.append(value)
        allocated, reserved = peak_bytes(self.placed.device)
        return StepMetrics(
            step=self.step,
            loss=value,
            learning_rate=rate,
            gradient_norm=norm,
            seconds=seconds,
            tokens_per_second=work.tokens / seconds,
            mfu=self.predicted.mfu_at(seconds),
            predicted_seconds=self.predicted.seconds,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
        )

    @property
    def _compiles(self) -> bool:
        """Whether the next step is the one that compiles."""
        return self.job.run.compile and not self.seconds

    @contextlib.contextmanager
    def _watched_step(self) -> Iterator[None]:
        """A step begins; it is watched until the ranks have agreed whether to go on.

        The first one of a compiled run takes minutes, and not equally many on all ranks.
        """
        compiles = self._compiles
        self.record.begin(self.step)
        self.watch.armed = not compiles
        try:
            with waiting_for_compilers() if compiles else contextlib.nullcontext():
                yield
        finally:
            self.watch.armed = False

    def _any_rank(self, *here: bool) -> list[bool]:
        flags = torch.tensor(here, dtype=torch.float32, device=self.placed.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def _log(self) -> Reader:
        if self.placed.rank or not self.job.run.log:
            return Silence()
        return Log(Path(self.job.run.log), self.step)

    def state(self, *, to_save: bool) -> Parts:
        """Weights and moments of this rank. Of a table tied across stages the first stage's is saved.

        Buffers that replicas change each for itself are those of the first.
        """
        buffers = not to_save or self.runner.meshes.data_rank == 0
        tables = {"weight": held_values(self.runner.module, buffers=buffers), **self.optimizer.moments()}
        parts: Parts = {}
        for name, values in tables.items():
            for path, kept, held in parts_of(self.runner.module, self.shapes, values):
                if path == kept or not to_save:
                    parts[f"{name}/{kept}"] = held
        return parts

    def _resume(self) -> Facts | None:
        facts = self.checkpoints.latest() if self.checkpoints is not None and self.job.run.resume else None
        if self.checkpoints is None or facts is None:
            return None
        self.checkpoints.load(facts, self.state(to_save=False))
        self.optimizer.resume_at(facts.step)
        self.step, self.sequences, self.saved = facts.step, facts.sequences, facts.step
        return facts

    def _save_when_due(self, *, last: bool) -> None:
        run = self.job.run
        if self.checkpoints is None:
            return
        self.checkpoints.raise_failure()
        if self.step == self.saved or not (last or (run.every and self.step % run.every == 0)):
            return
        facts = Facts(
            model=self.job.trained.digest,
            layout=self.job.plan.layout_digest,
            optimizer=self.job.workload.optimizer,
            step=self.step,
            sequences=self.sequences,
            seed=run.seed,
            data=self.job.trained.reads,
        )
        self.watch.writes = True
        self.checkpoints.save(facts, self.state(to_save=True), wait=last)
        self.watch.writes = last  # the first rank has yet to name it, and those before to remove
        self.saved = self.step

    def _write_measured(self, first: int) -> None:
        allocated, reserved = peak_bytes(self.placed.device)
        own = RankMemory(rank=self.placed.rank, stage=self.runner.meshes.pp_rank,
                         allocated_bytes=allocated, reserved_bytes=reserved)  # fmt: skip
        everyone: list[RankMemory | None] = [None] * self.placed.ranks
        dist.all_gather_object(everyone, own)
        if self.placed.rank:
            return
        plan = self.job.plan
        Measured(
            model=plan.model,
            hardware=plan.hardware,
            gpus=plan.gpus,
            layout=plan.layout_digest,
            workload=plan.workload,
            strategy=plan.strategy,
            device=self.placed.name,
            backend=dist.get_backend(),
            torch=torch.__version__,
            driver=torch.version.cuda or "",
            compiled=self.job.run.compile,
            context=self.job.run.context,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            first_step=first,
            each_seconds=tuple(self.seconds),
            settling_steps=min(_MOST_SETTLING, (len(self.seconds) - 1) // 2),
            memory=tuple(entry for entry in everyone if entry is not None),
            first_loss=self.losses[0],
            last_loss=self.losses[-1],
        ).save(self.job.measured_path)


def beginning(facts: Facts | None, data: str) -> list[str]:
    """What a person is told of a run that was to go on."""
    if facts is None:
        return ["no checkpoint yet: starting at step 1"]
    lines = [f"resumed after step {facts.step}"]
    if facts.data not in ("", data):
        lines.append(f"the data is another: {data}; before it was {facts.data}")
    return lines


def require_finite(loss: float, norm: float | None, step: int) -> None:
    """End a run whose weights are no numbers any more, before a checkpoint keeps them."""
    for what, key, value in (("loss", "loss", loss), ("norm of the gradients", "clip", norm)):
        if value is not None and not math.isfinite(value):
            raise not_finite(what, key, value, step)


def not_finite(what: str, key: str, value: float | str, step: int) -> RunFailed:
    """What is told of a step that computed no numbers."""
    return RunFailed(
        f"the {what} is a number",
        value=f"{value} at step {step}",
        remedy="lower --lr, lengthen --warmup, or look at the data of that step",
        key=key,
    )


def stage_of(strategy: Strategy, rank: int) -> int:
    """The pipeline rank of a rank: its digit in the mesh."""
    for axis, size in reversed(strategy.mesh().items()):
        if axis == "pp":
            return rank % size
        rank //= size
    return 0
