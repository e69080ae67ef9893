"""A plan of a user's own module made small: the module stays as it is, its layout and its work become less.

Nobody but the user knows how to build the module narrower. What is made less are the degrees, the sequences of a
step, and their length where the module runs shorter ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from planner.errors import PlannerError
from planner.execute.free_memory import free_bytes
from planner.execute.own_batches import dtype_of, loss_in, meta_inputs
from planner.execute.own_inputs import bounds_of, drawn
from planner.execute.own_module import require_runnable
from planner.execute.own_splits import run_on_example
from planner.execute.shrink import laid_out, small_strategy, small_workload
from planner.models.user_module import Example
from planner.spec.legality import violations
from planner.spec.plan import Plan
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from planner.units import in_binary_bytes

_VALUE_BYTES = 8  # fp64
_PROCESS_BYTES = 0.4 * 2**30  # torch itself
_MARGIN = 1.25  # activations of a few tokens, and copies in passing


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallOwn:
    """What runs in the place of a plan: another plan, the batch of one step of it, and both in words."""

    plan: Plan
    batch: Mapping[str, Any]
    returns_loss: bool  # else a loss is made of what the module returns
    told: str


def shrunk_own(plan: Plan, module: nn.Module, example: Example, processes: int) -> SmallOwn:
    """On so many processes at most; `module` is on the meta device."""
    assert isinstance(plan.workload, TrainWorkload), "checked before"
    require_runnable(plan)
    given, work = plan.strategy, plan.workload
    layers = plan.layer_count
    weights = sum(value.numel() for value in module.parameters())
    strategy = _fitting(plan, weights, processes)
    length = _length(module, example, work, strategy)
    small = small_workload(work, strategy, length)
    made = laid_out(plan, strategy, small, layers)
    made = replace(made, modules=plan.modules if strategy.tp > 1 else {})
    inputs = meta_inputs(example, strategy.microbatch, length, dtype_of(module))
    bounds, out = bounds_of(partial(run_on_example, module, inputs), inputs)
    given_batch = example(small.global_batch, length)
    return SmallOwn(
        plan=made.sealed(),
        batch=drawn(given_batch, bounds),
        returns_loss=loss_in(out) is not None,
        told=f"The whole module of {weights:,} weights, {strategy.label} for {given.label}, "
        f"{small.global_batch} sequences of {length:,} tokens for {work.global_batch:,} of {work.seq_len:,}",
    )


def _fitting(plan: Plan, weights: int, processes: int) -> Strategy:
    """The degrees; fewer where so many copies of the module do not fit this machine, if every axis stays."""
    given = plan.strategy
    degrees = partial(small_strategy, given, runs=partial(_runs, plan), sizes=_divisors(given.tp))
    usual = degrees(processes)
    free = free_bytes()
    if _needed_bytes(usual, weights) <= free:
        return usual
    with suppress(PlannerError):
        fewer = degrees(usual.gpus - 1)
        axes = ("tp", "pp", "dp", "dp_replicate")
        kept = all((getattr(fewer, axis) > 1) == (getattr(usual, axis) > 1) for axis in axes)
        if kept and _needed_bytes(fewer, weights) <= free:
            return fewer
    needed = in_binary_bytes(_needed_bytes(usual, weights))
    raise PlannerError(
        "each process of --numerics builds the module as it is, in fp64, and this machine has room for them",
        value=f"{weights:,} weights on {usual.gpus} processes take {needed}, and {in_binary_bytes(free)} are free",
        remedy="give fewer processes with --nproc; or plan for a smaller copy, from a FUNCTION of the file that "
        "returns the module with fewer or narrower layers",
        key="numerics",
    )


def _needed_bytes(strategy: Strategy, weights: int) -> float:
    """Where all build the module and spread it or, later, one of them has all gradients beside its part."""
    sharing = strategy.tp * strategy.pp * (strategy.dp_shard if strategy.zero else 1)
    parts = strategy.gpus / sharing
    whole = _VALUE_BYTES * weights * max(strategy.gpus + parts, 2 + 2 * parts)
    return whole * _MARGIN + strategy.gpus * _PROCESS_BYTES


def _runs(plan: Plan, strategy: Strategy) -> bool:
    assert isinstance(plan.workload, TrainWorkload)
    layers = plan.layer_count
    work = small_workload(plan.workload, strategy, plan.workload.seq_len)
    return strategy.pp <= layers and not violations(None, work, strategy, strategy.gpus)


def _divisors(tp: int) -> list[int]:
    """Degrees that divide whatever tp divides."""
    return [size for size in range(1, tp + 1) if tp % size == 0]


def _length(module: nn.Module, example: Example, work: TrainWorkload, strategy: Strategy) -> int:
    """The shortest sequences of a few that the module runs, over as many ranks as those of the plan."""
    unit = 2 * math.lcm(2, strategy.tp, 8)
    for units in (1, 8):
        length = units * unit + work.seq_len % unit  # what a class token leaves over stays
        if length >= work.seq_len:
            break
        with suppress(PlannerError):
            run_on_example(module, meta_inputs(example, strategy.microbatch, length, dtype_of(module)))
            return length
    return work.seq_len
