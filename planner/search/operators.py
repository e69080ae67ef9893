"""Which operators of one block tensor parallelism cuts: an integer program over its regions.

A block (one tp, cp, ep, sp and microbatch) has regions r, each a connected run of cut operators, and families f
of regions that take in the same whole values: what is gathered for one of them is there for the others, and a
software stack may run their products as one. With all operators whole it costs b; costs are triples of device
seconds, weights of a rank and bytes kept for backward, and

    price(chosen) = b + Σ_r c_r·y_r + Σ_f Σ_P d_fP·z_fP

holds exactly, where
    y_r     1 if region r is cut
    z_fP    1 if P is what is cut of the family f
    x_ok    1 if product o has split k: column, row, vocab, or whole
    c_r     what cutting r alone changes: products and kernels on their shares, the gather in front of its
            columns and its mirror, the sum behind its rows and its mirror, weights, kept storages
    d_fP    what it changes that the regions P of f are cut together: price(P) − b − Σ_{r in P} c_r

    minimise   seconds + weight_seconds · weights                                        `_objective`
    subject to Σ_k x_ok = 1,  x_ok = Σ of y_r over the regions that give o split k       `_one_split`
               Σ_P z_fP = 1,  Σ_{P with r} z_fP = y_r                                    `_entering_together`
               Σ of y_r over regions with o = 1  where o reads all tokens, under sp      `_reads_all_tokens`
               weights ≤ limit,  kept ≤ limit                                            `_within`

Host time is left out: what a block waits for its host is a p-norm of issuing and device seconds over the whole
block. Issuing changes with the number of collectives, so a caller prices the choices of `frontier` again with
host time; the least device seconds under given limits are a bound for those with host.

A layout of an edge follows from the regions: cut inside one, whole (or along the sequence) between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pulp

from planner.cost.layouts import Floats
from planner.search.solvers import Solver, solve
from planner.spec.graph import Block
from planner.spec.plan import Split
from planner.spec.regions import Region, TooManyAlternativesError, needs_all_tokens, regions, whole_but
from planner.spec.splits import block_splits, could_be_cut

# of assignments, by what they keep whole: [assignment, (seconds, weight elements, kept bytes)]
Price = Callable[[Sequence[frozenset[str]]], Floats]

_SCALE = 1e3  # the largest coefficient of a row: a solver's tolerance of 1e-9 is then 1e-12 of it
_MOST_TOGETHER = 10  # regions of a family; their subsets are priced one by one
_JUST_BELOW = 1.0 - 1e-9
_ROUNDING = 1.0 + 1e-12  # of sums of differences


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a rank has room for."""

    weight_elements: float = math.inf
    kept_bytes: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An assignment of a block, priced as a whole, and the least objective that any other can have."""

    whole: frozenset[str]
    seconds: float  # of the device, forward and backward of one microbatch
    weight_elements: float
    kept_bytes: float
    objective: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Regions that read the same storages, and what can be cut of them at once."""

    members: tuple[int, ...]
    patterns: tuple[tuple[int, ...], ...]


