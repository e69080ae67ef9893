"""A bound below the step of every candidate, whatever its stages, splits and recomputation: admissible and cheap.

Let W be the least seconds of one microbatch through all blocks, m the microbatches, p the stages.

- Uneven stages (gpipe, 1f1b): rank i waits for those before it, works, and they finish after it, so
  T ≥ Σ_{j<i} t_j + m·t_i for each i. With Σ t = W the least of the largest of these is W / (1 − (1 − 1/m)^p).
- Some stage holds ⌈layers / p⌉ layers: T ≥ m times so many of the cheapest layer.
- Even stages (interleaved, zb, zbv): the same first sums over what a rank holds, m·W/p the least of them.
- The optimizer of the rank with the most weights takes at least that of the mean; the host its share once.

And a bound below the memory of the fullest rank: states of the mean weights while all gradients wait, and one
microbatch of the mean layers, each kept as cheaply as any way keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.blocks import BlockPricer
from planner.cost.elementwise import elementwise_seconds, optimizer_bytes_per_parameter
from planner.cost.layouts import Floats, Ints, Layouts
from planner.cost.stages import even_layers, ranks_of_stages
from planner.cost.states import least_state_bytes
from planner.search.prices import LeastPrices, alike
from planner.spec.orders import SPLIT_BACKWARD
from planner.units import GIB

_AT_ONCE = 2**17  # candidates, so that what is summed up on the way stays small


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of every candidate."""

    step_seconds: Floats
    device_bytes: Floats


def bounds(pricer: BlockPricer, prices: LeastPrices, layouts: Layouts, layers: int) -> Bounds:
    """No step of a candidate is shorter, and no peak of its fullest rank lower."""
    step, device = np.empty((2, len(layouts)))
    for first in range(0, len(layouts), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        some, rows = layouts.take(part), np.arange(len(layouts))[part]
        contexts = prices.found.of_row[rows]
        step[part] = _pipeline(prices, some, contexts, layers) + once_a_step(pricer, prices, some, rows)
        device[part] = _memory(pricer, some, *_weights(prices, some, rows), prices.kept[contexts] / some.pp)
    return Bounds(step_seconds=step, device_bytes=device)


def _weights(prices: LeastPrices, layouts: Layouts, rows: Ints) -> tuple[Floats, Floats]:
    """Of the mean rank of candidates, which are these rows of all: dense ones and experts."""
    contexts, pp = prices.found.of_row[rows], layouts.pp.astype(np.float64)
    of_ranks = np.where(layouts.pp == 1, prices.dense_once[contexts], prices.dense[contexts])
    return of_ranks / pp, prices.experts[contexts] / pp


def _pipeline(prices: LeastPrices, layouts: Layouts, contexts: Ints, layers: int) -> Floats:
    pp, count = layouts.pp.astype(np.float64), layouts.microbatches.astype(np.float64)
    through, layer = (prices.forward + prices.backward)[contexts], prices.layer_seconds[contexts]
    uneven = through / (1.0 - (1.0 - 1.0 / count) ** pp)
    fullest = count * np.ceil(layers / pp) * layer
    even = np.maximum(count * through / pp, _even_rounds(layouts, layers) * layer)
    return np.asarray(np.where(layouts.vpp == 1, np.maximum(uneven, fullest), even))


def _even_rounds(layouts: Layouts, layers: int) -> Floats:
    """In layers: the most that a rank of an even pipeline computes and waits for, before its work and after it.

    Where backward is split, gradients of weights may fill the wait: it is left out.
    """
    result = np.zeros(len(layouts))
    several = np.flatnonzero(layouts.vpp > 1)
    words, schedules = np.unique(layouts.schedule[several], return_inverse=True)
    keys = [layouts.pp[several], layouts.vpp[several], layouts.microbatches[several], schedules.reshape(-1)]
    first, where = alike(keys)
    longest = np.zeros(len(first))
    for place, (pp, vpp, count, schedule) in enumerate(zip(*(key[first].tolist() for key in keys), strict=True)):
        held = np.array(even_layers(layers, pp * vpp))
        ranks = ranks_of_stages(pp, vpp, words[schedule])
        waits = np.cumsum(held[:pp]) - held[:pp] if words[schedule] not in SPLIT_BACKWARD else 0
        longest[place] = (count * np.bincount(ranks, weights=held) + waits).max()
    result[several] = longest[where]
    return result


def once_a_step(pricer: BlockPricer, prices: LeastPrices, layouts: Layouts, rows: Ints) -> Floats:
    """What the optimizer and the host add to a step of candidates, which are these rows of all."""
    dense, experts = _weights(prices, layouts, rows)
    copies = np.where(layouts.zero > 0, np.maximum(layouts.expert_dp // layouts.dp_replicate, 1), 1)
    each = optimizer_bytes_per_parameter(pricer.workload.optimizer, pricer.width)
    moved = (dense / np.maximum(layouts.dp_shard, 1) + experts / copies) * (each + layouts.gradient_bytes)
    device, curve = pricer.profile.device, pricer.profile.elementwise
    return np.asarray(elementwise_seconds(device, curve, moved) + pricer.software.step_us * 1e-6)


def _memory(pricer: BlockPricer, layouts: Layouts, dense: Floats, experts: Floats, kept: Floats) -> Floats:
    memory = pricer.profile.memory
    held = least_state_bytes(pricer, layouts, dense, experts) + kept + memory.workspace_gib * GIB
    return np.asarray(held * (1.0 + memory.reserved_share) + memory.context_gib * GIB)
