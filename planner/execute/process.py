"""One rank's process: its device, the group of all ranks, and how it ends."""

from __future__ import annotations

import ctypes
import datetime
import math
import os
import platform
import sys
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from planner.errors import PlannerError
from planner.execute.compiled import COMPILING_SECONDS
from planner.execute.failure import LEAST_ENDING_SECONDS
from planner.spec.plan import Plan
from planner.spec.training_run import Device, TrainingRun

_LEAST_SECONDS = 300.0  # that ranks wait for one another: starting and a first step load kernels and libraries
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_NEVER = 2**31 - 1  # bytes of free memory before any is given back: the largest that mallopt takes
_STEPS = 30.0  # or so many of the predicted step
_SLOW_DISK_BYTES_PER_SECOND = 100e6  # a shared folder over gigabit Ethernet, or one hard disk for all ranks
_CHECKPOINTS_PENDING = 2  # when a run is asked to end: the one being written, then the last
_STEPS_PENDING = 3.0  # as patience with a step that was begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where a rank runs."""

    rank: int
    ranks: int
    device: torch.device
    backend: str

    @property
    def name(self) -> str:
        """Of the device, as people call it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu {platform.machine()}, {torch.get_num_threads()} threads a rank"


def place(run: TrainingRun, plan: Plan) -> Placed:
    """This rank's place, from what torchrun set; a PlannerError where the world is not the plan's."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise PlannerError(
            "a launcher starts the ranks",
            value="no RANK in the environment",
            remedy="tp-plan run plan.yaml, or torchrun … -m planner.execute plan.yaml",
            key="launcher",
        )
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    require_ranks(plan, ranks)
    local, beside = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    kind = device_kind(run.device, beside)
    device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    # gloo beside NCCL, for what is on the CPU: checkpoints in a thread of their own, and words
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    return Placed(rank=rank, ranks=ranks, device=device, backend=backend)


def require_ranks(plan: Plan, ranks: int) -> None:
    """Refuse a world of another size than the plan's."""
    if ranks != plan.gpus:
        raise PlannerError(
            f"the plan is for {plan.gpus} ranks ({plan.strategy.label})",
            value=f"{ranks} ranks",
            remedy=f"start {plan.gpus}" + (f", or plan with --gpus {ranks}" if ranks > 0 else ""),
            key="gpus",
        )


def device_kind(wanted: Device, ranks_here: int) -> str:
    """`cuda` where each rank of this machine has a GPU, else `cpu`."""
    if wanted == "cpu":
        return "cpu"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= ranks_here:
        return "cuda"
    if found or wanted == "cuda":
        raise PlannerError(
            "each rank has a GPU of its own",
            value=f"{found} GPUs for {ranks_here} ranks on this machine",
            remedy="spread the ranks over more machines, plan for fewer GPUs, or give --device cpu",
            key="device",
        )
    return "cpu"


def timeout_seconds(run: TrainingRun, plan: Plan) -> float:
    """How long a rank may wait in a step: thirty of the predicted ones, and at least five minutes."""
    return run.timeout or max(_LEAST_SECONDS, _STEPS * plan.estimate.step_seconds)


def waiting_seconds(run: TrainingRun, plan: Plan) -> float:
    """How long a rank waits for others anywhere: as in a step, and outside of steps no shorter than by default."""
    return max(COMPILING_SECONDS if run.compile else _LEAST_SECONDS, timeout_seconds(run, plan))


def ending_seconds(plan: Plan, checkpoint_bytes: int) -> int:
    """How long ranks may take to end once they are asked to: max(30, 2·bytes/(100 MB/s) + 3·step).

    On CPUs a step of a plan made for GPUs takes longer; what is written by then goes by the bytes all the same.
    """
    writing = _CHECKPOINTS_PENDING * checkpoint_bytes / _SLOW_DISK_BYTES_PER_SECOND
    return max(LEAST_ENDING_SECONDS, math.ceil(writing + _STEPS_PENDING * plan.estimate.step_seconds))


def keep_freed_memory() -> None:
    """Let a rank on the CPU use the memory of one step again in the next.

    glibc gives large blocks back as they are freed, and then every 4 KiB of a new one cost a page fault.
    """
    options = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if options is not None:
        options(_MMAP_MAX, 0)
        options(_TRIM_THRESHOLD, _NEVER)


def join(placed: Placed, seconds: float) -> None:
    """Meet the other ranks, and wait for them so long in the group of all.

    It is given here, not raised later: gloo's messages heed only what their group was made with.
    """
    if placed.device.type == "cuda":
        torch.cuda.set_device(placed.device)
    else:
        keep_freed_memory()
    dist.init_process_group(
        placed.backend,
        timeout=datetime.timedelta(seconds=seconds),
        device_id=placed.device if placed.device.type == "cuda" else None,
    )


def leave(code: int) -> NoReturn:
    """End this process at once: destroying a gloo group aborts now and then (torch 2.13)."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
