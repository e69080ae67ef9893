"""What a collective of a placed group costs: the cheapest of the algorithms that its placement allows.

A group inside one level takes that level's measured table, or formulas of latency and bandwidth where there is
none. Across levels, with n ranks, k of them in the smallest group below a level that joins f such groups, each
rank getting the bandwidth w across it (cards and uplinks shared with the groups that run beside this one):

    ring          2(n−1)/n · B/(k·w)                    2(n−1) hops; half for all-gather and reduce-scatter
    tree          B/(k·w) for f = 2, else 2·B/(k·w)     2·log2(f) hops; all-reduce, half for broadcast
    hierarchical  what is inside, then 2(f−1)/f · B/(k·w), then what is inside again; one after the other
    direct        bytes to each peer over the links on the way, all links at once; all-to-all

Ring and tree stream chunks, so that the slowest link alone counts; what is inside takes as long as by itself. An
all-gather or reduce-scatter takes an all-reduce where that is cheaper, as it is for small messages in large
groups. Sources: Thakur et al. 2005 (ring, tree), NCCL's documentation of bus bandwidth. Left out: contention with
unequal groups, switches that reduce between nodes, cards that share a PCIe link with the GPUs' own traffic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from planner.cost.curves import NOTHING_INSIDE, Bytes, Curve, table_curve
from planner.cost.topology import Crossing, Placement, place
from planner.errors import PlannerError
from planner.spec.hardware import CollectiveTable, HardwareProfile, bus_factor
from planner.units import bytes_per_element

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "p2p"]
Ranks: TypeAlias = "Collection[int] | np.ndarray[Any, Any] | Placement"

KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "p2p",
)  # fmt: skip

_NARROW = ("fp8_block", "mxfp8", "nvfp4", "mxfp4", "int4")
# Of one link's rate, that reducing in NVSwitch reaches: 8 H200 get 473 GB/s of bus bandwidth with it and 366
# without (nccl-tests at 8 GiB, published in stas00/ml-engineering), 1.29 times a ring's 2·7/8.
_NVLS_EFFICIENCY = 0.74


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One way to run a collective: steps one after the other, and what they pass through besides."""

    name: str
    steps: tuple[Curve, ...]
    inside: Curve | None = None  # no stream is faster than its part inside a level is by itself

    def seconds(self, count: Any) -> Any:
        """Time for a number of bytes, or for an array of them."""
        total = self.steps[0].seconds(count)
        for step in self.steps[1:]:
            total = total + step.seconds(count)
        return total if self.inside is None else _longer(total, self.inside.seconds(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCost:
    """A collective of one placed group, ready for any number of bytes."""

    algorithms: tuple[Algorithm, ...]  # none: a group of one
    custom: Algorithm | None = None  # of a serving engine, which takes it for messages up to `custom_bytes`
    custom_bytes: float = 0.0

    def seconds(self, bytes_: Bytes) -> Any:
        """Seconds; the shape follows that of `bytes_`."""
        if not self.algorithms:
            return np.zeros_like(bytes_) if isinstance(bytes_, np.ndarray) else 0.0
        time = _cheapest(self.algorithms, bytes_)
        if self.custom is None:
            return time
        # engines change over at once; half an octave to either side keeps the cost continuous
        share = np.clip(np.log2(np.maximum(bytes_, 1.0) / self.custom_bytes) + 0.5, 0.0, 1.0)
        own = self.custom.seconds(np.minimum(bytes_, self.custom_bytes))
        mixed = np.maximum(own, own ** (1.0 - share) * time**share)
        return mixed if isinstance(bytes_, np.ndarray) else float(mixed)

    def chosen(self, bytes_: Bytes) -> Any:
        """Name of the algorithm that is taken; for an array, an array of names."""
        if not self.algorithms:
            return np.full(bytes_.shape, "none") if isinstance(bytes_, np.ndarray) else "none"
        names = [item.name for item in self.algorithms]
        times = [np.asarray(item.seconds(bytes_)) for item in self.algorithms]
        if self.custom is not None:
            names.append(self.custom.name)
            times.append(np.where(np.asarray(bytes_) <= self.custom_bytes, -np.inf, np.inf))
        chosen = np.array(names)[np.argmin(times, axis=0)]
        return chosen if isinstance(bytes_, np.ndarray) else str(chosen)


def collective_seconds(
    profile: HardwareProfile,
    kind: CollectiveKind,
    bytes_: Any,
    *,
    ranks: Ranks,
    concurrent_groups: int = 1,
    dtype: str = "bf16",
    custom_all_reduce: Literal["graph", "eager"] | None = None,
) -> Any:
    """Seconds of one collective among `ranks`; bytes are a number or an array of them.

    Bytes: all_reduce and broadcast the buffer, all_gather the total output, reduce_scatter the total input,
    all_to_all one rank's send buffer, p2p the message. `concurrent_groups` counts the groups of the same shape
    that run at the same time, this one included; those that lie beside it share cards and uplinks.
    `custom_all_reduce` is the serving engines' own, from a CUDA graph or launched eagerly, which includes what
    the host takes: groups inside one level use it up to the size from which on the library is faster.
    """
    cost = collective_cost(profile, kind, ranks, concurrent_groups, dtype, custom_all_reduce)
    return cost.seconds(_checked_bytes(bytes_))


def chosen_algorithm(
    profile: HardwareProfile,
    kind: CollectiveKind,
    bytes_: Any,
    *,
    ranks: Ranks,
    concurrent_groups: int = 1,
    dtype: str = "bf16",
    custom_all_reduce: Literal["graph", "eager"] | None = None,
) -> Any:
    """Name of the algorithm that `collective_seconds` is the cost of."""
    cost = collective_cost(profile, kind, ranks, concurrent_groups, dtype, custom_all_reduce)
    return cost.chosen(_checked_bytes(bytes_))


def collective_cost(
    profile: HardwareProfile,
    kind: CollectiveKind,
    ranks: Ranks,
    concurrent_groups: int = 1,
    dtype: str = "bf16",
    custom_all_reduce: Literal["graph", "eager"] | None = None,
) -> CollectiveCost:
    """The cost of a collective as a function of bytes: worth keeping where many sizes are asked for."""
    placement = ranks if isinstance(ranks, Placement) else place(profile, ranks)
    _check(kind, placement, concurrent_groups, custom_all_reduce)
    if placement.size == 1:
        return CollectiveCost(algorithms=())
    group = _Group(placement, concurrent_groups, _is_one_byte(dtype))
    asked = custom_all_reduce if kind == "all_reduce" else None
    custom = None if asked is None else group.custom_table(asked)
    return CollectiveCost(
        algorithms=group.algorithms(kind),
        custom=None if custom is None else group.measured(custom, kind, f"custom {asked}"),
        custom_bytes=0.0 if custom is None else min(custom.largest_bytes, 2.0**100),
    )


class _Group:
    """The algorithms that a placement allows, each as curves."""

    def __init__(self, placement: Placement, concurrent_groups: int, one_byte: bool) -> None:
        self.crossings = placement.crossings
        self.size = placement.size
        self.on_rails = placement.on_rails
        self.one_byte = one_byte
        self.concurrent = concurrent_groups
        self.bandwidths = [crossing.bandwidth_per_rank(concurrent_groups) for crossing in self.crossings]

    def algorithms(self, kind: str) -> tuple[Algorithm, ...]:
        if kind == "p2p":
            return (self._p2p(),)
        base = self._table_position(kind)
        last = len(self.crossings) - 1
        if base == last:
            found = [self._measured_at(kind, base)]
        elif kind == "all_to_all":
            found = [self._direct(base)]
        else:
            found = [self._ring(kind, base)]
            if kind in ("all_reduce", "broadcast"):
                found.append(self._tree(kind, base))
            if kind == "all_reduce" and last > 0:
                found.append(self._hierarchical())
            if kind == "all_reduce" and last == 0 and self.crossings[0].level.nvls and not self.one_byte:
                found.append(self._nvls())
        if kind in ("all_gather", "reduce_scatter"):
            found += [replace(item, name=f"all_reduce, {item.name}") for item in self.algorithms("all_reduce")]
        return tuple(found)

    def measured(self, table: CollectiveTable, kind: str, name: str, position: int = -1) -> Algorithm:
        crossing = self.crossings[position]
        curve = table_curve(table, kind, crossing.ranks, self.one_byte)
        return Algorithm(name=name, steps=(curve.slower(self._contention(position)),))

    def custom_table(self, mode: Literal["graph", "eager"]) -> CollectiveTable | None:
        """The engines' own all-reduce, for groups inside one level and no larger than measured."""
        table = self.crossings[-1].level.custom_all_reduce.get(mode)
        inside = len(self.crossings) == 1 or bool(self.crossings[-1].level.collectives)
        return table if table is not None and inside and self.size <= table.ranks[-1] else None

    def _table_position(self, kind: str) -> int:
        """The outermost crossed level that has measured this collective; -1 for none."""
        kinds = (kind, "all_gather") if kind == "broadcast" else (kind,)
        held = [any(item in crossing.level.collectives for item in kinds) for crossing in self.crossings]
        return max((place for place, holds in enumerate(held) if holds), default=-1)

    def _measured_at(self, kind: str, position: int) -> Algorithm:
        crossing = self.crossings[position]
        table = crossing.level.collectives.get(kind)  # type: ignore[call-overload]
        if table is None:  # a broadcast streams through the ring that an all-gather takes
            table = crossing.level.collectives["all_gather"]
        return self.measured(table, kind, "measured", position)

    def _contention(self, position: int) -> float:
        """How much longer a byte takes where an oversubscribed level is shared: tables were taken alone."""
        crossing = self.crossings[position]
        return crossing.bandwidth_per_rank(1) / self.bandwidths[position]

    def _base_curve(self, kind: str, base: int) -> Curve:
        if base < 0:
            return NOTHING_INSIDE
        return self._measured_at(kind, base).steps[0]

    def _outer(self, base: int) -> list[tuple[Crossing, float]]:
        """Crossings that no table covers, with the bandwidth of a whole inner group across each."""
        pairs = zip(self.crossings, self.bandwidths, strict=True)
        return [(crossing, crossing.narrowest * bandwidth) for crossing, bandwidth in list(pairs)[base + 1 :]]

    def _ring(self, kind: str, base: int) -> Algorithm:
        curve, outer = self._base_curve(kind, base), self._outer(base)
        passes = 2 if kind == "all_reduce" else 1
        # each group that a table covers is passed once, at what its smallest messages take
        passed = sum(crossing.hops for crossing, _ in outer)
        latency = passed * curve.smallest_seconds
        latency += passes * sum(crossing.hops * crossing.level.latency_seconds for crossing, _ in outer)
        factor = bus_factor(kind, self.size)
        return self._streamed("ring", curve, latency, max(factor / bandwidth for _, bandwidth in outer))

    def _tree(self, kind: str, base: int) -> Algorithm:
        curve, outer = self._base_curve(kind, base), self._outer(base)
        passes = 2 if kind == "all_reduce" else 1
        latency, rate = 0.0, 0.0
        for crossing, bandwidth in outer:
            latency += passes * math.log2(crossing.fanout) * crossing.level.latency_seconds
            rate = max(rate, (1 if crossing.fanout == 2 else passes) / bandwidth)
        return self._streamed("tree", curve, latency, rate)

    def _hierarchical(self) -> Algorithm:
        """Reduce-scatter inside, all-reduce the B/k that are left across, all-gather inside."""
        halves = ("reduce_scatter", "all_gather")
        base = self._table_position("reduce_scatter")
        if base == len(self.crossings) - 1 or not all(base >= 0 and self._has(item, base) for item in halves):
            base = -1
        steps = [] if base < 0 else [self._measured_at(item, base).steps[0] for item in halves]
        for crossing, bandwidth in self._outer(base):
            share = (crossing.fanout - 1) / crossing.fanout
            steps.append(
                Curve(
                    latency_seconds=2 * (crossing.fanout - 1) * crossing.level.latency_seconds,
                    rate=2 * share / bandwidth,
                    power=crossing.level.power,
                )
            )
        return Algorithm(name="hierarchical", steps=tuple(steps))

    def _has(self, kind: str, position: int) -> bool:
        return kind in self.crossings[position].level.collectives

    def _direct(self, base: int) -> Algorithm:
        curve = self._base_curve("all_to_all", base)
        latency, rate = 0.0, 0.0
        for crossing, bandwidth in list(zip(self.crossings, self.bandwidths, strict=True))[base + 1 :]:
            latency += math.log2(crossing.fanout) * self._latency_of(crossing)
            rate = max(rate, (self.size - crossing.inner_ranks) / self.size / bandwidth)
        return self._streamed("direct", curve.slower(self._share_inside(base)), latency, rate)

    def _share_inside(self, base: int) -> float:
        """What links that a table covers carry of a send buffer, beside what its own all-to-all moves there.

        What leaves by cards does not pass them; what goes on over wider links of the same kind does.
        """
        if base < 0:
            return 1.0
        within = self.crossings[base].ranks
        beyond = itertools.takewhile(lambda crossing: crossing.level.nics is None, self.crossings[base + 1 :])
        reached = max((crossing.ranks for crossing in beyond), default=within)
        return (reached - 1) / self.size / bus_factor("all_to_all", within)

    def _p2p(self) -> Algorithm:
        latency = self._latency_of(self.crossings[-1])
        return Algorithm(name="p2p", steps=(Curve(latency_seconds=latency, rate=1.0 / self.bandwidths[-1]),))

    def _nvls(self) -> Algorithm:
        """Every rank sends its buffer to the switch once and takes the sum once: B/(w·efficiency)."""
        rate = 1.0 / (self.bandwidths[0] * _NVLS_EFFICIENCY)
        return Algorithm(
            name="nvls", steps=(Curve(latency_seconds=3 * self.crossings[0].level.latency_seconds, rate=rate),)
        )

    def _latency_of(self, crossing: Crossing) -> float:
        """One hop; where it must change rails, first a hop inside the node."""
        latency = crossing.level.latency_seconds
        if crossing.level.nics is not None and crossing.level.nics.rails and not self.on_rails:
            inner = self.crossings[0] if self.crossings[0] is not crossing else None
            latency += inner.level.latency_seconds if inner is not None else 0.0
        return latency

    def _streamed(self, name: str, inside: Curve, latency: float, rate: float) -> Algorithm:
        stream = inside.through(latency=latency, rate=rate, power=self.crossings[-1].level.power)
        return Algorithm(name=name, steps=(stream,), inside=inside if inside.rate else None)


def _longer(one: Any, other: Any) -> Any:
    return np.maximum(one, other) if isinstance(one, np.ndarray) else max(one, other)


def _cheapest(algorithms: tuple[Algorithm, ...], count: Any) -> Any:
    best = algorithms[0].seconds(count)
    for algorithm in algorithms[1:]:
        other = algorithm.seconds(count)
        best = np.minimum(best, other) if isinstance(other, np.ndarray) else min(best, other)
    return best


def _is_one_byte(dtype: str) -> bool:
    if dtype in _NARROW:
        return True
    try:
        return bytes_per_element(dtype) == 1.0
    except KeyError:
        raise PlannerError(
            "elements have a known type", value=dtype, remedy="use one such as bf16, fp32 or int8", key="dtype"
        ) from None


def _checked_bytes(bytes_: Any) -> Bytes:
    if isinstance(bytes_, (int, float)):
        count: Bytes = float(bytes_)
        valid = 0.0 <= count < math.inf
    else:
        count = np.asarray(bytes_, dtype=np.float64)
        valid = bool(np.all(np.isfinite(count) & (count >= 0.0)))
        if count.ndim == 0:
            count = float(count)
    if not valid:
        raise PlannerError(
            "bytes are finite and not negative", value=bytes_, remedy="give a size in bytes", key="bytes"
        )
    return count


def _check(kind: str, placement: Placement, concurrent_groups: int, custom: str | None) -> None:
    if kind not in KINDS:
        raise PlannerError(
            "a collective is one of " + ", ".join(KINDS), value=kind, remedy="use one of these", key="kind"
        )
    if kind == "p2p" and placement.size > 2:
        raise PlannerError(
            "a message has one sender and one receiver",
            value=placement.size,
            remedy="give two ranks, and the number of such pairs as concurrent_groups",
            key="ranks",
        )
    whole = isinstance(concurrent_groups, (int, np.integer)) and not isinstance(concurrent_groups, bool)
    if not whole or concurrent_groups < 1:
        raise PlannerError(
            "the group itself counts among those that run at the same time",
            value=concurrent_groups,
            remedy="give a whole number from 1",
            key="concurrent_groups",
        )
    if custom not in (None, "graph", "eager"):
        raise PlannerError(
            "an engine's own all-reduce is graph or eager", value=custom, remedy="use one", key="custom_all_reduce"
        )
