"""What would fit: changes to a layout that is out of memory, priced together and then estimated one by one.

Single changes come first. Where none of them fits, changes are put together, one more in each round, from the
layouts of the last round that need the least memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from planner.cost.estimates import training_estimate
from planner.cost.training import TrainingCost
from planner.spec.estimate import Estimate
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.legality import violations
from planner.spec.model import ModelSpec
from planner.spec.orders import in_two_parts
from planner.spec.remedy import Remedy
from planner.spec.requests import changed_flags
from planner.spec.strategy import Recompute, Strategy
from planner.spec.workload import TrainWorkload

_MOST = 5  # remedies that are told
_FURTHER = 2  # … of which with more GPUs, where as many GPUs have enough
_ROUNDS = 4  # changes that are put together
_KEPT = 6  # layouts of a round that the next one starts from
_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_SHARDED = 3  # zero


def remedies(
    model: ModelSpec | None, graph: Graph, profile: HardwareProfile, workload: TrainWorkload, strategy: Strategy
) -> tuple[Remedy, ...]:
    """At most five changes after which the layout fits: on as many GPUs first, then the shorter step.

    `strategy` is out of memory; left open, its recomputation counts as the most that can run. Each remedy was
    estimated in full and fits with the upper end of its interval. Empty where nothing tried does.
    """
    search = _Search(model, TrainingCost(graph, profile, workload), strategy)
    same = search.found(strategy.gpus)
    more = tuple(
        remedy for remedy in search.found(profile.largest_gpus or math.inf) if remedy.gpus > strategy.gpus
    )
    return (*same[: max(_MOST - len(more), _MOST - _FURTHER)], *more)[:_MOST]


class _Search:
    """Layouts around one that is out of memory."""

    def __init__(self, model: ModelSpec | None, cost: TrainingCost, strategy: Strategy) -> None:
        self.model, self.cost, self.strategy = model, cost, strategy
        most: Recompute = "none" if in_two_parts(strategy.schedule, strategy.pp) else "full"
        self.start = replace(
            strategy,
            recompute=most if strategy.recompute == "auto" else strategy.recompute,
            dp_replicate=strategy.dp_replicate if strategy.zero else 1,  # without shards every rank is a copy
        )

    def found(self, most_gpus: float) -> tuple[Remedy, ...]:
        """Those of the first round that has any."""
        seen, front = {self.start}, [self.start]
        for _ in range(_ROUNDS):
            changed = dict.fromkeys(after for before in front for after in _changed(before, self.model))
            tried = [after for after in changed if after not in seen and self._legal(after, most_gpus)]
            if not tried:
                break
            seen.update(tried)
            costs = self.cost.costs(tried)
            order = np.lexsort((costs.step_seconds, np.array([item.gpus for item in tried])))
            capacity = self.cost.profile.device.memory_bytes
            hopeful = [tried[place] for place in order if costs.device_bytes[place] <= capacity]
            found = tuple(itertools.islice(self._verified(hopeful), _MOST))
            if found:
                return found
            front = [tried[place] for place in costs.device_bytes.argsort(kind="stable")[:_KEPT]]
        return ()

    def _legal(self, strategy: Strategy, most_gpus: float) -> bool:
        few = strategy.gpus <= most_gpus
        return few and not violations(self.model, self.cost.workload, strategy, strategy.gpus)

    def _verified(self, hopeful: Sequence[Strategy]) -> Iterator[Remedy]:
        """The layouts whose full estimate fits."""
        cost = self.cost
        for strategy in hopeful:
            found = training_estimate(cost.graph, cost.profile, cost.workload, strategy)
            if found.fits:
                yield _remedy(self.strategy, found)


def _remedy(before: Strategy, found: Estimate) -> Remedy:
    return Remedy(
        flags=changed_flags(before, found.strategy),
        strategy=found.strategy,
        step_seconds=found.step_seconds,
        memory_bytes=found.memory_bytes,
        memory_high_bytes=found.uncertainty.memory_bytes.high,
    )


def _changed(strategy: Strategy, model: ModelSpec | None) -> Iterator[Strategy]:
    """A strategy with one thing changed that saves memory; whether it is legal is another's to say."""
    for changes in _changes(strategy, model):
        yield replace(strategy, **changes)


def _changes(s: Strategy, model: ModelSpec | None) -> Iterator[dict[str, Any]]:
    for recompute in _RECOMPUTE[_RECOMPUTE.index(s.recompute) + 1 :] if s.recompute != "auto" else ():
        yield {"recompute": recompute} | ({"schedule": "interleaved"} if in_two_parts(s.schedule, s.pp) else {})
    if s.dp * s.cp > 1:
        yield from ({"zero": zero} for zero in range(s.zero + 1, _SHARDED + 1))
    if s.microbatch > 1:
        yield {"microbatch": s.microbatch // 2}
        yield {"microbatch": 1}
    if s.tp > 1 and not s.sp:
        yield {"sp": True}
    if s.dp_replicate > 1:
        yield {"dp_replicate": 1}
    if s.schedule != "1f1b":
        yield {"schedule": "1f1b", "vpp": 1}
    yield {"ep": 2 * s.ep}
    # out of replicas; where those cannot be halved, out of further GPUs
    left = {"dp": s.dp // 2} if s.dp % 2 == 0 else {}
    axes = ("tp", "pp", "cp") if model is not None else ("pp", "cp")  # nobody says where a tp may cut a module
    yield from ({key: 2 * getattr(s, key), **left} for key in axes)
    yield from ({"dp": 2 * s.dp, "zero": zero} for zero in ([s.zero] if s.zero else [1, 3]))
