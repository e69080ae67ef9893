"""Fit the table of one collective to timings: at most four numbers per group size.

Minimises Σ|log(predicted/measured)| (smoothed below 2 %, the noise of repeats) by iteratively reweighted
Levenberg–Marquardt steps from a few fixed starts. Shapes that differ in which numbers are shared by all group
sizes compete; the one that errs least, at no more than four numbers a size, is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlannerError
from planner.spec.hardware import CollectiveTable, bus_factor, low_latency_channels
from planner.spec.provenance import SourceKind

Floats = NDArray[np.float64]

MOST_NUMBERS_PER_SIZE = 4

_NOISE = 0.02
_LONGEST_FIT = 60
_SHORTEST_CURVE = 6  # distinct message sizes below which only latency and bandwidth are fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Measured times of one collective: equally long arrays, an entry per timing."""

    ranks: NDArray[np.int64]
    bytes: Floats  # as nccl-tests count them
    seconds: Floats
    one_byte: NDArray[np.bool_]  # 8-bit elements

    def __post_init__(self) -> None:
        sizes = {len(self.ranks), len(self.bytes), len(self.seconds), len(self.one_byte)}
        if sizes == {0} or len(sizes) > 1 or not np.all(self.seconds > 0) or not np.all(self.bytes > 0):
            raise PlannerError(
                "timings are equally many positive bytes and seconds",
                value=sorted(sizes),
                remedy="measure every size at least once",
                key="timings",
            )

    def where(self, kept: NDArray[np.bool_]) -> Timings:
        """Some of the timings."""
        return Timings(
            ranks=self.ranks[kept],
            bytes=self.bytes[kept],
            seconds=self.seconds[kept],
            one_byte=self.one_byte[kept],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Which numbers a table has beside floor and bandwidth."""

    bulk: bool = True  # a latency of the bulk protocol, and the share of bandwidth that low latency reaches
    share: Literal["each", "shared"] = "shared"
    power: bool = False
    one_byte: Literal["none", "shared", "largest"] = "none"  # largest: group size alone

    def numbers(self, sizes: int) -> int:
        """How many for that many group sizes."""
        columns = (3 if self.bulk else 2) + (self.bulk and self.share == "each")
        return columns * sizes + (self.bulk and self.share == "shared") + self.power + (self.one_byte != "none")


SHAPES = (
    Shape(bulk=False),
    Shape(share="each"),
    Shape(power=True),
    Shape(one_byte="shared"),
    Shape(one_byte="largest"),
    Shape(power=True, one_byte="shared"),
    Shape(power=True, one_byte="largest"),
)


_REDUCE = ("all_reduce", "reduce_scatter")


def fit_collective(
    kind: str,
    timings: Timings,
    *,
    reference: str,
    source: SourceKind = "measured",
    spread: float = 0.0,
    switches_reduce: bool = False,
    low_latency: bool = True,
) -> CollectiveTable:
    """The table that errs least over these timings.

    Without `low_latency` there is one protocol: where no small messages were timed, the other's floor is a guess.

    Element size matters where elements are added up. Where switches add them up (8 GPUs on NVSwitch, and not
    for 8-bit elements), it matters there, that is at the largest group size alone.
    """
    sizes = np.unique(timings.ranks)
    fewest = min(len(np.unique(timings.bytes[timings.ranks == size])) for size in sizes)
    both = kind in _REDUCE and bool(timings.one_byte.any() and not timings.one_byte.all())
    one_bytes = (
        ("none",) if not both else ("none", "largest") if switches_reduce else ("none", "largest", "shared")
    )
    shapes = [
        shape
        for shape in SHAPES
        if shape.numbers(len(sizes)) <= MOST_NUMBERS_PER_SIZE * len(sizes)
        and ((low_latency and fewest >= _SHORTEST_CURVE) or not shape.bulk)
        and shape.one_byte in one_bytes
    ]
    fits = [_fit_shape(kind, timings, sizes, shape) for shape in shapes]
    best = min(fits, key=lambda fit: fit.cost)
    columns = best.columns()
    return CollectiveTable(
        source=source,
        reference=reference,
        spread=round(spread, 4),
        ranks=tuple(int(size) for size in sizes),
        **columns,  # type: ignore[arg-type]
    )


def predicted_seconds(kind: str, table: CollectiveTable, timings: Timings) -> Floats:
    """What a table says at its own group sizes, for each timing."""
    place = np.searchsorted(np.array(table.ranks), timings.ranks)
    factors = np.array([bus_factor(kind, size) for size in table.ranks])

    def column(values: tuple[float, ...]) -> Floats:
        return np.resize(np.array(values, dtype=np.float64), len(table.ranks))[place]

    bandwidth = column(table.bandwidth_gb_per_second) * 1e9
    bandwidth = bandwidth * np.where(timings.one_byte, column(table.one_byte_share or (1.0,)), 1.0)
    transfer = factors[place] * timings.bytes / bandwidth
    share = None
    if table.low_latency_share:
        channels = np.array([low_latency_channels(kind, size) for size in table.ranks])[place]
        share = np.minimum(column(table.low_latency_share) * channels, 1.0)
    latency = column(table.latency_us or table.floor_us) * 1e-6
    return _time(transfer, column(table.floor_us) * 1e-6, share, latency, table.power)


def mean_error(kind: str, table: CollectiveTable, timings: Timings) -> float:
    """Mean absolute relative error."""
    return float(np.mean(np.abs(predicted_seconds(kind, table, timings) / timings.seconds - 1.0)))


def left_out_error(kind: str, timings: Timings, *, switches_reduce: bool = False) -> float:
    """Mean absolute relative error on every other message size, with the table fitted on the rest; both ways."""
    order = np.searchsorted(np.unique(timings.bytes), timings.bytes)
    errors = []
    for kept in (order % 2 == 0, order % 2 == 1):
        table = fit_collective(
            kind, timings.where(kept), reference="every other size", switches_reduce=switches_reduce
        )
        rest = timings.where(~kept)
        errors.append(np.abs(predicted_seconds(kind, table, rest) / rest.seconds - 1.0))
    return float(np.mean(np.concatenate(errors)))


def _time(transfer: Floats, floor: Floats, share: Floats | None, latency: Floats, power: float) -> Floats:
    large, small = np.maximum(transfer, latency), np.minimum(transfer, latency)
    bulk: Floats = large * (1.0 + (small / large) ** power) ** (1.0 / power)
    return bulk if share is None else np.minimum(floor + transfer / share, bulk)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    shape: Shape
    sizes: int
    values: Floats  # logarithms: floors, bandwidths, latencies, shares, power, one-byte share
    cost: float

    def parts(self) -> dict[str, Floats]:
        """The columns, each as long as there are group sizes."""
        return _parts(self.shape, self.sizes, self.values)

    def columns(self) -> dict[str, object]:
        """Keys of a table, rounded to four digits."""
        parts = self.parts()

        def rounded(values: Floats, shared: bool = False) -> tuple[float, ...]:
            return tuple(float(f"{value:.4g}") for value in (values[:1] if shared else values))

        found: dict[str, object] = {
            "floor_us": rounded(parts["floor"] * 1e6),
            "bandwidth_gb_per_second": rounded(parts["bandwidth"] / 1e9),
        }
        if self.shape.bulk:
            found["latency_us"] = rounded(parts["latency"] * 1e6)
            found["low_latency_share"] = rounded(parts["share"], self.shape.share == "shared")
        if self.shape.power:
            found["power"] = rounded(parts["power"])[0]
        if self.shape.one_byte != "none":
            found["one_byte_share"] = rounded(parts["one_byte"], self.shape.one_byte == "shared")
        return found


def _parts(shape: Shape, sizes: int, values: Floats) -> dict[str, Floats]:
    taken = 0

    def take(count: int) -> Floats:
        nonlocal taken
        taken += count
        return np.exp(values[taken - count : taken])

    parts = {"floor": take(sizes), "bandwidth": take(sizes)}
    parts["latency"] = take(sizes) if shape.bulk else parts["floor"]
    parts["share"] = np.resize(
        np.minimum(take(sizes if shape.share == "each" else 1), 1.0) if shape.bulk else 1.0, sizes
    )
    parts["power"] = np.clip(take(1), 0.3, 4.0) if shape.power else np.ones(1)
    one_byte = take(1) if shape.one_byte != "none" else np.ones(1)
    parts["one_byte"] = np.resize(one_byte, sizes)
    if shape.one_byte == "largest":
        parts["one_byte"] = np.concatenate([np.ones(sizes - 1), one_byte])
    return parts


def _fit_shape(kind: str, timings: Timings, sizes: NDArray[np.int64], shape: Shape) -> _Fit:
    place = np.searchsorted(sizes, timings.ranks)
    moved = np.array([bus_factor(kind, int(size)) for size in sizes])[place] * timings.bytes
    channels = np.array([low_latency_channels(kind, int(size)) for size in sizes])
    target = np.log(timings.seconds)
    count = len(sizes)

    def residuals(values: Floats) -> Floats:
        part = _parts(shape, count, values)
        bandwidth = part["bandwidth"][place] * np.where(timings.one_byte, part["one_byte"][place], 1.0)
        share = np.minimum(part["share"] * channels, 1.0)[place] if shape.bulk else None
        latency = part["latency"][place]
        time = _time(moved / bandwidth, part["floor"][place], share, latency, float(part["power"][0]))
        return np.log(time) - target

    floors, rates = np.empty(count), np.empty(count)
    for size in range(count):
        here = place == size
        small = timings.bytes[here] <= 8 * timings.bytes[here].min()
        large = timings.bytes[here] == timings.bytes[here].max()
        floors[size] = np.log(np.median(timings.seconds[here][small]))
        rates[size] = np.log(np.median((moved[here] / timings.seconds[here])[large]))
    best, best_cost = np.empty(0), np.inf
    for slower in (1.3, 4.0) if shape.bulk else (1.0,):
        for share in (0.1, 0.5) if shape.bulk else (1.0,):
            start = [floors, rates]
            if shape.bulk:
                start += [floors + np.log(slower), np.full(count if shape.share == "each" else 1, np.log(share))]
            start += [np.full(1, np.log(0.7))] * shape.power
            start += [np.full(1, np.log(0.98))] * (shape.one_byte != "none")
            values, cost = _minimised(residuals, np.concatenate(start))
            if cost < best_cost:
                best, best_cost = values, cost
    return _Fit(shape=shape, sizes=count, values=best, cost=best_cost)


def _minimised(residuals: Callable[[Floats], Floats], start: Floats) -> tuple[Floats, float]:
    """Least Σ√(r² + noise²), by Levenberg–Marquardt steps on the reweighted squares."""
    values, damping = start, 1e-2
    found = residuals(values)
    cost = float(np.sum(np.sqrt(found**2 + _NOISE**2)))
    for _ in range(_LONGEST_FIT):
        jacobian = np.stack([(residuals(values + step) - found) / 1e-5 for step in np.eye(len(values)) * 1e-5], 1)
        weights = 1.0 / np.sqrt(found**2 + _NOISE**2)
        normal, gradient = jacobian.T @ (jacobian * weights[:, None]), jacobian.T @ (weights * found)
        before = cost
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -gradient)
            trial = values + np.clip(step, -1.0, 1.0)
            moved = residuals(trial)
            after = float(np.sum(np.sqrt(moved**2 + _NOISE**2)))
            if after < cost:
                values, found, cost, damping = trial, moved, after, max(damping / 5.0, 1e-9)
                break
            damping *= 5.0
        if before - cost < 1e-9 * before:
            break
    return values, cost
