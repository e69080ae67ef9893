"""Small plans with numbers that can be checked by hand, and their pipelines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.cost.simulate import simulate
from planner.spec.estimate import Interval, Memory, StepTime
from planner.spec.orders import orders
from planner.spec.paths import Span
from planner.spec.plan import Certificate, Digests, ModuleSplit, Plan, RunnerUp, Stage
from planner.spec.strategy import Strategy
from planner.spec.workload import workload_from_dict
from planner.units import GIB
from tests.report.made_up_runs import WORKLOAD, made_up_estimate

MODULES = {
    "embedding": ModuleSplit(split="vocab", output="sequence"),
    "blocks.0-7.attention.query": ModuleSplit(split="column", input="sequence", output="features"),
    "blocks.0-7.attention.output": ModuleSplit(split="row", input="features", output="sequence"),
}


def made_up_plan(
    step: Mapping[str, float] | None = None,
    *,
    gib: float = 40.0,
    model: str = "m",
    workload: Mapping[str, Any] | None = None,
    strategy: Mapping[str, Any] | None = None,
    certificate: Certificate | None = None,
    runners_up: tuple[RunnerUp, ...] = (),
    layers: int = 8,
    **keys: Any,
) -> Plan:
    """A plan for GPUs of 80 GiB; `step` is its seconds by part, `gib` its memory, halved on the last stage.

    Its step is within a tenth, its memory up to a tenth more.
    """
    parts = StepTime(**{f"{key}_seconds": value for key, value in (step or {"matmul": 2.0}).items()})
    gpus = keys.pop("gpus", 8)
    layout = Strategy.from_dict(dict(strategy or {}), gpus=gpus)
    wanted = workload_from_dict(WORKLOAD | dict(workload or {}))
    stages = tuple(
        Memory(weights_bytes=gib * GIB / (2.0 if place and place == layout.pp - 1 else 1.0))
        for place in range(layout.pp)
    )
    plain, total = made_up_estimate(), parts.total_seconds
    known = replace(
        plain.uncertainty,
        step_seconds=Interval(low=0.9 * total, high=1.1 * total),
        memory_bytes=Interval(low=0.9 * gib * GIB, high=1.1 * gib * GIB),
    )
    estimate = replace(
        plain, model=model, gpus=gpus, strategy=layout, workload=wanted, breakdown=parts, memory_per_stage=stages,
        uncertainty=known, capacity_bytes=80.0 * GIB, tokens_per_second_per_gpu=1000.0 / total, mfu=0.8 / total,
    )  # fmt: skip
    each = layers // (layout.pp * layout.vpp)
    spans = [[Span(0, -1)] * layout.vpp for _ in range(layout.pp)]
    for stage in range(layout.pp * layout.vpp):
        turn, rank = divmod(stage, layout.pp)
        spans[rank][turn] = Span(stage * each, (stage + 1) * each - 1)
    digest = hashlib.sha256(model.encode()).hexdigest()
    plan = Plan(
        model=model, hardware="dgx-h100", gpus=gpus, workload=wanted, strategy=layout,
        digests=Digests(model=digest, hardware="0" * 64, layout="0" * 64),
        command=f"tp-plan plan {model} --hardware dgx-h100 --gpus {gpus}", estimate=estimate,
        stages=tuple(Stage(layers=tuple(held)) for held in spans), certificate=certificate, runners_up=runners_up,
        **keys,
    )  # fmt: skip
    return plan.sealed()


def proof(objective: float = 2.0, *, bound: float | None = None, **keys: Any) -> Certificate:
    """A certificate over 214 layouts."""
    counts = {"candidates": 214, "illegal": {"memory": 58, "divisibility": 3}, "pruned": 120, "solved": 33}
    return Certificate(
        solver="HiGHS", objective=objective, bound=objective if bound is None else bound, **(counts | keys)
    )


def pipeline(
    pp: int, microbatches: int, *, vpp: int = 1, schedule: Any = "1f1b", hop: float = 0.0
) -> dict[str, Any]:
    """The timeline of equal stages: a second forward, two backward."""
    ran = orders(schedule, pp, vpp, microbatches)
    stages = pp * vpp
    weight = [1.0] * stages if schedule in ("zb", "zbv") else None
    return simulate(ran, [1.0] * stages, [2.0] * stages, weight, hop_seconds=hop).to_dict()
