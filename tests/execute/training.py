"""What a rank of a test does: train under a plan, perhaps from a checkpoint that another plan wrote."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from planner.errors import PlannerError
from planner.execute.checkpoint_folder import require_whole
from planner.execute.compiled import waiting_for_compilers
from planner.execute.failure import Record, RunFailed, Watch
from planner.execute.job import Job
from planner.execute.metrics import Silence
from planner.execute.own_file import named_by
from planner.execute.own_trained import TrainedFile
from planner.execute.parameters import local, replaced
from planner.execute.process import Placed
from planner.execute.train import Training
from planner.execute.trained import Trained, TrainedSpec
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan, content_digest
from planner.spec.strategy import Strategy
from planner.spec.training_run import TrainingRun
from tests.execute.plans import plan_of


def plan_for(spec: ModelSpec, sequences: int, layers: tuple[int, ...] = (), **keys: Any) -> Plan:
    """A plan whose digests are those of the model and of its layout."""
    ranks = keys.pop("gpus", 1)
    plan = plan_of(spec, Strategy.from_dict(keys, gpus=ranks), sequences, layers=layers)
    digests = dataclasses.replace(plan.digests, model=content_digest(spec))
    return dataclasses.replace(plan, digests=digests)


def job_of(plan: Plan, folder: Path, **flags: Any) -> Job:
    """A run in fp64 with its files in a folder, of a spec or of a user's file."""
    given = {"dtype": "fp64", "lr": 1e-2, "measured": str(folder / "measured.json")} | flags
    run = TrainingRun.from_flags(given)
    return Job(
        path=folder / "plan.yaml",
        plan=plan,
        trained=_trained(plan, run),
        workload=plan.workload,
        run=run,
    )


def _trained(plan: Plan, run: TrainingRun) -> Trained:
    user = named_by(plan)
    if user is not None:
        return TrainedFile.of(plan, run, user)
    assert plan.model_spec is not None
    return TrainedSpec.of(plan, run, plan.model_spec)


def training_of(plan: Plan, folder: Path, **flags: Any) -> Training:
    """A run in the running world, before its first step."""
    placed = Placed(rank=dist.get_rank(), ranks=dist.get_world_size(), device=torch.device("cpu"), backend="gloo")
    record = Record(placed.rank)
    return Training(job_of(plan, folder, **flags), placed, record, Watch(record, 60.0))


def trained(plan: Plan, folder: Path, **flags: Any) -> list[float]:
    """The losses of a run in the running world."""
    training = training_of(plan, folder, **flags)
    assert training.go(Silence())
    return training.losses


def trained_each(plans: list[Plan], folder: Path, flags: dict[str, Any]) -> list[list[float]]:
    """The losses of runs under several plans, one after another."""
    return [trained(plan, folder, **flags) for plan in plans]


def with_a_lost_gradient(plan: Plan, folder: Path) -> tuple[list[bool], str]:
    """What ends a run in whose second step rank 1 has a gradient that is no number, and which does not clip.

    Also whether a rank was watched, of each time that it reduced something with the others.
    """
    training = training_of(plan, folder, steps=3, clip=0.0, every=1, checkpoint=str(folder / "kept"))
    all_reduce, step, watched = dist.all_reduce, training.runner.step, []

    def reduce(*args: Any, **keys: Any) -> Any:
        watched.append(training.watch.armed)
        return all_reduce(*args, **keys)

    def losing(batch: Any) -> Any:
        loss = step(batch)
        if training.step == 1 and dist.get_rank() == 1:
            local(next(training.runner.parameters()).grad)[-1, 0] = float("inf")
        return loss

    with replaced(dist, "all_reduce", reduce), replaced(training.runner, "step", losing):
        try:
            training.go(Silence())
        except RunFailed as error:
            training.checkpoints.finish()
            return watched, str(error)
    raise AssertionError("nothing was said")


def patience(plan: Plan, folder: Path, seconds: float) -> dict[str, float]:
    """How long groups wait in a run that was told to be so patient in a step."""
    with waiting_for_compilers():  # which gives the groups of these ranks their usual patience back
        training = training_of(plan, folder, timeout=seconds, checkpoint=str(folder / "kept"))
        assert training.checkpoints is not None
        groups = {"tp": training.runner.meshes.tp.group, "checkpoint": training.checkpoints._group}
        backends = {name: group._get_backend(torch.device("cpu")) for name, group in groups.items() if group}
        return {name: backend.options._timeout.total_seconds() for name, backend in backends.items()}


def continued(first: Plan, second: Plan, folder: Path) -> tuple[list[float], list[float]]:
    """The last two losses of four steps under one plan, and the same of a run that went on under another."""
    flags = {"seed": 3, "warmup": 1, "steps": 4, "checkpoint": str(folder / "checkpoints")}
    whole = trained(first, folder, every=2, keep=9, **flags)
    if dist.get_rank() == 0:
        (folder / "checkpoints" / "latest").write_text("step-00000002\n")  # as if it had been killed after it
    dist.barrier()
    return whole[2:], trained(second, folder, resume=True, **flags)


def statistics(first: Plan, second: Plan, path: str, folder: Path) -> tuple[list[float], list[float]]:
    """A buffer after two steps under one plan, and as a run under another goes on with it."""
    flags = {"checkpoint": str(folder / "checkpoints")}
    whole = training_of(first, folder, steps=2, **flags)
    assert whole.go(Silence())
    resumed = training_of(second, folder, steps=3, resume=True, **flags)
    return tuple(each.runner.module.get_buffer(path).tolist() for each in (whole, resumed))


def after_altered_bits(plan: Plan, folder: Path) -> str:
    """What a run says that is to go on from a checkpoint one of whose values has another sign."""
    checkpoints = folder / "checkpoints"
    trained(plan, folder, steps=2, every=1, checkpoint=str(checkpoints))
    if dist.get_rank() == 0:
        file = checkpoints / "step-00000002" / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        with zipfile.ZipFile(io.BytesIO(content)) as last:  # tensor of the file
            values = last.read("archive/data/0")
        content[content.rindex(values) + len(values) - 1] ^= 0x80
        file.write_bytes(content)
    dist.barrier()
    require_whole(checkpoints)  # it is as long as it was
    try:
        trained(plan, folder, steps=3, checkpoint=str(checkpoints), resume=True)
    except PlannerError as error:
        return str(error)
    raise AssertionError("nothing was said")


def on_a_full_disk(plan: Plan, folder: Path) -> str:
    """What a run says whose second checkpoint finds no room on rank 1."""
    write_data, calls = FileSystemWriter.write_data, []

    def write(self: FileSystemWriter, *args: Any) -> Any:
        calls.append(self)
        if len(calls) == 2 and dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_data(self, *args)

    with replaced(FileSystemWriter, "write_data", write):
        try:
            trained(plan, folder, steps=9, checkpoint=str(folder / "checkpoints"), every=1)
        except RunFailed as error:
            return str(error)
    raise AssertionError("nothing was said")