class BlockProgram:
    """The integer program of one block in one context."""

    def __init__(self, block: Block, price: Price, *, sequence_parallel: bool) -> None:
        self.block, self.price = block, price
        self.regions = regions(block)
        self.needed = needs_all_tokens(block) if sequence_parallel else frozenset[str]()
        self.families = tuple(_families(self.regions))
        self._splits = tuple(self._split_words(region) for region in self.regions)
        alone = [(place,) for place in range(len(self.regions))]
        together = [pattern for family in self.families for pattern in family.patterns if len(pattern) > 1]
        prices = price([self._whole(chosen) for chosen in [(), *alone, *together]])
        self.base = prices[0]
        self.changes = prices[1 : len(alone) + 1] - self.base
        self.crossings = {
            pattern: row - self.base - self.changes[list(pattern)].sum(axis=0)
            for pattern, row in zip(together, prices[len(alone) + 1 :], strict=True)
        }

    def minimum(
        self, limits: Limits | None = None, *, weight_seconds: float = 0.0, solver: Solver = "highs"
    ) -> Choice | None:
        """The least seconds within the limits, or None where nothing fits.

        `weight_seconds` is what a weight costs besides, for example its gradient's way to other ranks.
        """
        worth = np.array([1.0, weight_seconds, 0.0])
        limits = limits or Limits()
        base = float(self.base @ worth)
        if not self.regions:
            fits = self.base[1] <= limits.weight_elements and self.base[2] <= limits.kept_bytes
            return self._priced((), worth, base) if fits and not self.needed else None
        problem = pulp.LpProblem("block", pulp.LpMinimize)
        cut = [problem.add_variable(f"y_{place}", cat=pulp.LpBinary) for place in range(len(self.regions))]
        together = {
            pattern: problem.add_variable(f"z_{number}_{'_'.join(map(str, pattern))}", cat=pulp.LpBinary)
            for number, family in enumerate(self.families)
            for pattern in family.patterns
        }
        scale = self._objective(problem, cut, together, worth)
        for row in (
            *self._one_split(problem, cut),
            *self._entering_together(cut, together),
            *self._reads_all_tokens(cut),
        ):
            problem += row
        for measure, limit in ((1, limits.weight_elements), (2, limits.kept_bytes)):
            if math.isfinite(limit):
                room = limit * _ROUNDING - float(self.base[measure])
                problem += self._within(cut, together, measure, room)
        solution = solve(problem, solver)
        if not solution.feasible:
            return None
        chosen = tuple(place for place, variable in enumerate(cut) if variable.value() > 0.5)
        return self._priced(chosen, worth, base + solution.bound / scale)

    def frontier(self, *, solver: Solver = "highs") -> tuple[Choice, ...]:
        """Every assignment that none other beats or equals in seconds, weights and kept bytes, fastest first.

        Found by solving again with limits just below what each solution needs.
        """
        found: dict[frozenset[str], Choice] = {}
        waiting, seen = [Limits()], set[Limits]()
        while waiting:
            limits = waiting.pop()
            if limits in seen:
                continue
            seen.add(limits)
            choice = self.minimum(limits, solver=solver)
            if choice is None:
                continue
            found[choice.whole] = choice
            waiting.append(replace(limits, weight_elements=choice.weight_elements * _JUST_BELOW))
            waiting.append(replace(limits, kept_bytes=choice.kept_bytes * _JUST_BELOW))
        return tuple(_undominated(found.values()))

    # the program

    def _objective(
        self,
        problem: pulp.LpProblem,
        cut: Sequence[pulp.LpVariable],
        together: dict[tuple[int, ...], pulp.LpVariable],
        worth: Floats,
    ) -> float:
        """Minimise what the choice changes; returns what a second is in the solver's unit."""
        terms = [(float(change @ worth), y) for change, y in zip(self.changes, cut, strict=True)]
        terms += [(float(change @ worth), together[pattern]) for pattern, change in self.crossings.items()]
        scale = _SCALE / max((abs(value) for value, _ in terms if value), default=1.0)
        problem += pulp.lpSum(value * scale * variable for value, variable in terms)
        return scale

    def _one_split(self, problem: pulp.LpProblem, cut: Sequence[pulp.LpVariable]) -> Iterator[pulp.LpConstraint]:
        """Each product is whole or cut in one way, by the one region that holds it."""
        for number, name in enumerate(could_be_cut(self.block)):
            ways: dict[Split, list[pulp.LpVariable]] = {}
            for words, y in zip(self._splits, cut, strict=True):
                if name in words:
                    ways.setdefault(words[name], []).append(y)
            if not ways:
                continue
            split = {
                way: problem.add_variable(f"x_{number}_{way}", cat=pulp.LpBinary) for way in (*ways, "replicate")
            }
            for way, holders in ways.items():
                yield split[way] == pulp.lpSum(holders)
            yield pulp.lpSum(split.values()) == 1

    def _entering_together(
        self, cut: Sequence[pulp.LpVariable], together: dict[tuple[int, ...], pulp.LpVariable]
    ) -> Iterator[pulp.LpConstraint]:
        """One set of the regions that read the same values is cut, and it is the one that the regions say."""
        for family in self.families:
            yield pulp.lpSum(together[pattern] for pattern in family.patterns) == 1
            for member in family.members:
                yield pulp.lpSum(together[p] for p in family.patterns if member in p) == cut[member]

    def _reads_all_tokens(self, cut: Sequence[pulp.LpVariable]) -> Iterator[pulp.LpConstraint]:
        """Under sequence parallelism a region holds each operator that needs every token."""
        for name in sorted(self.needed):
            yield (
                pulp.lpSum(y for region, y in zip(self.regions, cut, strict=True) if name in region.operators) == 1
            )

    def _within(
        self,
        cut: Sequence[pulp.LpVariable],
        together: dict[tuple[int, ...], pulp.LpVariable],
        measure: int,
        room: float,
    ) -> pulp.LpConstraint:
        """Weights or kept bytes stay within what is left beside a block that is whole."""
        terms = [(float(change[measure]), y) for change, y in zip(self.changes, cut, strict=True)]
        terms += [(float(change[measure]), together[pattern]) for pattern, change in self.crossings.items()]
        scale = _SCALE / max(*(abs(value) for value, _ in terms), abs(room), 1e-300)
        return pulp.lpSum(value * scale * variable for value, variable in terms) <= room * scale

    # assignments

    def _whole(self, chosen: Sequence[int]) -> frozenset[str]:
        return whole_but(self.block, [self.regions[place] for place in chosen])

    def _split_words(self, region: Region) -> dict[str, Split]:
        splits = block_splits(self.block, whole_but(self.block, [region]))
        return {name: splits[name].split for name in region.products}

    def _priced(self, chosen: tuple[int, ...], worth: Floats, bound: float) -> Choice:
        """The choice priced as a whole: its objective is no sum of a solver."""
        whole = self._whole(chosen)
        price = self.price([whole])[0]
        objective = float(price @ worth)
        seconds, weights, kept = price.tolist()
        return Choice(
            whole=whole, seconds=seconds, weight_elements=weights, kept_bytes=kept,
            objective=objective, bound=min(bound, objective),
        )  # fmt: skip


