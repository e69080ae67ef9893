"""Prices of the assignments of one block, by the cost functions that price a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.cost.activations import BlockActivations
from planner.cost.blocks import BlockPricer
from planner.cost.layouts import Floats, Layouts
from planner.cost.times import PARTS
from planner.cost.ways import Way
from planner.cost.weights import block_weights
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload

_DEVICE = np.array([part != "host" for part in PARTS])


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPrices:
    """Prices a block of a graph under one strategy, nothing run again in backward."""

    graph: Graph
    block: str
    profile: HardwareProfile
    workload: TrainWorkload
    strategy: Strategy

    def __call__(self, assignments: Sequence[frozenset[str]]) -> Floats:
        """[assignment, (device seconds of forward and backward, weight elements of a rank, kept bytes)]."""
        layouts = Layouts.of([self.strategy], self.workload.global_batch)
        ways = [Way(block=self.block, whole=whole, recompute="none") for whole in assignments]
        pricer = BlockPricer(self.graph, self.profile, self.workload, ways)
        costs, activations = pricer.costs(layouts), BlockActivations(pricer, layouts)
        found: dict[frozenset[str], tuple[float, float, float]] = {}
        for way in ways:
            cost, kernels = costs[way.name], pricer.kernels[way.name]
            weights = block_weights(kernels.block, kernels.splits, layouts)
            found[way.whole] = (
                float((cost.forward + cost.backward)[_DEVICE, 0].sum()),
                float((weights.dense + weights.experts)[0]),
                float(activations.of(way.name).kept[0]),
            )
        return np.array([found[whole] for whole in assignments])
