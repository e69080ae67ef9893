"""Seconds of one call: warm-up, as many calls per sample as the clock needs, as many samples as noise needs.

Ranks sample in step: each sample starts at a barrier, and every decision rests on numbers all ranks have.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from planner.measure.records import relative_deviation

# calls something so many times and returns the seconds of one call
Batch = Callable[[int], float]

_CUDA: Any = torch.cuda  # its events and streams are untyped

_MOST_CAPTURED, _GRAPH_SECONDS = 20, 2e-3
CAPTURE = "thread_local"  # or the communication library's own thread would end a capture

_NOISY = 0.1  # relative median deviation above which more samples are taken
_FAR = 4.0  # deviations from the median at which a sample is an outlier and taken again


class Peers(Protocol):
    """What sampling needs of the other ranks."""

    def gather(self, values: list[float]) -> list[list[float]]:
        """Everyone's numbers, in rank order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure."""

    seconds: float  # per case and round
    sample_seconds: float  # shortest sample
    fewest: int
    most: int
    slow_seconds: float  # no larger case of a series whose call would take longer
    rounds: int
    extra_rounds: int  # of cases whose rounds disagree
    until_seconds: float  # after the start, when the first round is over: then what has been measured stands


# a machine's noise lasts longer than a sample: many short bursts, spread over the run, tell more than a long one
QUICK = Effort(
    seconds=0.02,
    sample_seconds=0.001,
    fewest=3,
    most=9,
    slow_seconds=0.2,
    rounds=4,
    extra_rounds=1,
    until_seconds=36.0,
)
THOROUGH = Effort(
    seconds=0.2,
    sample_seconds=0.005,
    fewest=5,
    most=35,
    slow_seconds=2.0,
    rounds=5,
    extra_rounds=2,
    until_seconds=3600.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Seconds of one call by sample, and each rank's median."""

    seconds: tuple[float, ...]
    by_rank: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Relative median absolute deviation."""
        return relative_deviation(self.seconds)


def sample(batch: Batch, peers: Peers, effort: Effort, *, slowest: bool) -> Samples:
    """Sample a call on all ranks; a sample is the slowest rank's, or else the middle one's.

    Where ranks wait for one another, a call in ten may take ten times as long, and a step that issues a hundred
    pays for their mean: samples are then as long as the time allows, and none is an outlier. Ranks that have no
    part in a call return 0 and are left out.
    """
    batch(1)
    shortest = effort.seconds / effort.fewest if slowest else effort.sample_seconds
    trial = _largest(peers, batch(1))
    if trial < shortest / 10:
        trial = _largest(peers, batch(10))
    calls = max(1, min(10_000, round(shortest / max(trial, 1e-9))))
    count = int(effort.seconds / max(trial * calls, 1e-9))
    count = max(effort.fewest, min(effort.most, count))
    rows = _rows(batch, peers, calls, count)
    for _ in range(0 if slowest else 2):
        values = [_of_row(row, slowest=slowest) for row in rows]
        spread, middle = relative_deviation(values), statistics.median(values)
        far = [value > middle * (1 + _FAR * max(spread, 0.01)) for value in values]
        affordable = trial * calls * effort.fewest < 2 * effort.seconds
        if not affordable or (not any(far) and spread <= _NOISY):
            break
        kept = [row for row, is_far in zip(rows, far, strict=True) if not is_far]
        rows = kept + _rows(batch, peers, calls, max(effort.fewest, sum(far)))
    ranks = zip(*rows, strict=True)
    return Samples(
        seconds=tuple(_of_row(row, slowest=slowest) for row in rows),
        by_rank=tuple(statistics.median(rank) for rank in ranks),
    )


def _rows(batch: Batch, peers: Peers, calls: int, count: int) -> list[list[float]]:
    """Samples × ranks."""
    own = []
    for _ in range(count):
        peers.gather([])
        own.append(batch(calls))
    return [list(row) for row in zip(*peers.gather(own), strict=True)]


def _of_row(row: list[float], *, slowest: bool) -> float:
    part = [value for value in row if value > 0] or [0.0]
    return max(part) if slowest else statistics.median(part)


def _largest(peers: Peers, value: float) -> float:
    return max(row[0] for row in peers.gather([value]))


def timed(call: Callable[[], Any], device: str) -> Batch:
    """Time calls issued one after the other: by events on a GPU, by the host's clock on a CPU."""
    if device != "cuda":
        return _host_timed(call)

    def batch(calls: int) -> float:
        start, end = _CUDA.Event(enable_timing=True), _CUDA.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / calls

    return batch


def timed_kernel(call: Callable[[], Any], device: str) -> Batch:
    """The same without launch cost: on a GPU short calls are captured in a graph, up to twenty, and replayed."""
    if device != "cuda":
        return _host_timed(call)
    side = _CUDA.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    captured = max(1, min(_MOST_CAPTURED, int(_GRAPH_SECONDS / timed(call, device)(1))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=CAPTURE):
        for _ in range(captured):
            call()
    replay = timed(graph.replay, device)
    return each_of(replay, captured)


def each_of(together: Batch, count: int) -> Batch:
    """One of so many that a call makes."""
    return lambda calls: together(max(1, calls // count)) / count


def host_seconds(call: Callable[[], Any], device: str) -> Batch:
    """What the host spends on issuing a call, before anything waits for the device."""

    def batch(calls: int) -> float:
        settle(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        spent = time.perf_counter() - start
        settle(device)
        return spent / calls

    return batch


def settle(device: str) -> None:
    """Wait until the device has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def _host_timed(call: Callable[[], Any]) -> Batch:
    def batch(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return batch
