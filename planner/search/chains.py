"""All chains of stretches that may be below a limit, for one candidate: few, once the borders are known.

Stage by stage every chain so far is continued with every stretch that stays below the limit with the exact sums of
the stages before it and the least ones of those behind it (borders.py). Whole chains are then held to the exact
sums on both sides, and what is left is priced by the cost model, the shortest bounds first. So the best stages are
found, and proven the best, without an integer program; where the chains are too many, nothing is said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.layouts import Floats, Ints
from planner.search.borders import FAR, Borders, Cuts

_MOST = 20_000  # chains at once
_PRICED = 64  # chains at first


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortest:
    """The best stages of a candidate below a limit, if there are any."""

    layers: tuple[int, ...] | None
    seconds: float


def shortest(borders: Borders, candidate: int, limit_seconds: float) -> Shortest | None:
    """The shortest step of a candidate below the limit; none where too many chains are to be looked at."""
    chosen = _chains(borders, candidate, limit_seconds)
    if chosen is None:
        return None
    best = Shortest(layers=None, seconds=limit_seconds)
    least = _least(borders, candidate, chosen)
    order = np.argsort(least, kind="stable")
    chosen, least = chosen[:, order], least[order]
    size = _PRICED
    while chosen.shape[1] and least[0] < best.seconds:
        some = chosen[:, :size]
        everyone = np.full(some.shape[1], candidate)
        cuts = Cuts(candidates=everyone, found=np.ones(some.shape[1], dtype=np.bool_), chosen=some)
        seconds = borders.seconds(cuts)
        place = int(seconds.argmin())
        if seconds[place] < best.seconds:
            best = Shortest(layers=borders.layers(cuts, place), seconds=float(seconds[place]))
        chosen, least = chosen[:, size:], least[size:]
        size *= 2
    return best


def _chains(borders: Borders, candidate: int, limit_seconds: float) -> Ints | None:
    """[stage, chain]: which stretch each stage holds."""
    one = np.array([candidate])
    limit_seconds = min(limit_seconds, FAR)
    sums = borders.sums(limit_seconds, one)
    hops = 2.0 * float(borders.table.hop[candidate])
    at, before, alone = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    chosen = np.zeros((0, 1), dtype=np.int64)
    for stage, stretches in enumerate(borders.stretches):
        ends = at[:, None] + np.array([stretch.layers for stretch in stretches])
        spans = np.array([(stretch.firsts.start, stretch.firsts.stop) for stretch in stretches]).T
        possible = (at[:, None] >= spans[0]) & (at[:, None] < spans[1])
        own = np.array([
            (stretch.alone[candidate], stretch.both[candidate], (stretch.gather + stretch.reduce)[candidate],
             stretch.option.ahead[0, candidate], stretch.option.back[0, candidate])
            for stretch in stretches
        ]).T  # fmt: skip
        behind = sums.behind[stage + 1, np.minimum(ends, borders.chain.layers), 0]
        ready = np.maximum(before[:, None], own[2])
        waits = borders.waits(stage, own[3], own[4], one, behind)
        possible &= np.maximum(ready, alone[:, None] + waits) <= limit_seconds - own[0]
        kept, place = np.nonzero(possible)
        if len(kept) > _MOST:
            return None
        at, before, alone = (
            ends[kept, place],
            (ready + own[1])[kept, place] + hops,
            alone[kept] + own[1][place] + hops,
        )
        chosen = np.concatenate([chosen[:, kept], place[None]])
    return chosen[:, at == borders.chain.layers]


def _least(borders: Borders, candidate: int, chosen: Ints) -> Floats:
    """Seconds that no step of these chains is below, by the sums on both sides of each stage."""
    one, hops = np.array([candidate]), 2.0 * float(borders.table.hop[candidate])
    stretches = borders.stretches
    behind = np.zeros(chosen.shape[1])
    all_behind = []
    for found, places in zip(reversed(stretches), reversed(chosen), strict=True):
        all_behind.append(behind)
        behind = behind + np.array([stretch.both[candidate] for stretch in found])[places] + hops
    least, alone = np.zeros((2, chosen.shape[1]))
    for stage, (found, places, behind) in enumerate(zip(stretches, chosen, reversed(all_behind), strict=True)):
        own, both, ahead, back = np.array([
            (stretch.alone[candidate], stretch.both[candidate], stretch.option.ahead[0, candidate],
             stretch.option.back[0, candidate])
            for stretch in found
        ]).T[:, places]  # fmt: skip
        np.maximum(least, own + alone + borders.waits(stage, ahead, back, one, behind), out=least)
        alone = alone + both + hops
    return least
