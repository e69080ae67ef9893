"""The best layout of a model on so many GPUs, and the proof: every other one is illegal, slower or too large.

Even pipelines of one candidate for each combination of degrees give a first best step. Candidates without room for
a better one fall away (bounds.py, rooms.py); the others are taken in the order of their bounds, many at once.
Those that share stages and schedule make a table (ranks.py) that prices all ranks which they could have: even
pipelines are exact from there, and uneven ones go through passes over their borders (borders.py). What can still
be faster is looked at chain by chain (chains.py), or solved as an integer program (stages.py) where the chains are
too many. When no bound left is below the best step, that is the best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from planner.cost.layouts import Bools, Floats, Ints, Layouts
from planner.cost.times import BlockCost
from planner.cost.training import TrainingCost
from planner.cost.uncertainty import memory_headroom
from planner.cost.ways import Arrangement
from planner.search.borders import Borders
from planner.search.bounds import bounds
from planner.search.chain import Chain
from planner.search.chains import shortest
from planner.search.choices import choices_of
from planner.search.pipelines import Pipeline, Pipelines
from planner.search.prices import LeastLayer, LeastPrices, alike, block_costs
from planner.search.ranks import RankTable
from planner.search.rooms import Rooms
from planner.search.space import Space
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.plan import Certificate
from planner.spec.strategy import Recompute, Schedule
from planner.spec.wishes import Wishes
from planner.spec.workload import TrainWorkload

_BATCH = 512  # candidates that are priced together
_ROWS_A_RANK = 128  # most candidates of a table for each rank: the fewer ranks, the more mixes each has
_HALVINGS = 4  # of the interval between a candidate's bound and the best step
_PASSES = 12  # over the borders of a table, each halving what the best step may still lose
_EXACTLY = 120  # stretches of a pipeline up to which its integer program is solved without any gap
_NEAR = 1e-3  # of the best step, which larger ones may leave open
_SMALLER = 1e-12  # of a step, by which a better one is better


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a search has come."""

    explored: int
    candidates: int
    best_seconds: float
    bound_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A candidate with its stages."""

    seconds: float
    row: int
    arrangement: Arrangement


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The answer of a search: the best first, then others with other degrees; empty where nothing fits."""

    best: tuple[Solved, ...]
    certificate: Certificate
    interrupted: bool


