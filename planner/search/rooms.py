"""Whether a candidate can be faster than a limit, by how many layers its stages have time and memory for.

Of the layers that are most of the model a stage holds at most the largest number k for which some mix of
recomputation, each layer as cheap as any assignment makes it, has both

    Σ_o x_o·t_o ≤ what there is time for    and    Σ_o x_o·(states + in-flight·kept_o) ≤ what there is room for.

As x may be broken here, no stage can hold more; k itself is whole. Of time and memory goes off first what stands
before all layers, in the first stage, and behind them, in the last one; a single stage has all other blocks too.
With S and R the least times of the layers that the stages from this one on, or up to it, cannot hold, and what is
once a step gone from the limit T, a stage has time for

    t ≤ (T − S) / m;    gpipe: t ≤ (T − S − R) / m;    1f1b with a = p − 1 − i < m − 1: t ≤ (T − S − 2R) / (m − a):

the paths of borders.py. If all stages together hold too few layers, no pipeline of the candidate is below the
limit. With even stages the layers of a rank are known: their cheapest mix that fits tells its time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields
from functools import cached_property
from typing import cast

import numpy as np

from planner.cost import data_parallel
from planner.cost.blocks import BlockPricer
from planner.cost.layouts import Bools, Floats, Ints, Layouts
from planner.cost.network import MeshRows
from planner.cost.schedule import in_flight
from planner.cost.stages import even_layers, ranks_of_stages
from planner.cost.states import least_state_bytes
from planner.search.bounds import once_a_step
from planner.search.mixes import mixes
from planner.search.prices import LeastLayer, LeastOthers, LeastPrices, alike, distinct
from planner.spec.orders import SPLIT_BACKWARD
from planner.spec.strategy import Schedule
from planner.units import GIB

_WHOLE = 1e-9  # by which a number of layers may fall short of a whole one
_TIGHTENED = 3  # times that waiting is told again from what the others can hold


class Rooms:
    """The layers of candidates, priced as cheaply as can be."""

    def __init__(
        self,
        pricer: BlockPricer,
        prices: LeastPrices,
        layouts: Layouts,
        rows: Ints,
        capacity: float,
        layer: LeastLayer | None = None,
    ) -> None:
        self.layouts, self.layer = layouts.take(rows), layer or prices.layer
        contexts = prices.found.of_row[rows]
        self.once = once_a_step(pricer, prices, self.layouts, rows)
        self.seconds = [item[contexts] for item in self.layer.seconds]
        self.kept = [item[contexts] for item in self.layer.kept]
        dense, experts = self.layer.dense[contexts], self.layer.experts[contexts]
        self.states = least_state_bytes(pricer, self.layouts, dense, experts)
        self.forward = self.layer.forward[contexts]
        self._gather(pricer, dense, experts)
        self.first, self.last, self.rest = (
            _Others.of(pricer, self.layouts, item.take(contexts))
            for item in (self.layer.first, self.layer.last, self.layer.rest)
        )
        memory = pricer.profile.memory
        self.capacity = (capacity - memory.context_gib * GIB) / (
            1.0 + memory.reserved_share
        ) - memory.workspace_gib * GIB

    def _gather(self, pricer: BlockPricer, dense: Floats, experts: Floats) -> None:
        """Weights that are gathered with every block, and gradients that are scattered, beside its work."""
        rows = np.flatnonzero(data_parallel.with_every_block(self.layouts, pricer.workload))
        if not len(rows):
            return
        some, slow = self.layouts.take(rows), pricer.profile.interference
        network, meshes, width = pricer.network, MeshRows(some), pricer.width
        moved = data_parallel.exchange(network, meshes, some, dense[rows], width=width)
        gather, reduce = moved.gather, moved.reduce
        if experts.any():
            routed = data_parallel.exchange(network, meshes, some, experts[rows], width=width, experts=True)
            gather, reduce = gather + routed.gather, reduce + routed.reduce
        often, once = some.zero == 3, 1.0 / some.microbatches
        overlapped = data_parallel.overlaps(some, pricer.software)

        def longer(work: Floats, moving: Floats) -> Floats:
            both = data_parallel.beside(work, moving, slow.compute_factor, slow.communication_factor)
            return np.where(overlapped, both, work + moving)

        ahead = longer(self.forward[rows], gather * np.where(often, 1.0, once))
        for place, seconds in enumerate(self.seconds):
            back = seconds[rows] - self.forward[rows]
            self.seconds[place] = seconds.copy()
            self.seconds[place][rows] = ahead + longer(
                back, gather * often + reduce * np.where(some.zero == 1, once, 1.0)
            )

    def take(self, places: Ints) -> Rooms:
        """Some of the candidates."""
        some = copy(self)
        some.__dict__.pop("_groups", None)
        some.layouts = self.layouts.take(places)
        for name in ("once", "states", "forward", "_least_even"):
            setattr(some, name, getattr(self, name)[places])
        some.seconds, some.kept = ([item[places] for item in items] for items in (self.seconds, self.kept))
        some.first, some.last, some.rest = (item.take(places) for item in (self.first, self.last, self.rest))
        return some

    def below(self, limit_seconds: Floats) -> Bools:
        """Which candidates might have a step below the limit, one for each."""
        result = np.ones(len(self.layouts), dtype=np.bool_)
        if not self.layer.count:
            return result
        for rows, schedule, pp, vpp in self._groups:
            spare = limit_seconds[rows] - self.once[rows]
            if vpp == 1:
                result[rows] = self._uneven(rows, spare, schedule, pp)
            else:
                result[rows] = self._least_even[rows] < spare
        return result

    @cached_property
    def _least_even(self) -> Floats:
        """Seconds that candidates with even stages take at least, what is once a step left out."""
        least = np.zeros(len(self.layouts))
        for rows, schedule, pp, vpp in self._groups:
            if vpp > 1:
                least[rows] = self._even(rows, schedule, pp, vpp)
        return least

    @cached_property
    def _groups(self) -> list[tuple[Ints, Schedule, int, int]]:
        """Candidates that share their stages and schedule."""
        layouts, schedules = self.layouts, np.zeros(len(self.layouts), dtype=np.int64)
        words = distinct(layouts.schedule)
        for place, word in enumerate(words):
            schedules[layouts.schedule == word] = place
        first, kinds = alike([layouts.pp, layouts.vpp, schedules])
        order = np.argsort(kinds, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1) if len(first) else []
        return [
            (rows, cast("Schedule", words[schedules[row]]), int(layouts.pp[row]), int(layouts.vpp[row]))
            for rows, row in zip(parts, first.tolist(), strict=True)
        ]

    def _flights(self, rows: Ints, schedule: Schedule, pp: int, vpp: int) -> Floats:
        """[rank, chunk, candidate]."""
        counts, where = np.unique(self.layouts.microbatches[rows], return_inverse=True)
        held = [in_flight(schedule, pp, vpp, int(count)) for count in counts]
        return np.asarray(np.stack(held, axis=-1)[..., where.reshape(-1)], dtype=np.float64)

    def _uneven(self, rows: Ints, limit: Floats, schedule: Schedule, pp: int) -> Bools:
        flights = self._flights(rows, schedule, pp, 1)[:, 0]
        seconds = [item[rows] for item in self.seconds]
        sizes = [self.states[rows] + flights * item[rows] for item in self.kept]
        count, wanted = self.layouts.microbatches[rows].astype(np.float64), self.layer.count
        first, last = self.first.take(rows), self.last.take(rows)
        own, held = np.zeros((2, pp, len(rows)))  # seconds and bytes beside the layers
        own[0] += first.seconds
        own[-1] += last.seconds
        held[0] += first.states + flights[0] * first.kept
        held[-1] += last.states
        if pp == 1:
            rest = self.rest.take(rows)
            own[0] += rest.seconds
            held[0] += rest.states + flights[0] * rest.kept
        ahead = np.arange(pp)[::-1, None]  # microbatches that a stage of 1f1b begins before the first comes back
        before, behind = np.zeros((2, pp, len(rows)))
        before[1:], behind[:-1] = first.seconds, last.seconds
        waits_before, waits_behind = before, behind
        for _ in range(_TIGHTENED):
            spare = limit - waits_before
            if schedule == "gpipe":
                spare = (spare - waits_behind) / count
            else:
                turned = (spare - 2.0 * waits_behind) / np.maximum(count - ahead, 1.0)
                spare = np.where(count > ahead + 1, np.minimum(spare / count, turned), spare / count)
            spare = spare - own
            holds = np.floor(_most(spare, self.capacity - held, seconds, sizes) + _WHOLE)
            sums = np.cumsum(holds, axis=0)
            waits_before = before + np.maximum(wanted - (sums[-1] - sums + holds), 0.0) * seconds[0]
            waits_behind = behind + np.maximum(wanted - sums, 0.0) * seconds[0]
        return np.asarray((sums[-1] >= wanted) & (spare >= -_WHOLE * limit).all(axis=0))

    def _even(self, rows: Ints, schedule: Schedule, pp: int, vpp: int) -> Floats:
        """By the ranks that hold the most microbatches, the first two, and by the last in each round."""
        borders = np.concatenate([[0], np.cumsum(even_layers(len(self.layer.before) - 1, pp * vpp))])
        layers = np.diff(self.layer.before[borders])
        ranks = ranks_of_stages(pp, vpp, schedule)
        # where backward is split, gradients of weights may fill the wait at the end, and nothing is run again
        split = schedule in SPLIT_BACKWARD
        words = slice(0, 1) if split else slice(None)
        kept, seconds = (np.stack([item[rows] for item in items[words]]) for items in (self.kept, self.seconds))
        flights = self._flights(rows, schedule, pp, vpp)
        first, last = self.first.take(rows), self.last.take(rows)
        waits, begins = (self.forward[rows], first.forward) if split else (seconds[0], first.seconds)
        slowest = np.zeros(len(rows))
        for rank in sorted({0, 1, pp - 1}):
            own = np.flatnonzero(ranks == rank)
            room, alone = self.capacity - layers[own].sum() * self.states[rows], np.zeros(len(rows))
            if rank == 0:
                room, alone = room - first.states - flights[0, 0] * first.kept, alone + first.seconds
            if rank == ranks[-1]:
                room, alone = room - last.states, alone + last.seconds
            counts = mixes(tuple((int(layers[stage]),) for stage in own), (len(seconds),)).counts
            least = _fastest_mix(counts, flights[rank], kept, seconds, room)
            before = layers[:rank].sum() * waits + (begins if rank else 0.0)
            slowest = np.maximum(slowest, self.layouts.microbatches[rows] * (least + alone) + before)
        return slowest


def _fastest_mix(counts: Ints, flights: Floats, kept: Floats, seconds: Floats, room: Floats) -> Floats:
    """Seconds of the fastest mix [mix, chunk, word] that each candidate has room for; most hold equally many."""
    least = np.empty(len(room))
    kinds, kind_of = np.unique(flights, axis=1, return_inverse=True)
    for kind, held in enumerate(kinds.T):
        rows = np.flatnonzero(kind_of.reshape(-1) == kind)
        fits = np.tensordot(counts, held, axes=(1, 0)) @ kept[:, rows] <= room[rows]
        least[rows] = np.where(fits, counts.sum(axis=1) @ seconds[:, rows], np.inf).min(axis=0)
    return least


@dataclass(frozen=True, slots=True, kw_only=True)
class _Others:
    """Blocks beside the layers that are most of the model, [candidate]."""

    seconds: Floats
    forward: Floats
    kept: Floats
    states: Floats

    @classmethod
    def of(cls, pricer: BlockPricer, layouts: Layouts, least: LeastOthers) -> _Others:
        states = least_state_bytes(pricer, layouts, least.dense, least.experts)
        return cls(seconds=least.forward + least.backward, forward=least.forward, kept=least.kept, states=states)

    def take(self, rows: Ints) -> _Others:
        return _Others(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


def _most(seconds: Floats, room: Floats | float, each: Sequence[Floats], sizes: Sequence[Floats]) -> Floats:
    """The most layers, perhaps broken, within so many seconds and bytes, whatever the mix."""
    spare = np.maximum(seconds, 0.0)
    most = np.zeros(np.broadcast_shapes(spare.shape, sizes[0].shape))
    for one_seconds, one_size in zip(each, sizes, strict=True):
        most = np.maximum(most, np.minimum(spare / one_seconds, room / np.maximum(one_size, 1e-30)))
    for (t_a, m_a), (t_b, m_b) in itertools.combinations(list(zip(each, sizes, strict=True)), 2):
        across = t_a * m_b - t_b * m_a
        safe = np.where(across == 0.0, 1.0, across)
        of_a = (spare * m_b - room * t_b) / safe
        of_b = (room * t_a - spare * m_a) / safe
        inside = (across != 0.0) & (of_a >= 0.0) & (of_b >= 0.0)
        most = np.where(inside, np.maximum(most, of_a + of_b), most)
    return np.where(room > 0.0, most, 0.0)
