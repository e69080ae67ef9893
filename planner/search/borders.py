"""Where stages of one rank each may be cut so that a step is shorter than a limit: passes over the layers.

Every rank waits for those before it and behind it. With S = Σ_{j<i} (t_j + 2 hop) and R = Σ_{j>i} (t_j + 2 hop)

    T ≥ S' + m·t_i,  S' the larger of gather_i + reduce_i and S'_{i−1} + t_{i−1} + 2 hop;    T ≥ S + m·t_i + w_i.

w_i is R for gpipe. For 1f1b, with a = p − 1 − i microbatches ahead, it is max(0, R − a·f_i) + max(0, R − a·b_i),
or what rounds to the last stage and back, for a + 1 microbatches each, take beyond m·t_i: paths through the
schedule.

For S and R stand the least that stages before and behind a border can take. Of two ways to cut the first layers
into i stages the one with the smaller sum is never worse, so the least for each number of layers decides. A
stretch that is too long with them is in no chain below the limit, and the sums of the others may be larger: passes
back and forth tell them again without it. Where no chain of stretches is left, no pipeline is below the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planner.cost.layouts import Bools, Floats, Ints
from planner.cost.steps import OnceAStep, StageWork, step
from planner.search.pipelines import Pipelines
from planner.search.stretches import Stretch, Stretches

FAR = float(np.finfo(np.float64).max)  # instead of no limit, so that what is infinite is not below it
_SWEEPS = 2  # back and forth; more exclude next to nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """Of some candidates a chain of stretches below a limit, where there is one."""

    candidates: Ints
    found: Bools
    chosen: Ints  # which stretch of each stage, [stage, candidate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Least times on either side of a border, [stages before it, layers before it, candidate]."""

    before: Floats  # S'
    alone: Floats  # S: no path has exchanges and waits for the stages behind
    behind: Floats  # R
    choices: Ints  # the last stretch of `before`, [stage, layers before its end, candidate]

    @classmethod
    def of(cls, pp: int, layers: int, candidates: int) -> Sums:
        """Before anything is known."""
        before, alone, behind = np.zeros((3, pp + 1, layers + 1, candidates))
        before[0, 1:] = alone[0, 1:] = behind[pp, :-1] = np.inf
        choices = np.zeros((pp, layers + 1, candidates), dtype=np.int64)
        return cls(before=before, alone=alone, behind=behind, choices=choices)

    @property
    def found(self) -> Bools:
        """Which candidates have a chain."""
        return np.asarray(np.isfinite(self.before[-1, -1]))


