"""Whole pipelines out of what their ranks hold: the exact step of chosen stages, for many candidates at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from planner.cost.layouts import Floats, Ints
from planner.cost.schedule import Held, fullest_moments
from planner.cost.stages import even_layers, ranks_of_stages
from planner.cost.steps import StageWork, least_seconds, step
from planner.cost.ways import Arrangement, Way
from planner.search.ranks import Chunks, Kind, RankOption, RankTable
from planner.spec.strategy import Recompute, Schedule, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Stages chosen alike for every candidate of a table, each rank with its cheapest mix."""

    layers: tuple[int, ...]  # of each virtual stage
    options: tuple[RankOption, ...]  # of each rank
    seconds: Floats  # infinite where a rank does not fit


class Pipelines:
    """The pipelines of the candidates of one table."""

    def __init__(self, table: RankTable) -> None:
        self.table, layouts = table, table.layouts
        self.pp, self.vpp = int(layouts.pp[0]), int(layouts.vpp[0])
        self.schedule = cast("Schedule", str(layouts.schedule[0]))
        self.rank_of: list[int] = ranks_of_stages(self.pp, self.vpp, self.schedule).tolist()
        self.stages_of = [
            [stage for stage, held in enumerate(self.rank_of) if held == rank] for rank in range(self.pp)
        ]
        counts, where = np.unique(layouts.microbatches, return_inverse=True)
        moments = [fullest_moments(self.schedule, self.pp, self.vpp, int(count)) for count in counts]
        stacked = [Held.stacked(every, where.reshape(-1)) for every in zip(*moments, strict=True)]
        self.moments = [tuple(held.of_rank(rank) for held in stacked) for rank in range(self.pp)]  # of each rank
        self._chunks: dict[tuple[int, ...], list[Chunks]] = {}  # of each rank, of the stages asked for last

    def even(self, limit_seconds: float = np.inf) -> Pipeline:
        """Layers spread evenly; infinite where a step is not below the limit."""
        layers = even_layers(self.table.chain.layers, self.pp * self.vpp)
        kinds = [self.kind(rank, layers) for rank in range(self.pp)]
        chunks = [self.chunks(rank, layers) for rank in range(self.pp)]
        self.table.price(kinds, chunks)
        return self.priced(layers, limit_seconds)

    def priced(self, layers: tuple[int, ...], limit_seconds: float = np.inf) -> Pipeline:
        """Stages with so many layers each, whose ranks the table has priced."""
        options = tuple(self.option(rank, layers) for rank in range(self.pp))
        kinds = [self.kind(rank, layers) for rank in range(self.pp)]
        fits = np.all([option.fits for option in options], axis=0)
        least = np.where(fits, self.least(kinds, options), np.inf)
        seconds = least if self.vpp == 1 else self._exact(kinds, options, least, limit_seconds)
        return Pipeline(layers=layers, options=options, seconds=np.where(seconds < limit_seconds, seconds, np.inf))

    def _exact(
        self, kinds: Sequence[Kind], options: Sequence[RankOption], least: Floats, limit_seconds: float
    ) -> Floats:
        """The steps of candidates that may be below the limit and all others; infinite for the rest."""
        seconds = np.full_like(least, np.inf)
        left = np.flatnonzero(least < limit_seconds)
        left = left[np.argsort(least[left], kind="stable")]
        size = 1
        while len(left):
            seconds[left[:size]] = self.seconds(kinds, options, left[:size])
            limit_seconds = min(limit_seconds, float(seconds[left[:size]].min()))
            left = left[size:]
            left = left[least[left] < limit_seconds]
            size *= 4
        return seconds

    def option(self, rank: int, layers: tuple[int, ...]) -> RankOption:
        """The cheapest mix of a rank of a pipeline with these layers."""
        stages, last = self.stages_of[rank], len(self.rank_of) - 1
        return self.table.option(
            self.kind(rank, layers),
            self.chunks(rank, layers),
            self.moments[rank],
            sends=tuple(self._leaves(stage) for stage in stages),
            receives=tuple(stage > 0 and self._leaves(stage - 1) for stage in stages),
            ends=tuple((stage == 0, stage == last) for stage in stages),
        )

    def _leaves(self, stage: int) -> bool:
        return bool(stage + 1 < len(self.rank_of) and self.rank_of[stage] != self.rank_of[stage + 1])

    def chunks(self, rank: int, layers: tuple[int, ...]) -> Chunks:
        """Layers of each block in each virtual stage of a rank."""
        if layers not in self._chunks:
            borders = list(itertools.accumulate(layers, initial=0))
            held = [self.table.chain.inside_of(*ends) for ends in itertools.pairwise(borders)]
            self._chunks = {layers: [tuple(held[stage] for stage in stages) for stages in self.stages_of]}
        return self._chunks[layers][rank]

    def kind(self, rank: int, layers: tuple[int, ...]) -> Kind:
        """What a rank's memory and exchanges depend on."""
        chunks = self.chunks(rank, layers)
        return rank == 0, rank == self.rank_of[-1], tuple(map(sum, zip(*chunks, strict=True)))

    def work(self, options: Sequence[RankOption]) -> StageWork:
        """Seconds of every virtual stage, [virtual stage, candidate]."""

        def of(name: str) -> Floats:
            placed = enumerate(self.rank_of)
            return np.stack([getattr(options[rank], name)[stage // self.pp] for stage, rank in placed])

        return StageWork(ahead=of("ahead"), back=of("back"), weight=of("weight"), hop=self.table.hop)

    def least(self, kinds: Sequence[Kind], options: Sequence[RankOption]) -> Floats:
        """Seconds that no step with these options is below."""
        found = least_seconds(
            self.schedule,
            self.work(options),
            self.table.once_of(kinds),
            rank_of=np.array(self.rank_of),
            microbatches=self.table.layouts.microbatches,
            pp=self.pp,
            vpp=self.vpp,
        )
        return found + self.host

    @property
    def host(self) -> float:
        """What the host does once a step."""
        return self.table.cost.pricer.software.step_us * 1e-6

    def seconds(self, kinds: Sequence[Kind], options: Sequence[RankOption], candidates: Ints) -> Floats:
        """The cost model's step of some candidates, what the host does once included."""
        work, once = self.work(options), self.table.once_of(kinds)
        found = step(
            self.schedule,
            work.take(candidates),
            once.take(candidates),
            rank_of=np.array(self.rank_of),
            microbatches=self.table.layouts.microbatches[candidates],
            pp=self.pp,
            vpp=self.vpp,
        )
        return found.seconds + self.host

    def arrangement(self, strategy: Strategy, pipeline: Pipeline, candidate: int) -> Arrangement:
        """One candidate with every choice made: on a rank the first layers run the most again."""
        table, chain = self.table, self.table.chain
        ends = np.cumsum(pipeline.layers)
        words: list[Recompute] = []
        blocks: list[str] = []
        for stage, rank in enumerate(self.rank_of):
            option = pipeline.options[rank]
            counts = option.mixes.counts[option.chosen[candidate], stage // self.pp]
            left = {name: _again(counts, place, table) for place, name in enumerate(table.inside)}
            words += chain.reruns(int(ends[stage] - pipeline.layers[stage]), int(ends[stage]), left)
        ways: list[Way] = []
        following = iter(words)
        for placement in table.cost.graph.sequence:
            word = next(following) if placement.path else None
            whole = table.ways_of[placement.block][0].whole
            ways.append(Way(block=placement.block, whole=whole, recompute=word))
            blocks.append(placement.block)
        one = set(words)
        uniform: Recompute | str = one.pop() if len(one) == 1 else "auto"
        return Arrangement(strategy=_with_recompute(strategy, uniform), layers=pipeline.layers, ways=tuple(ways))


def _again(counts: Ints, block: int, table: RankTable) -> list[Recompute]:
    """The words of a chunk's layers of one block, the most first; of what is no layer none."""
    if table.choices[block] == 1 and not table.is_layer(table.inside[block]):
        return []
    start = sum(table.choices[:block])
    own = counts[start : start + table.choices[block]]
    pairs = reversed(list(zip(table.words, own.tolist(), strict=True)))
    return [word for word, count in pairs for _ in range(count)]


def _with_recompute(strategy: Strategy, word: str) -> Strategy:
    from dataclasses import replace

    return replace(strategy, recompute=word)  # type: ignore[arg-type]