def _families(found: Sequence[Region]) -> Iterator[_Family]:
    """Regions that share what they read; two families have one region in common at most."""
    groups: list[set[int]] = []
    for storage in sorted({name for region in found for name in region.reads}):
        group = {place for place, region in enumerate(found) if storage in region.reads}
        while alike := [other for other in groups if len(other & group) > 1]:
            groups = [other for other in groups if other not in alike]
            group = group.union(*alike)
        if len(group) > 1:
            groups.append(group)
    for group in groups:
        if len(group) > _MOST_TOGETHER:
            raise TooManyAlternativesError(f"{len(group)} regions read the same values")
        members = tuple(sorted(group))
        yield _Family(members=members, patterns=tuple(_patterns(found, members)))


def _patterns(found: Sequence[Region], members: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Subsets of which no two regions share an operator."""
    for count in range(len(members) + 1):
        for pattern in itertools.combinations(members, count):
            held = [found[place].operators for place in pattern]
            if sum(map(len, held)) == len(frozenset[str]().union(*held)):
                yield pattern


def _undominated(choices: Iterable[Choice]) -> Iterator[Choice]:
    """Fastest first; of equal ones the one that keeps the least whole."""
    kept: list[tuple[float, float, float]] = []

    def order(choice: Choice) -> tuple[float, float, float, int, list[str]]:
        return *_measures(choice), len(choice.whole), sorted(choice.whole)

    for choice in sorted(choices, key=order):
        mine = _measures(choice)
        if not any(all(a <= b for a, b in zip(other, mine, strict=True)) for other in kept):
            kept.append(mine)
            yield choice


def _measures(choice: Choice) -> tuple[float, float, float]:
    return choice.seconds, choice.weight_elements, choice.kept_bytes