class Search:
    """One search; nothing of it outlives it."""

    def __init__(
        self,
        graph: Graph,
        profile: HardwareProfile,
        workload: TrainWorkload,
        space: Space,
        wishes: Wishes,
        *,
        limit_seconds: float = np.inf,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.space, self.wishes, self.progress = space, wishes, progress
        self.graph, self.workload = graph, workload
        self.choices = choices_of(graph, cut=bool((space.layouts.tp > 1).any()))
        self.cost = TrainingCost(graph, profile, workload, self.choices.ways(graph, wishes.allowed_recompute))
        self.chain = Chain.of(graph)
        self.capacity = wishes.capacity_bytes(profile.device.memory_bytes) / memory_headroom(
            graph, profile, workload
        )
        self.best = limit_seconds  # only shorter steps count
        self.open = np.inf  # what large pipelines may still save, each within a small share of the best step
        self.floor = 0.0  # no candidate that is left has a shorter one
        self.by_degrees: dict[tuple[int, ...], Solved] = {}
        self.evaluated: set[int] = set()
        self.until = time.monotonic() + (wishes.time_limit_seconds or np.inf)

    def run(self) -> Found:
        """Candidates in the order of their bounds until none can be better; an interrupt gives the best so far."""
        self.prices = LeastPrices(self.cost.pricer, self.choices, self.space.layouts)
        least = bounds(self.cost.pricer, self.prices, self.space.layouts, self.chain.layers)
        step = least.step_seconds
        left = np.flatnonzero(least.device_bytes <= self.capacity)
        left = left[np.argsort(step[left], kind="stable")]
        interrupted = False
        try:
            self._batch(self._first_of_degrees(left), usual=True)
            left, tighter = self._narrowed(left, step)
            while len(left) and tighter[0] < self.best and not interrupted:
                self.floor = float(tighter[0])
                self._batch(left[:_BATCH])
                left, tighter = left[_BATCH:], tighter[_BATCH:]
                self.progress(self._progress(float(tighter[0]) if len(left) else self.best))
                keep = tighter < self.best
                left, tighter = left[keep], tighter[keep]
                interrupted = bool(len(left)) and time.monotonic() > self.until
            bound = float(tighter[0]) if interrupted else self.best
        except KeyboardInterrupt:
            interrupted, bound = True, float(step[left[0]]) if len(left) else self.best
        return self._found(bound, interrupted)

    def _first_of_degrees(self, rows: Ints) -> Ints:
        """Of each combination of degrees the candidate with the least bound: the first bests are among them."""
        layouts = self.space.layouts
        degrees = [column[rows] for column in (layouts.tp, layouts.pp, layouts.cp, layouts.ep)]
        first, _ = alike([*degrees, (layouts.zero[rows] == 3).astype(np.int64)])
        return rows[np.sort(first)][:_BATCH]

    def _narrowed(self, rows: Ints, step: Floats) -> tuple[Ints, Floats]:
        """Candidates that have room for a better step, in the order of the least step they have room for."""
        rows = rows[step[rows] < self.best]
        if not np.isfinite(self.best) or not len(rows):
            return rows, step[rows]
        rooms = self._rooms(rows)
        roomy = np.flatnonzero(rooms.below(np.full(len(rows), self.best)))
        rows, rooms = rows[roomy], rooms.take(roomy)
        low, high = step[rows].copy(), np.full(len(rows), self.best)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            under = rooms.below(middle)
            low, high = np.where(under, low, middle), np.where(under, middle, high)
        order = np.argsort(low, kind="stable")
        return rows[order], low[order]

    def _rooms(self, rows: Ints, layer: LeastLayer | None = None) -> Rooms:
        return Rooms(self.cost.pricer, self.prices, self.space.layouts, rows, self.capacity, layer)

    def _progress(self, bound: float) -> Progress:
        return Progress(
            explored=len(self.evaluated),
            candidates=len(self.space),
            best_seconds=self.best,
            bound_seconds=min(bound, self.best),
        )

    def _batch(self, rows: Ints, *, usual: bool = False) -> None:
        """Candidates with their usual assignment, then the others; `usual` with even stages is a first guess."""
        if not len(rows):
            return
        layouts = self.space.layouts.take(rows)
        costs, activations = block_costs(self.cost.pricer, layouts), self.prices.activations(rows)
        self.evaluated.update(rows.tolist())
        for place, together in enumerate(self.choices.together[:1] if usual else self.choices.together):
            runs = self._others(place, rows, costs) if place else np.ones(len(rows), dtype=np.bool_)
            for group in sorted(_groups(layouts, np.flatnonzero(runs)), key=lambda rows: layouts.vpp[rows[0]] > 1):
                table = RankTable(
                    self.cost,
                    self.chain,
                    layouts.take(group),
                    {name: cost.take(group) for name, cost in costs.items()},
                    {name: found.take(group) for name, found in activations.items()},
                    together,
                    self._words(layouts, group),
                    self.capacity,
                )
                self._table(Pipelines(table), rows[group], even=usual)

    def _words(self, layouts: Layouts, group: Ints) -> tuple[Recompute, ...]:
        """What blocks may recompute under candidates that share their stages and schedule."""
        schedule = cast("Schedule", str(layouts.schedule[group[0]]))
        return self.wishes.recompute_under(schedule, int(layouts.pp[group[0]]))

    def _others(self, place: int, rows: Ints, costs: Mapping[str, BlockCost]) -> Bools:
        """Candidates that may be better under another assignment than the usual one."""
        together = self.choices.together[place]
        layouts = self.space.layouts.take(rows)
        allowed = np.array([self.choices.allowed[sp][place] for sp in (False, True)])
        runs: Bools = np.asarray((layouts.tp > 1) & allowed[layouts.sp.astype(np.int64)])
        runs &= ~self.prices.dominated(together)[self.prices.found.of_row[rows]]
        runs &= self._through(costs, together, layouts) < self.best
        left = np.flatnonzero(runs)
        if len(left) and np.isfinite(self.best):
            rooms = self._rooms(rows[left], self.prices.layer_of(together))
            runs[left] = rooms.below(np.full(len(left), self.best))
        return runs

    def _through(
        self, costs: Mapping[str, BlockCost], together: Mapping[str, frozenset[str]], layouts: Layouts
    ) -> Floats:
        """A bound of the steps under one assignment: one microbatch after the other through a mean stage."""
        through: Floats = np.zeros(len(layouts))
        repeats = self.graph.repeats()
        for block, whole in together.items():
            ways = [way.name for way in self.cost.pricer.ways if (way.block, way.whole) == (block, whole)]
            each = [costs[name].forward_seconds + costs[name].backward_seconds for name in ways]
            through = through + repeats[block] * np.min(each, axis=0)
        return np.asarray(through * layouts.microbatches / layouts.pp)

    def _table(self, pipelines: Pipelines, rows: Ints, *, even: bool) -> None:
        self._offer(pipelines, pipelines.even(self.best), rows)
        if pipelines.vpp == 1 and pipelines.pp > 1 and self.chain.layers and not even:
            self._uneven(pipelines, rows)

    def _offer(self, pipelines: Pipelines, pipeline: Pipeline, rows: Ints) -> None:
        """Keep what is better than the best of its degrees."""
        for candidate in np.argsort(pipeline.seconds, kind="stable")[: len(rows)]:
            seconds = float(pipeline.seconds[candidate])
            if not np.isfinite(seconds):
                break
            degrees = self._degrees(int(rows[candidate]))
            known = self.by_degrees.get(degrees)
            if known is not None and seconds >= known.seconds * (1 - _SMALLER):
                continue
            row = int(rows[candidate])
            arrangement = pipelines.arrangement(self.space.strategy(row), pipeline, int(candidate))
            self.by_degrees[degrees] = Solved(seconds=seconds, row=row, arrangement=arrangement)
            self.best = min(self.best, seconds)

    def _degrees(self, row: int) -> tuple[int, ...]:
        layouts = self.space.layouts
        return tuple(int(getattr(layouts, key)[row]) for key in ("tp", "pp", "cp", "ep"))

    def _uneven(self, pipelines: Pipelines, rows: Ints) -> None:
        """Stages of unequal layers: passes over the borders, then integer programs for what these leave open."""
        table, total = pipelines.table, self.chain.layers
        layer = np.min([table.ahead[way] + table.back[way] for way in table.of_layers], axis=0)
        most = np.minimum(np.floor(self.best / (table.layouts.microbatches * layer)), total)
        worth = np.flatnonzero(most * pipelines.pp >= total)
        if not len(worth):
            return
        borders = Borders(pipelines, int(most[worth].max()))
        low = self.floor
        worth = worth[borders.below(self.best * (1 - _SMALLER), worth).found]
        for _ in range(_PASSES if len(worth) else 0):
            cuts = borders.below((low + self.best) / 2 if np.isfinite(self.best) else np.inf, worth)
            if not cuts.found.any():
                low = (low + self.best) / 2
                continue
            seconds = borders.seconds(cuts)
            place = int(seconds.argmin())
            if seconds[place] >= self.best * (1 - _SMALLER):
                break
            self._offer_one(pipelines, borders.layers(cuts, place), int(worth[place]), rows)
        for candidate in worth[borders.below(self.best * (1 - _SMALLER), worth).found].tolist():
            found = shortest(borders, candidate, self.best * (1 - _SMALLER))
            layers = self._by_program(borders, candidate) if found is None else found.layers
            if layers is not None:
                self._offer_one(pipelines, layers, candidate, rows)

    def _by_program(self, borders: Borders, candidate: int) -> tuple[int, ...] | None:
        """Better stages of a candidate that has too many chains to look at, if there are any."""
        from planner.search.stages import problem_of, solve_stages  # PuLP and HiGHS load slowly, for few plans

        many = sum(map(len, borders.stretches)) > _EXACTLY
        near = _NEAR if many else _SMALLER
        limit = self.best * (1 - near)
        if not borders.below(limit, np.array([candidate])).found[0]:
            self.open = min(self.open, limit)
            return None
        found = solve_stages(problem_of(borders, candidate), limit, self.wishes.solver, tolerance=near)
        if many or found.bound < limit:
            self.open = min(self.open, found.bound)
        return found.layers

    def _offer_one(self, pipelines: Pipelines, layers: tuple[int, ...], candidate: int, rows: Ints) -> None:
        pipeline = pipelines.priced(layers)
        single = np.full_like(pipeline.seconds, np.inf)
        single[candidate] = pipeline.seconds[candidate]
        self._offer(pipelines, replace(pipeline, seconds=single), rows)

    def _found(self, bound: float, interrupted: bool) -> Found:
        ranked = sorted(self.by_degrees.values(), key=lambda item: (item.seconds, item.row))
        objective = ranked[0].seconds if ranked else 0.0
        solved = len(self.evaluated)
        certificate = Certificate(
            solver=self.wishes.solver,
            objective=objective,
            bound=min(bound, self.open, objective) if ranked else 0.0,
            candidates=self.space.candidates,
            illegal=self.space.illegal,
            pruned=len(self.space) - solved,
            solved=solved,
        )
        return Found(best=tuple(ranked), certificate=certificate, interrupted=interrupted)


def _groups(layouts: Layouts, rows: Ints) -> Iterator[Ints]:
    """Rows that share their stages and schedule, by their first; fewer where a rank has many mixes."""
    keys = [(int(layouts.pp[row]), int(layouts.vpp[row]), str(layouts.schedule[row])) for row in rows]
    for key in dict.fromkeys(keys):
        group = rows[np.array([other == key for other in keys])]
        together = _ROWS_A_RANK * key[0]
        yield from (group[first : first + together] for first in range(0, len(group), together))
