"""What a pipeline rank may hold, priced for many candidates at once, and its cheapest mix that fits.

Candidates of one table share the number of stages, their schedule and the assignment of every block. What a rank
costs is a sum over its layers, and its memory is linear in the activations that it holds: of a rank with so many
layers of each kind, (1 + reserve) · (held + rest) + context, where the rest depends on which ways it has any of,
not on how many layers run each. So each set of ways is priced once, by the cost model itself, and every mix of
them is compared with what it leaves for activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from planner.cost.activations import Activations
from planner.cost.layouts import Bools, Floats, Ints, Layouts
from planner.cost.schedule import Held
from planner.cost.stages import StageCounts
from planner.cost.steps import OnceAStep
from planner.cost.times import BlockCost
from planner.cost.training import SharedStages, TrainingCost, waited_for
from planner.cost.ways import Way, in_model_order
from planner.search.chain import Chain
from planner.search.mixes import Mixes, mixes
from planner.spec.strategy import Recompute

Kind = tuple[bool, bool, tuple[int, ...]]  # first rank, last rank, layers of each block
Chunks = tuple[tuple[int, ...], ...]  # layers of each block, of each virtual stage of a rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOption:
    """The cheapest mix of a rank under every candidate."""

    mixes: Mixes
    chosen: Ints  # [candidate]: which mix; meaningless where none fits
    fits: Bools  # [candidate]
    ahead: Floats  # seconds of a microbatch, [chunk, candidate]
    back: Floats
    weight: Floats


class RankTable:
    """Prices ranks of candidates that share their stages and assignments."""

    def __init__(
        self,
        cost: TrainingCost,
        chain: Chain,
        layouts: Layouts,
        costs: Mapping[str, BlockCost],
        activations: Mapping[str, Activations],
        together: Mapping[str, frozenset[str]],
        words: Sequence[Recompute],
        capacity_bytes: float,
    ) -> None:
        self.cost, self.chain, self.layouts, self.capacity_bytes = cost, chain, layouts, capacity_bytes
        self.words = tuple(words)
        self.inside = [name for name, inside in zip(chain.blocks, chain.inside, strict=True) if inside]
        self.choices = tuple(len(words) if self.is_layer(name) else 1 for name in self.inside)
        self.ways_of = {
            name: [Way(block=name, whole=whole, recompute=word) for word in words]
            if self.is_layer(name)
            else [Way(block=name, whole=whole)]
            for name, whole in together.items()
        }
        self.ways = in_model_order(cost.graph, [way for ways in self.ways_of.values() for way in ways])
        self.names = tuple(way.name for way in self.ways)
        self.costs = {name: costs[name] for name in self.names}
        self.activations = {name: activations[name] for name in self.names}
        places = [chain.blocks.index(way.block) for way in self.ways]
        self._before = np.where([self.is_layer(way.block) for way in self.ways], 0, chain.before[places])
        self._after = np.where([self.is_layer(way.block) for way in self.ways], 0, chain.after[places])
        self._price_ways()
        self._rows: dict[tuple[Kind, tuple[bool, ...]], int] = {}
        self._options: dict[Any, RankOption] = {}
        self._summed_ends: dict[tuple[str, tuple[bool, bool]], Floats] = {}
        self._of_chunks: dict[tuple[str, Chunks, int], Floats] = {}

    def _price_ways(self) -> None:
        """Each way by itself, and a rank with nothing but neighbours: what messages that it waits for take."""
        units = len(self.names)
        counts = np.concatenate([np.eye(units, dtype=np.int64), np.zeros((1, units), dtype=np.int64)])
        alone = np.arange(units + 1) < units
        shared = self._shared(counts, ~alone, ~alone)
        work = shared.work
        self.hop, self.schedule = work.hop, shared.schedule
        self.ahead, self.back, self.weight = work.ahead[:-1], work.back[:-1], work.weight[:-1]
        self.waiting = work.ahead[-1]
        self.kept, self.unfinished, self.gradients = (
            np.stack([getattr(self.activations[name], item.name) for name in self.names]) for item in fields(Held)
        )
        self.kept[-1] *= len(self.names) == 1  # the logits are no part of what waits
        self.of_inside = np.flatnonzero([way.block in self.inside for way in self.ways])
        self.of_layers = np.flatnonzero([self.is_layer(way.block) for way in self.ways])

    def _shared(self, counts: Ints, sends: Bools, receives: Bools) -> SharedStages:
        ranks = len(counts)
        one = np.ones((ranks, 1), dtype=np.int64)
        stages = StageCounts(
            blocks=self.names,
            counts=counts,
            rank_of=np.arange(ranks),
            pp=ranks,
            sends=sends,
            receives=receives,
            moments=(Held(kept=one, unfinished=0 * one, gradients=0 * one),),
        )
        return SharedStages(self.cost, self.layouts, stages, self.costs, self.activations)

    def is_layer(self, block: str) -> bool:
        """Whether a block is a layer; what stands between two layers is none, and runs nothing again."""
        return self.chain.layer[self.chain.blocks.index(block)]

    def price(self, kinds: Sequence[Kind], chunks: Sequence[Chunks]) -> None:
        """Memory and exchanges of ranks with so many layers in all, under every set of ways."""
        rows: dict[tuple[Kind, tuple[bool, ...]], Ints] = {}
        for kind, parts in zip(kinds, chunks, strict=True):
            found = mixes(parts, self.choices)
            for place, present in enumerate(found.present):
                sample = found.counts[int(np.argmax(found.presence == place))].sum(axis=0)
                rows.setdefault((kind, present), self._counts(kind, sample))
        self._rows = {key: row for row, key in enumerate(rows)}
        self._row_of_kind = {kind: row for (kind, _), row in self._rows.items()}
        self._options.clear()
        counts = np.stack(list(rows.values()))
        nothing = np.zeros(len(counts), dtype=np.bool_)
        shared = self._shared(counts, nothing, nothing)
        memory = self.cost.profile.memory
        held = counts @ self.kept
        device = shared.memory().device.reshape(len(counts), -1)
        self._room = (self.capacity_bytes - device) / (1.0 + memory.reserved_share) + held
        self.once = shared.once_a_step()

    def _counts(self, kind: Kind, of_layers: Ints) -> Ints:
        counts = self._ends(kind[:2])
        counts[self.of_inside] += of_layers
        return counts

    def _ends(self, around: tuple[bool, bool]) -> Ints:
        """What stands before the layers, and behind them, where it is with a stage."""
        first, last = around
        return np.asarray(self._before * first + self._after * last)

    def _of_ends(self, name: str, around: tuple[bool, bool]) -> Floats:
        """Bytes or seconds of the same."""
        key = name, around
        if key not in self._summed_ends:
            self._summed_ends[key] = self._ends(around) @ getattr(self, name)
        return self._summed_ends[key]

    def exchanges(self, kind: Kind, name: str) -> Floats:
        """Seconds of a rank's exchanges or optimizer by their name in OnceAStep."""
        return np.asarray(getattr(self.once, name)[self._row_of_kind[kind]])

    def once_of(self, kinds: Sequence[Kind]) -> OnceAStep:
        """The exchanges of the ranks of a pipeline."""
        names = ("reduce", "gather", "last", "alone", "optimizer")
        each = {name: np.stack([self.exchanges(kind, name) for kind in kinds]) for name in names}
        return OnceAStep(**each, overlapped=self.once.overlapped)

    def option(
        self,
        kind: Kind,
        chunks: Chunks,
        moments: Sequence[Held],
        sends: tuple[bool, ...],
        receives: tuple[bool, ...],
        ends: tuple[tuple[bool, bool], ...],
    ) -> RankOption:
        """The cheapest mix of a rank; its fullest moment is one of these, [chunk, candidate] each.

        `ends` tells for each chunk whether what stands before the layers, and behind them, is with it.
        """
        key = (kind, chunks, tuple(held.key for held in moments), sends, receives, ends)
        if key in self._options:
            return self._options[key]
        found = mixes(chunks, self.choices)
        seconds = found.counts.sum(axis=1) @ self.back[self.of_inside]
        rooms = np.stack([self._room[self._rows[kind, present]] for present in found.present])
        held = np.max([self._held(chunks, moment, ends) for moment in moments], axis=0)
        fitting = np.where(held <= rooms[found.presence], seconds, np.inf)
        chosen = fitting.argmin(axis=0)
        fits = np.isfinite(fitting[chosen, np.arange(len(chosen))])
        counts = found.counts[chosen]  # [candidate, chunk, way]
        work: dict[str, list[Floats]] = {"ahead": [], "back": [], "weight": []}
        for chunk, around in enumerate(ends):
            ahead, back = waited_for(self.schedule, self.cost.workload, sends[chunk], receives[chunk])
            for name, waits in (("ahead", ahead), ("back", back), ("weight", False)):
                work[name].append(self._seconds(name, counts[:, chunk], around) + self.waiting * waits)
        stacked = {name: np.stack(values) for name, values in work.items()}
        self._options[key] = RankOption(mixes=found, chosen=chosen, fits=fits, **stacked)
        return self._options[key]

    def _held(self, chunks: Chunks, held: Held, ends: tuple[tuple[bool, bool], ...]) -> Floats:
        """Bytes of every mix of a rank at a moment, [mix, candidate]."""
        result = np.zeros((len(mixes(chunks, self.choices).counts), len(self.layouts)))
        for item in fields(held):
            counts: Ints = getattr(held, item.name)
            for chunk, around in enumerate(ends):
                if counts[chunk].any():
                    each = self._of_chunk(item.name, chunks, chunk) + self._of_ends(item.name, around)
                    result += each * counts[chunk]
        return result

    def _of_chunk(self, name: str, chunks: Chunks, chunk: int) -> Floats:
        """Bytes of one chunk in every mix, [mix, candidate]."""
        key = name, chunks, chunk
        if key not in self._of_chunks:
            counts = mixes(chunks, self.choices).counts[:, chunk]
            self._of_chunks[key] = counts @ getattr(self, name)[self.of_inside]
        return self._of_chunks[key]

    def _seconds(self, name: str, counts: Ints, ends: tuple[bool, bool]) -> Floats:
        times: Floats = getattr(self, name)
        return np.asarray((counts.T * times[self.of_inside]).sum(axis=0) + self._of_ends(name, ends))
