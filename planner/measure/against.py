"""Measured beside expected: which link or device is slower than the profile says, and by how much."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.measure.cases import AttentionCase, Case, CollectiveCase, GemmCase, MemoryCase, PeerCase, key_of
from planner.measure.fitting import Formulas
from planner.measure.records import Measurement
from planner.spec.hardware import HardwareProfile

SLOW = 1.25  # times expected, from which on an entry is flagged, where the spread does not explain it
_SPREADS = 3.0  # standard deviations that measured and expected may be apart by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One measurement beside what the profile expects of it."""

    key: str
    measured_seconds: float
    expected_seconds: float
    spread: float  # of both together
    flag: str = ""  # why the entry is flagged

    @property
    def ratio(self) -> float:
        """Above 1: slower than expected."""
        return self.measured_seconds / self.expected_seconds

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "key": self.key,
            "measured_seconds": self.measured_seconds,
            "expected_seconds": self.expected_seconds,
            "ratio": self.ratio,
            "spread": self.spread,
            "flag": self.flag,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All entries; the answer is no where one is flagged."""

    profile: str
    entries: tuple[Entry, ...]
    unknown: tuple[str, ...]  # measured, and the profile says nothing about it

    @property
    def flagged(self) -> tuple[Entry, ...]:
        """Entries that are slower than they should be."""
        return tuple(entry for entry in self.entries if entry.flag)

    def lines(self) -> list[str]:
        """For the terminal: the verdict, what is slow, then every entry."""
        flags = list(dict.fromkeys(entry.flag for entry in self.flagged))
        verdict = f"slower than {self.profile}" if flags else f"nothing is slower than {self.profile} expects"
        found = [f"{verdict}: {len(self.entries)} entries compared", *(f"  slow: {flag}" for flag in flags)]
        found.append(f"{'entry':50} {'measured':>11} {'expected':>11} {'ratio':>6} {'spread':>7}")
        for entry in self.entries:
            measured, expected_ = (in_time(value) for value in (entry.measured_seconds, entry.expected_seconds))
            row = f"{entry.key[:50]:50} {measured:>11} {expected_:>11} {entry.ratio:6.2f} {entry.spread:7.0%}"
            found.append(f"{row}  slow" if entry.flag else row)
        if self.unknown:
            found.append(f"{self.profile} says nothing about {len(self.unknown)} more, such as {self.unknown[0]}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "profile": self.profile,
            "flagged": [entry.key for entry in self.flagged],
            "entries": [entry.to_dict() for entry in self.entries],
            "unknown": list(self.unknown),
        }


def expected(case: Case, profile: HardwareProfile, formulas: Formulas) -> tuple[float, float] | None:
    """Seconds by a profile and its recorded spread; none for what it has no number for."""
    device = profile.device
    if isinstance(case, GemmCase) and case.dtype in profile.gemm:
        curve = profile.gemm[case.dtype]
        m, n, k = (np.array(float(dim)) for dim in (case.m, case.n, case.k))
        return float(formulas.gemm(device, curve, case.dtype, m, n, k)), curve.spread
    if isinstance(case, AttentionCase) and case.dtype in profile.attention:
        fused = getattr(profile.attention[case.dtype], case.phase)
        sizes = {name: getattr(case, name) for name in ("batch", "query_len", "kv_len", "heads", "kv_heads")}
        formula = getattr(formulas, case.phase)
        seconds = formula(device, fused, case.dtype, **sizes, head_dim=case.head_dim, value_dim=case.head_dim)
        return float(seconds), fused.spread
    if isinstance(case, MemoryCase) and case.what in ("add", "gelu"):
        kernel = profile.elementwise
        return float(formulas.elementwise(device, kernel, case.bytes_, gelus=case.gelus)), kernel.spread
    if isinstance(case, CollectiveCase):
        return _link(profile, formulas, case.collective, case.bytes_, case.groups)
    if isinstance(case, PeerCase):
        return _link(profile, formulas, "p2p", case.bytes_, case.pairs)
    return None


def _link(
    profile: HardwareProfile, formulas: Formulas, kind: str, bytes_: int, groups: tuple[tuple[int, ...], ...]
) -> tuple[float, float] | None:
    """By where the ranks lie in the profile's own topology; none where it holds fewer."""
    if profile.largest_gpus and max(map(max, groups)) >= profile.largest_gpus:
        return None
    seconds = formulas.collective(profile, kind, bytes_, ranks=groups[0], concurrent_groups=len(groups))
    return float(seconds), max(level.spread for level in profile.topology.values())


