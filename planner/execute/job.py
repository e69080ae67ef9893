"""What is run: a plan, its model, the flags. What can be wrong with them is found before ranks start."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from planner.errors import PlannerError
from planner.execute.adapters import require_decoder
from planner.execute.checkpoint_folder import latest, require_resumable, require_room, require_whole
from planner.execute.compiled import require_compilable, require_compiler
from planner.execute.data import TrainingData, open_data
from planner.execute.ring import require_context, require_ring_kernel
from planner.spec.huggingface_config import config_at
from planner.spec.legality import require_legal
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan, content_digest, read_plan
from planner.spec.sources import resolve_model
from planner.spec.training_run import MEASURED, TrainingRun
from planner.spec.workload import TrainWorkload

_STATES = {"adamw": 2, "sgd": 0}  # moments beside each weight
_PRECISIONS = ("bf16", "fp32")
_VALUE_BYTES = {"fp32": 4, "fp64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run, checked."""

    path: Path  # of the plan
    plan: Plan
    spec: ModelSpec
    workload: TrainWorkload
    model_digest: str
    data: TrainingData
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
    spec = plan.model_spec or resolve_model(plan.model)
    if not isinstance(spec, ModelSpec):
        raise PlannerError(
            "a model that a specification or a config.json describes is run",
            value=plan.model,
            remedy="call planner.parallelize(model, plan) in a script of your own",
            key="model",
            where=source.place(("model",)),
        )
    run.require_apart(path)
    require_decoder(spec, plan.model)
    digest = content_digest(spec)
    if digest != plan.digests.model:
        plan.require_same(digest, plan.digests.hardware)
    if workload.precision not in _PRECISIONS:
        lacks = "a scaled loss" if workload.precision == "fp16" else "products that it does not have"
        raise PlannerError(
            f"a run computes in {' or '.join(_PRECISIONS)}; {workload.precision} needs {lacks}",
            value=workload.precision,
            remedy="plan with --precision bf16",
            key="precision",
            where=source.place(("workload", "precision")),
        )
    require_legal(spec, workload, plan.strategy, plan.gpus)
    if run.compile:
        require_compilable(plan, spec)
    require_context(run.context, spec, plan.strategy, workload.seq_len)
    data = open_data(run, vocab=spec.vocab, length=workload.seq_len)
    return Job(path=path, plan=plan, spec=spec, workload=workload, model_digest=digest, data=data, run=run)


def require_kernels(job: Job, device: str) -> None:
    """Refuse what cannot be computed on the ranks' kind of device."""
    if job.run.compile:
        require_compiler(device)
    precision = "fp64" if job.run.dtype == "fp64" else job.workload.precision
    require_ring_kernel(job.run.context, job.plan.strategy, precision, device)


def weights_source(job: Job) -> Callable[[str], Tensor] | None:
    """Where weights come from, if from a Hugging Face folder; it must be one of the plan's model."""
    if not job.run.weights:
        return None
    from planner.execute.huggingface_folder import HuggingFaceFolder

    found = HuggingFaceFolder(job.run.weights)
    if replace(found.spec, name=job.spec.name) != job.spec:
        raise PlannerError(
            f"the weights are those of the plan's model, {job.spec.name}",
            value=job.run.weights,
            remedy=f"plan for {job.run.weights}, or give the weights of {job.spec.name}",
            key="weights",
        )
    return found


def export_config(job: Job) -> dict[str, Any]:
    """The Hugging Face configuration that exported weights go with: one that is there, else that of the model."""
    return config_at((job.run.weights, job.plan.model), job.spec)


def checkpoint_bytes(job: Job) -> int:
    """What one checkpoint of a run takes, nothing where it keeps none: weights and moments, each once."""
    if job.checkpoint_folder is None:
        return 0
    from planner.models.build import build_model  # on the meta device it loads half of torch, which takes a second

    weights = sum(value.numel() for value in build_model(job.spec, device="meta").parameters())
    return weights * _VALUE_BYTES[job.run.dtype] * (1 + _STATES[job.workload.optimizer])


def require_places(job: Job) -> None:
    """Refuse places that could not be written to, and checkpoints that the run could not go on from.

    One process calls this, before any rank writes.
    """
    weights_source(job)
    if job.run.export:
        from planner.execute.huggingface_export import require_new

        export_config(job)
        require_new(Path(job.run.export))
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
    require_resumable(facts, model=job.model_digest, optimizer=job.workload.optimizer, seed=job.run.seed)
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
