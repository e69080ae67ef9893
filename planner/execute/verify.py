"""A plan dry-run at its full size: every distinct pipeline rank once, beside what the plan promises of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from planner.errors import PlannerError
from planner.execute.adapters import require_decoder
from planner.execute.dry_rank import DryRank, DrySteps, extrapolated, short_order
from planner.execute.dryrun import DryRun, fake_world, meshes_of
from planner.execute.fused import fused_kernels
from planner.execute.huggingface_build import build_huggingface
from planner.execute.mesh import first_rank_of_stage
from planner.execute.pieces import Repeated, sample_order
from planner.models.block import Block
from planner.spec.model import ModelSpec
from planner.spec.orders import SPLIT_BACKWARD, Action, messages, orders, rank_stages
from planner.spec.paths import Span, lookup
from planner.spec.plan import Plan
from planner.spec.strategy import Recompute, Strategy
from planner.spec.verification import MemoryCheck, StageCheck, Verification, compared
from planner.spec.workload import TrainWorkload


def verify_layout(
    plan: Plan,
    spec: ModelSpec,
    kinds: Sequence[str],
    *,
    told: Callable[[str], None] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Verification:
    """Dry-run a plan's ranks; `kinds` names the kind of block of each layer, equal ones alike.

    Stages are those of the bundled decoder, or with `config` of the module that transformers builds from it.
    """
    workload, strategy = runnable(plan, spec)
    model = build_huggingface(config) if config else None

    def made(rank: int) -> DryRank:
        return DryRank(
            spec,
            meshes_of(spec, strategy),
            workload,
            plan.modules,
            plan.stages[rank].layers,
            rank=rank,
            recompute=_recompute(plan),
            model=model,
        )

    return verify_ranks(plan, _Layers(plan, spec, kinds).of, made, told)


def verify_ranks(
    plan: Plan,
    layer: Callable[[int], Any],
    made: Callable[[int], DrySteps],
    told: Callable[[str], None] | None,
) -> Verification:
    """The same of ranks that `made` makes; `layer` is equal for layers that run alike.

    Ranks whose modules are equal are built once and run three microbatches, or fewer where a step has no more.
    Collectives follow from what the second of them issues. In a pipeline a peak is put together from what each
    forward and backward does to memory; where these differ from one another, the rank's own order is run.
    """
    strategy = plan.strategy
    count = strategy.microbatches(training_of(plan).global_batch)
    checks: dict[int, StageCheck] = {}
    for ranks in _equal_ranks(plan, layer):
        if told is not None:
            told(f"stage {ranks[0]}" + (f" and {len(ranks) - 1} like it" if len(ranks) > 1 else ""))
        with fake_world(strategy.gpus, first_rank_of_stage(strategy, ranks[0])), fused_kernels():
            run = _Run(made(ranks[0]), count)
            checks |= {number: run.checked(plan, number) for number in ranks}
    return Verification(
        model=plan.model,
        gpus=plan.gpus,
        strategy=strategy,
        microbatches=count,
        stages=tuple(checks[rank] for rank in range(strategy.pp)),
    )


class _Run:
    """Ranks with equal modules: what they issue, and their peaks by what they hold."""

    def __init__(self, rank: DrySteps, count: int) -> None:
        self.rank, self.count, self.strategy = rank, count, rank.meshes.strategy
        self.first = _rank_of(self.strategy, rank.numbers)
        self.peaks: dict[tuple[Action, ...], int] = {}
        self.repeated: Repeated | None = None
        sample = sample_order(rank.numbers, split=self.strategy.schedule in SPLIT_BACKWARD)
        sampled = self.strategy.pp > 1 and count >= _microbatches(sample)
        order = sample if sampled else self._renamed(short_order(self.strategy, self.first, count))
        step = rank.step(order, clip=True)
        self.peaks[order] = step.peak.bytes
        if sampled:
            repeated = Repeated(order, step.pieces)
            self.repeated = repeated if repeated.found else None
        found = extrapolated(step, count - _microbatches(order))
        self.collectives = DryRun(collectives=found, peak=step.peak)

    def checked(self, plan: Plan, number: int) -> StageCheck:
        """One of the ranks beside the plan."""
        stages = Span(number, number)
        planned = tuple(
            replace(item, stages=stages)
            for item in plan.collectives
            if item.stages.first <= number <= item.stages.last
        )
        order = orders(self.strategy.schedule, self.strategy.pp, self.strategy.vpp, self.count)[number]
        return StageCheck(
            stage=number,
            same_as=self.first,
            layers=plan.stages[number].layers,
            collectives=compared(planned, self.collectives.as_expected(stages)),
            memory=_memory(plan, number, self._peak(number, order), _most_held(order)),
        )

    def _peak(self, number: int, order: Sequence[Action]) -> int:
        """Bytes that tensors take at most on one of the ranks, which runs in this order."""
        found = self.repeated.peak(self._renamed(order)) if self.repeated is not None else None
        if found is not None:
            return found
        short = self._renamed(short_order(self.strategy, number, self.count))
        if short not in self.peaks:
            self.peaks[short] = self.rank.step(short, clip=True).peak.bytes
        return self.peaks[short]

    def _renamed(self, order: Sequence[Action]) -> tuple[Action, ...]:
        """The same, its virtual stages taken for those of the rank that runs."""
        stages = dict(zip(sorted({action.stage for action in order}), self.rank.numbers, strict=True))
        return tuple(action._replace(stage=stages[action.stage]) for action in order)


def _memory(plan: Plan, number: int, found: int, in_flight: int) -> MemoryCheck:
    """The plan's interval is of its fullest rank: of another one it is as wide for its size."""
    estimate = plan.estimate
    memory, interval = estimate.memory_per_stage[number], estimate.uncertainty.memory_bytes
    share = memory.device_bytes / estimate.memory_bytes
    return MemoryCheck(
        planned_bytes=memory.device_bytes,
        found_bytes=found + memory.device_bytes - memory.allocated_bytes,
        low_bytes=interval.low * share,
        high_bytes=interval.high * share,
        planned_tensor_bytes=memory.allocated_bytes,
        found_tensor_bytes=found,
        in_flight=in_flight,
    )