def compare(
    measured: Mapping[Case, Measurement], expect: Callable[[Case], tuple[float, float] | None], profile: str
) -> Comparison:
    """Each measurement beside its expectation.

    A curve misses single sizes by its own error, so that a series (one dtype, one link) is flagged as a whole,
    by the median of its ratios; a device among its peers by its own median.
    """
    entries: dict[str, list[Entry]] = {}
    unknown = []
    for case, item in measured.items():
        found = expect(case)
        if found is None:
            unknown.append(key_of(case))
            continue
        seconds, spread = found
        entry = Entry(
            key=key_of(case),
            measured_seconds=item.seconds,
            expected_seconds=seconds,
            spread=(spread**2 + item.spread**2) ** 0.5,
        )
        entries.setdefault(_series(case), []).append(entry)
    flagged = [entry for series, items in entries.items() for entry in _flagged(series, items)]
    slow_ranks = list(_slow_ranks(measured))
    return Comparison(profile=profile, entries=(*flagged, *slow_ranks), unknown=tuple(unknown))


def in_time(seconds: float) -> str:
    """Seconds for a screen: 0.00123 → '1.23 ms'."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def slower(ratio: float, spread: float) -> bool:
    """Whether a ratio of measured to expected lies beyond what spread explains."""
    return ratio > max(SLOW, 1.0 + _SPREADS * spread)


def agrees(ratio: float, spread: float) -> bool:
    """Whether two runs agree: neither is slower than the other beyond the spread."""
    return not slower(ratio, spread) and not slower(1.0 / ratio, spread)


def _flagged(series: str, items: list[Entry]) -> list[Entry]:
    ratio = statistics.median(entry.ratio for entry in items)
    spread = statistics.median(entry.spread for entry in items)
    if not slower(ratio, spread):
        return items
    word = f"{series} is {ratio:.2f} times as slow as expected"
    return [
        Entry(**{**_fields(entry), "flag": word if slower(entry.ratio, entry.spread) else ""}) for entry in items
    ]


def _slow_ranks(measured: Mapping[Case, Measurement]) -> list[Entry]:
    """A device that is slower than the middle one in most of the products that all measured."""
    rows = [
        (item.by_rank, item.spread)
        for case, item in measured.items()
        if isinstance(case, (GemmCase, MemoryCase)) and len(item.by_rank) > 2 and min(item.by_rank) > 0
    ]
    found = []
    for rank in range(len(rows[0][0]) if rows else 0):
        ratios = [by_rank[rank] / statistics.median(by_rank) for by_rank, _ in rows]
        ratio, spread = statistics.median(ratios), statistics.median(spread for _, spread in rows)
        if slower(ratio, spread):
            middle = statistics.median(statistics.median(by_rank) for by_rank, _ in rows)
            found.append(
                Entry(
                    key=f"rank {rank}",
                    measured_seconds=middle * ratio,
                    expected_seconds=middle,
                    spread=spread,
                    flag=f"the device of rank {rank} is {ratio:.2f} times as slow as its peers",
                )
            )
    return found


def _series(case: Case) -> str:
    if isinstance(case, (GemmCase, AttentionCase)):
        kind = "products" if isinstance(case, GemmCase) else f"attention, {case.phase},"
        return f"{kind} in {case.dtype}"
    if isinstance(case, PeerCase):
        return f"the link of ranks {key_of(case).split()[2]} at level {case.level}"
    if isinstance(case, CollectiveCase):
        return f"{case.collective} at level {case.level} of ranks {key_of(case).split()[2]}"
    return "memory"


def _fields(entry: Entry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in ("key", "measured_seconds", "expected_seconds", "spread")}