class Borders:
    """The stretches of every stage, priced, and the least sums over them."""

    def __init__(self, pipelines: Pipelines, most_layers: int) -> None:
        self.pipelines, self.table = pipelines, pipelines.table
        self.chain, self.pp = self.table.chain, pipelines.pp
        self.stretches = Stretches(pipelines, most_layers).of_stages

    def below(self, limit_seconds: float, candidates: Ints) -> Cuts:
        """Of some candidates those with a chain below the limit, of several the one with the least sum."""
        sums = self.sums(limit_seconds, candidates)
        chosen = np.zeros((self.pp, len(candidates)), dtype=np.int64)
        left, everyone = np.full(len(candidates), self.chain.layers), np.arange(len(candidates))
        for stage in reversed(range(self.pp)):
            chosen[stage] = sums.choices[stage, left, everyone]
            left = left - np.array([stretch.layers for stretch in self.stretches[stage]])[chosen[stage]]
        return Cuts(candidates=candidates, found=sums.found, chosen=chosen)

    def sums(self, limit_seconds: float, candidates: Ints) -> Sums:
        """Over chains below the limit; infinite where there is none."""
        limit_seconds = min(limit_seconds, FAR)
        sums = Sums.of(self.pp, self.chain.layers, len(candidates))
        for _ in range(_SWEEPS):
            for stage in reversed(range(1, self.pp)):
                self._back(sums, stage, limit_seconds, candidates)
            for stage in range(self.pp):
                self._ahead(sums, stage, limit_seconds, candidates)
            if not sums.found.any():
                break
        return sums

    def _back(self, sums: Sums, stage: int, limit_seconds: float, candidates: Ints) -> None:
        hops = 2.0 * self.table.hop[candidates]
        least = sums.behind[stage]
        least[:] = np.inf
        for stretch in self.stretches[stage]:
            firsts, ends = _span(stretch)
            short = self._short(sums, stage, stretch, limit_seconds, candidates)
            after = np.where(short, sums.behind[stage + 1, ends] + (stretch.both[candidates] + hops), np.inf)
            np.minimum(least[firsts], after, out=least[firsts])

    def _ahead(self, sums: Sums, stage: int, limit_seconds: float, candidates: Ints) -> None:
        hops = 2.0 * self.table.hop[candidates]
        before, alone = sums.before[stage + 1], sums.alone[stage + 1]
        before[:] = alone[:] = np.inf
        for place, stretch in enumerate(self.stretches[stage]):
            firsts, ends = _span(stretch)
            short = self._short(sums, stage, stretch, limit_seconds, candidates)
            both = stretch.both[candidates] + hops
            ready = np.maximum(sums.before[stage, firsts], (stretch.gather + stretch.reduce)[candidates])
            least = np.where(short, sums.alone[stage, firsts] + both, np.inf)
            np.minimum(alone[ends], least, out=alone[ends])
            least = np.where(short, ready + both, np.inf)
            better = least < before[ends]
            before[ends] = np.where(better, least, before[ends])
            sums.choices[stage, ends][better] = place

    def _short(self, sums: Sums, stage: int, stretch: Stretch, limit_seconds: float, candidates: Ints) -> Bools:
        """Where a stretch may begin so that no path through its stage is as long as the limit."""
        firsts, ends = _span(stretch)
        spare = limit_seconds - stretch.alone[candidates]
        result = sums.before[stage, firsts] <= spare
        result &= (stretch.gather + stretch.reduce)[candidates] <= spare
        if result.any():
            ahead, back = (times[0, candidates] for times in (stretch.option.ahead, stretch.option.back))
            waits = self.waits(stage, ahead, back, candidates, sums.behind[stage + 1, ends])
            result &= sums.alone[stage, firsts] + waits <= spare
        return np.asarray(result)

    def waits(self, stage: int, forward: Floats, backward: Floats, candidates: Ints, behind: Floats) -> Floats:
        """What a stage waits for those behind it, which take so long, [.., candidate]."""
        if self.pipelines.schedule == "gpipe":
            return behind
        count = self.table.layouts.microbatches[candidates].astype(np.float64)
        ahead = self.pp - 1 - stage  # microbatches that it may begin before the first comes back
        before, after = (np.maximum(behind - ahead * each, 0.0) for each in (forward, backward))
        waits = np.where(count > ahead + 1, before + after, np.maximum(before, after))
        both = forward + backward
        whole, rest = np.divmod(np.maximum(count - ahead - 2, 0), ahead + 1)
        rounds = (2 + whole) * (both + behind) + (rest - count) * both
        waits = np.where(count > ahead + 1, np.maximum(waits, rounds), waits)
        return np.where(count > ahead, waits, 0.0)

    def seconds(self, cuts: Cuts) -> Floats:
        """The exact step of each chain, infinite where there is none."""
        candidates = cuts.candidates

        def of(values: Callable[[Stretch], Floats]) -> Floats:
            rows = [
                np.stack([values(stretch) for stretch in found])[chosen, candidates]
                for found, chosen in zip(self.stretches, cuts.chosen, strict=True)
            ]
            return np.stack(rows)

        def once(name: str) -> Floats:
            return of(lambda stretch: self.table.exchanges(stretch.kind, name))

        work = StageWork(
            ahead=of(lambda stretch: stretch.option.ahead[0]),
            back=of(lambda stretch: stretch.option.back[0]),
            weight=of(lambda stretch: stretch.option.weight[0]),
            hop=self.table.hop[candidates],
        )
        exchanges = OnceAStep(
            reduce=once("reduce"), gather=once("gather"), last=once("last"), alone=once("alone"),
            optimizer=once("optimizer"), overlapped=self.table.once.overlapped[candidates],
        )  # fmt: skip
        taken = step(
            self.pipelines.schedule,
            work,
            exchanges,
            rank_of=np.arange(self.pp),
            microbatches=self.table.layouts.microbatches[candidates],
            pp=self.pp,
            vpp=1,
        )
        return np.where(cuts.found, taken.seconds + self.pipelines.host, np.inf)

    def layers(self, cuts: Cuts, place: int) -> tuple[int, ...]:
        """How many layers each stage of one of these chains holds."""
        chosen = zip(self.stretches, cuts.chosen[:, place].tolist(), strict=True)
        return tuple(found[which].layers for found, which in chosen)


def _span(stretch: Stretch) -> tuple[slice, slice]:
    """Layers before a stretch, and before its end."""
    first, last = stretch.firsts.start, stretch.firsts.stop
    return slice(first, last), slice(first + stretch.layers, last + stretch.layers)