def _equal_ranks(plan: Plan, of: Callable[[int], Any]) -> list[list[int]]:
    """Pipeline ranks grouped by what their virtual stages hold, and send."""
    strategy = plan.strategy
    placed = strategy.schedule, strategy.pp, strategy.vpp
    last = strategy.pp * strategy.vpp - 1
    groups: dict[Any, list[int]] = {}
    for rank, numbers in enumerate(rank_stages(*placed)):
        spans = plan.stages[rank].layers
        held = tuple(
            (
                number == 0,
                number == last,
                tuple(messages(*placed, number)),
                tuple(of(layer) for layer in range(span.first, span.last + 1)),
            )
            for number, span in zip(numbers, spans, strict=True)
        )
        groups.setdefault(held, []).append(rank)
    return list(groups.values())


class _Layers:
    """What makes two layers run alike: their kind, their splits, what they run again."""

    def __init__(self, plan: Plan, spec: ModelSpec, kinds: Sequence[str]) -> None:
        self.plan, self.kinds = plan, kinds
        self.modules: dict[str, tuple[str, ...]] = {}
        with torch.device("meta"):
            for kind in dict.fromkeys(kinds):
                block = Block(spec, kinds.index(kind))
                self.modules[kind] = tuple(path for path, _ in block.named_modules() if path)

    def of(self, layer: int) -> Any:
        """Equal for layers that run alike."""
        kind, path = self.kinds[layer], f"blocks.{layer}"
        splits = tuple(lookup(self.plan.modules, f"{path}.{module}") for module in self.modules[kind])
        return kind, splits, self.plan.recompute_of(path)


def _recompute(plan: Plan) -> Mapping[str, Recompute] | None:
    """By block, or none where the strategy's own word stands."""
    return plan.recompute if plan.recompute or plan.strategy.recompute == "auto" else None


def _microbatches(order: Sequence[Action]) -> int:
    return len({action.microbatch for action in order})


def _most_held(actions: Sequence[Action]) -> int:
    """Microbatches between forward and backward, each counted in every virtual stage that holds it."""
    held = most = 0
    for action in actions:
        held += {"F": 1, "W": 0}.get(action.kind, -1)
        most = max(most, held)
    return most


def _rank_of(strategy: Strategy, numbers: Sequence[int]) -> int:
    return rank_stages(strategy.schedule, strategy.pp, strategy.vpp).index(tuple(numbers))


def runnable(plan: Plan, spec: ModelSpec) -> tuple[TrainWorkload, Strategy]:
    """What can be dry-run is a decoder's training."""
    require_decoder(spec, plan.model)
    return training_of(plan), plan.strategy


def training_of(plan: Plan) -> TrainWorkload:
    """The work of a plan of training."""
    if not isinstance(plan.workload, TrainWorkload):
        raise PlannerError(
            "a dry run is of a training step",
            value=plan.workload.mode,
            remedy="give a plan of mode: train",
            key="mode",
        )
    return plan.workload
