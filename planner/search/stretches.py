"""The stretches of layers that a stage of one rank may hold, priced for every candidate of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.cost.layouts import Floats
from planner.cost.steps import StageWork, exposed_exchanges
from planner.search.pipelines import Pipelines
from planner.search.ranks import Kind, RankOption


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Layers that one stage may hold, wherever they begin, priced for every candidate."""

    firsts: range  # layers that it may begin with
    layers: int
    held: tuple[int, ...]  # of each kind, where equal layers stand together
    option: RankOption
    kind: Kind
    both: Floats  # forward and backward of a microbatch, [candidate]
    gather: Floats  # exposed at either end of a step, if this were the first rank
    reduce: Floats
    optimizer: Floats  # with the copies around exchanges
    alone: Floats  # a step of this rank alone: microbatches, optimizer, host; infinite where it does not fit


class Stretches:
    """Of every stage those that leave no other stage more layers than it may hold."""

    def __init__(self, pipelines: Pipelines, most_layers: int) -> None:
        self.pipelines, self.table = pipelines, pipelines.table
        self.chain, self.pp = self.table.chain, pipelines.pp
        self.most, self.in_runs = min(most_layers, self.chain.layers), self.chain.in_runs
        self.of_stages = self._priced()

    def _priced(self) -> list[list[Stretch]]:
        shapes = [self._shapes(stage) for stage in range(self.pp)]
        asked = {
            self._kind(stage, firsts[0], layers): self._chunks(firsts[0], layers)
            for stage, found in enumerate(shapes)
            for firsts, layers in found
        }
        self.table.price(list(asked), list(asked.values()))
        return [[self._stretch(stage, *shape) for shape in found] for stage, found in enumerate(shapes)]

    def _shapes(self, stage: int) -> list[tuple[range, int]]:
        """Where what a stage may hold begins, and how many layers it is; the other stages can hold the rest.

        Only an end of the model may be a stage by itself.
        """
        total, after = self.chain.layers, self.pp - 1 - stage
        alike: dict[tuple[Any, int], list[int]] = {}
        for layers in range(0 < stage < self.pp - 1, self.most + 1):
            earliest = max(0, total - layers - after * self.most)
            latest = min(stage * self.most, total - layers)
            for first in range(earliest, latest + 1):
                alike.setdefault((self._held(first, layers) or first, layers), []).append(first)
        return [(range(firsts[0], firsts[-1] + 1), layers) for (_, layers), firsts in alike.items()]

    def _held(self, first: int, layers: int) -> tuple[int, ...]:
        """Layers of each kind; nothing where kinds take turns, for there the place decides."""
        if not self.in_runs:
            return ()
        kinds = self.chain.kinds
        inside = kinds[first : first + layers]
        return tuple(inside.count(kind) for kind in range(max(kinds) + 1))

    def _chunks(self, first: int, layers: int) -> tuple[tuple[int, ...], ...]:
        return (self.chain.inside_of(first, first + layers),)

    def _kind(self, stage: int, first: int, layers: int) -> Kind:
        return stage == 0, stage == self.pp - 1, self._chunks(first, layers)[0]

    def _stretch(self, stage: int, firsts: range, layers: int) -> Stretch:
        kind, last = self._kind(stage, firsts[0], layers), stage == self.pp - 1
        option = self.table.option(
            kind,
            self._chunks(firsts[0], layers),
            self.pipelines.moments[stage],
            sends=(not last,),
            receives=(stage > 0,),
            ends=((stage == 0, last),),
        )
        once = self.table.once_of([kind])
        work = StageWork(ahead=option.ahead, back=option.back, weight=option.weight, hop=self.table.hop)
        gather, reduce = exposed_exchanges(work, once)
        both = option.ahead[0] + option.back[0]
        step = self.table.layouts.microbatches * both + once.behind[0] + self.pipelines.host
        return Stretch(
            firsts=firsts, layers=layers, held=self._held(firsts[0], layers), option=option, kind=kind, both=both,
            gather=gather[0], reduce=reduce[0], optimizer=once.behind[0],
            alone=np.where(option.fits, step, np.inf),
        )  # fmt: skip
