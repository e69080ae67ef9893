"""What is run: a plan, its model, the flags. What can be wrong with them is found before ranks start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from planner.errors import PlannerError
from planner.execute.checkpoint_folder import latest, require_resumable, require_room, require_whole
from planner.execute.compiled import require_compiler
from planner.execute.ring import require_ring_kernel
from planner.execute.trained import Trained, TrainedSpec
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan, read_plan
from planner.spec.sources import UserModule, resolve_model
from planner.spec.training_run import MEASURED, TrainingRun
from planner.spec.workload import TrainWorkload
from planner.spec.yaml_text import Source

_STATES = {"adamw": 2, "sgd": 0}  # moments beside each weight
_PRECISIONS = ("bf16", "fp32")
_VALUE_BYTES = {"fp32": 4, "fp64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run, checked."""

    path: Path  # of the plan
    plan: Plan
    trained: Trained
    workload: TrainWorkload
    run: TrainingRun

    @property
    def checkpoint_folder(self) -> Path | None:
        """Where checkpoints go, if anywhere."""
        return Path(self.run.checkpoint) if self.run.checkpoint else None

    @property
    def measured_path(self) -> Path:
        """Where measurements go: beside the plan unless told otherwise."""
        return Path(self.run.measured) if self.run.measured else self.path.parent / MEASURED


def open_job(path: Path, run: TrainingRun) -> Job:
    """The run of a plan, or a PlannerError that says what is wrong with it."""
    plan, source = read_plan(path)
    workload = plan.workload
    if not isinstance(workload, TrainWorkload):
        raise PlannerError(
            "a plan of training runs", value=workload.mode, remedy="give a plan of mode: train", key="mode"
        )
    run.require_apart(path)
    if workload.precision not in _PRECISIONS:
        lacks = "a scaled loss" if workload.precision == "fp16" else "products that it does not have"
        raise PlannerError(
            f"a run computes in {' or '.join(_PRECISIONS)}; {workload.precision} needs {lacks}",
            value=workload.precision,
            remedy="plan with --precision bf16",
            key="precision",
            where=source.place(("workload", "precision")),
        )
    return Job(path=path, plan=plan, trained=_trained(plan, run, source), workload=workload, run=run)


def require_kernels(job: Job, device: str) -> None:
    """Refuse what cannot be computed on the ranks' kind of device."""
    if job.run.compile:
        require_compiler(device)
    precision = "fp64" if job.run.dtype == "fp64" else job.workload.precision
    require_ring_kernel(job.run.context, job.plan.strategy, precision, device)


def _trained(plan: Plan, run: TrainingRun, source: Source) -> Trained:
    """What the plan says of its model, and what becomes of it in this run."""
    try:
        found = plan.model_spec or resolve_model(plan.model)
    except PlannerError as error:
        error.where = error.where or source.place(("model",))
        raise
    if isinstance(found, ModelSpec):
        return TrainedSpec.of(plan, run, found)
    if isinstance(found, UserModule):
        from planner.execute.own_trained import TrainedFile  # which loads half of torch

        return TrainedFile.of(plan, run, found)
    raise PlannerError(
        "a model is run that a specification or a config.json describes, or FILE.py:FUNCTION makes",
        value=f"{plan.model}, a graph alone",
        remedy="plan FILE.py:FUNCTION, or call planner.parallelize(model, plan) in a script of your own",
        key="model",
        where=source.place(("model",)),
    )


def checkpoint_bytes(job: Job) -> int:
    """What one checkpoint of a run takes, nothing where it keeps none: weights and moments, each once."""
    if job.checkpoint_folder is None:
        return 0
    return job.trained.weights * _VALUE_BYTES[job.run.dtype] * (1 + _STATES[job.workload.optimizer])


def require_places(job: Job) -> None:
    """Refuse places that could not be written to, and checkpoints that the run could not go on from.

    One process calls this, before any rank writes.
    """
    job.trained.require_places()
    if job.run.log:
        _require_file("log", Path(job.run.log))
    _require_file("measured", job.measured_path)
    folder = job.checkpoint_folder
    if folder is None:
        return
    require_room(folder, checkpoint_bytes(job), resume=job.run.resume)
    facts = latest(folder) if job.run.resume else None
    if facts is None:
        return
    require_whole(folder)
    require_resumable(facts, model=job.trained.digest, optimizer=job.workload.optimizer, seed=job.run.seed)
    if facts.step >= job.run.steps:
        raise PlannerError(
            f"the run has steps left: its checkpoint has {facts.step}",
            value=f"--steps {job.run.steps}",
            remedy="give more --steps",
            key="steps",
        )


def _require_file(key: str, path: Path) -> None:
    """Refuse a file that could not be written. Measurements are read again: no pipe or device keeps them."""
    unfit = path.is_dir() or (key == "measured" and path.exists() and not path.is_file())
    if unfit or not os.access(path.parent, os.W_OK):
        raise PlannerError(
            "the file can be written",
            value=str(path),
            remedy="give a file in a folder that exists and can be written to",
            key=key,
        )
