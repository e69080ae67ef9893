"""A plan of an arrangement: its stages, its lines for modules and blocks, its collectives and its estimate."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from planner.cost.estimates import arranged_estimate
from planner.cost.expected import expected_collectives
from planner.cost.stages import ranks_of_stages
from planner.cost.training import SharedStages, TrainingCost
from planner.cost.ways import Arrangement
from planner.search.arranged import arrangement_of, module_lines, recompute_lines, settled
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.model import ModelSpec
from planner.spec.paths import NOTHING, Span
from planner.spec.plan import Certificate, Digests, ExpectedCollective, Plan, RunnerUp, Stage
from planner.spec.workload import TrainWorkload
from planner.spec.yaml_text import Source

_UNSEALED = "0" * 64


def plan_of(
    *,
    model: str,
    hardware: str,
    graph: Graph,
    profile: HardwareProfile,
    workload: TrainWorkload,
    arrangement: Arrangement,
    command: str,
    model_digest: str,
    hardware_digest: str,
    certificate: Certificate | None = None,
    runners_up: tuple[RunnerUp, ...] = (),
    model_spec: ModelSpec | None = None,
    hardware_profile: HardwareProfile | None = None,
) -> Plan:
    """The sealed plan of an arrangement. `model` and `hardware` are what the user calls them."""
    made = settled(graph, arrangement)
    estimate = arranged_estimate(graph, profile, workload, made)
    shared = TrainingCost(graph, profile, workload, made.ways).alone(made.strategy, made.layers, made.ways)
    plan = Plan(
        model=model,
        hardware=hardware,
        gpus=made.strategy.gpus,
        workload=workload,
        strategy=made.strategy,
        digests=Digests(model=model_digest, hardware=hardware_digest, layout=_UNSEALED),
        command=command,
        estimate=replace(estimate, model=model, hardware=hardware),
        stages=_stages(made, shared),
        modules=module_lines(graph, made),
        recompute=recompute_lines(graph, made),
        collectives=folded_collectives(expected_collectives(shared)),
        certificate=certificate,
        runners_up=runners_up,
        model_spec=model_spec,
        hardware_profile=hardware_profile,
    )
    return plan.sealed()


def re_estimated(
    plan: Plan,
    graph: Graph,
    profile: HardwareProfile,
    *,
    spec: ModelSpec | None = None,
    source: Source | None = None,
) -> Plan:
    """A plan as a person edited it, with the figures of what it says now; refused where that cannot run.

    It has no certificate and no runners-up: its layout was given, not searched for.
    """
    arrangement = arrangement_of(plan, graph, spec=spec, source=source)
    profile.require_gpus(plan.gpus)
    workload = plan.workload
    assert isinstance(workload, TrainWorkload), "an arrangement is of training"
    return plan_of(
        model=plan.model,
        hardware=plan.hardware,
        graph=graph,
        profile=profile,
        workload=workload,
        arrangement=arrangement,
        command=plan.command,
        model_digest=plan.digests.model,
        hardware_digest=plan.digests.hardware,
        model_spec=plan.model_spec,
        hardware_profile=plan.hardware_profile,
    )


def folded_collectives(listed: Sequence[ExpectedCollective]) -> tuple[ExpectedCollective, ...]:
    """Collectives of single stages with those of equal neighbours put together, kind by kind."""
    kinds: dict[tuple[str, str, str], list[ExpectedCollective]] = {}
    for item in listed:
        kinds.setdefault((item.axis, item.phase, item.kind), []).append(item)
    found: list[ExpectedCollective] = []
    for item in itertools.chain.from_iterable(kinds.values()):
        before = found[-1] if found else None
        if (
            before
            and replace(item, stages=before.stages) == before
            and item.stages.first == before.stages.last + 1
        ):
            found[-1] = replace(before, stages=Span(before.stages.first, item.stages.last))
        else:
            found.append(item)
    return tuple(found)


def _stages(made: Arrangement, shared: SharedStages) -> tuple[Stage, ...]:
    """Layers and seconds of every pipeline rank; the seconds are those of computing, exchanges within included."""
    strategy, stages = made.strategy, shared.stages
    spans = [[NOTHING] * strategy.vpp for _ in range(strategy.pp)]
    following = 0
    ranks = ranks_of_stages(strategy.pp, strategy.vpp, strategy.schedule).tolist()
    for place, (rank, held) in enumerate(zip(ranks, made.layers, strict=True)):
        if held:
            spans[rank][place // strategy.pp] = Span(following, following + held - 1)
        following += held
    blocks = [shared.blocks[name] for name in stages.blocks]
    ahead = stages.rank_sums(stages.sums(np.stack([block.forward_seconds for block in blocks])))
    back = stages.rank_sums(stages.sums(np.stack([block.backward_seconds for block in blocks])))
    return tuple(
        Stage(
            layers=tuple(spans[rank]),
            forward_seconds=float(ahead[rank, 0]),
            backward_seconds=float(back[rank, 0]),
        )
        for rank in range(strategy.pp)
    )
