"""Memory of this machine that processes could still take, and whether ranks of a plan on its CPU fit in."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from planner.errors import PlannerError
from planner.spec.plan import Plan
from planner.units import in_binary_bytes

# what a rank has to itself before it makes a model: torch 2.13 and this package took 0.27 GiB on Linux
_RANK_BYTES = 0.25 * 2**30


def free_bytes() -> float:
    """Of the machine, and of the group that our processes run in."""
    free = [math.inf]
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, StopIteration, ValueError):
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())  # or `max`
        lines = (group / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        free.append(float(most - int((group / "memory.current").read_text()) + cached))
    return min(free)


def require_memory(plan: Plan) -> None:
    """Refuse ranks on the CPU of this machine that it cannot hold: torch and the training state alone.

    What activations take comes on top, and is not the same on a CPU.
    """
    stages = plan.estimate.memory_per_stage
    states = sum(memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes for memory in stages)
    loaded, held = plan.gpus * _RANK_BYTES, states * (plan.gpus // len(stages))
    free = free_bytes()
    if loaded + held > free:
        raise PlannerError(
            "ranks on the CPU of one machine find memory for torch and for weights, gradients and moments",
            value=f"{plan.gpus} ranks take at least {in_binary_bytes(loaded)} and {in_binary_bytes(held)}, "
            f"and {in_binary_bytes(free)} are free",
            remedy="plan for fewer GPUs or a smaller model, or spread the ranks over more machines with torchrun; "
            "tp-plan verify checks a plan without running it",
            key="gpus",
        )
