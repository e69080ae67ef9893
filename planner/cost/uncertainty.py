"""How sure an estimate is: intervals from published runs of its regime, and what its numbers rest on.

A regime is what the published runs differ by most: how much of the cluster was measured at all, the precision's
width, whether tokens are routed to experts, and whether the software is the one that the runs had. Its spread is
the standard deviation of log(measured / predicted) over the published runs of that regime, each predicted with
constants that were fitted without its source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.spec.estimate import Interval, SourceShares, StepTime, Uncertainty
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.part_sources import part_sources
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload

CONFIDENCE = 0.8
_WITHIN = 1.2816  # standard deviations to either side that hold 80 % of a normal distribution
_MEMORY_ABOVE = 1.645  # … that 95 % lie below


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """Published runs that were predicted alike."""

    name: str
    runs: int
    time_spread: float  # of log(measured / predicted)
    memory_spread: float


_REGIMES: dict[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime(name="dense, 16-bit", runs=631, time_spread=0.10, memory_spread=0.11),
        Regime(name="dense, 8-bit and below", runs=210, time_spread=0.086, memory_spread=0.11),
        Regime(name="experts", runs=116, time_spread=0.22, memory_spread=0.14),
    )
}
_UNMEASURED_SPREAD = 0.15  # further, of what rests on assumed numbers: fractions of peak differ so between GPUs


def regime_of(graph: Graph, profile: HardwareProfile, workload: TrainWorkload) -> Regime:
    """The published runs that resemble this one most."""
    operators = (operator for block in graph.blocks.values() for operator in block.operators)
    if any(operator.kind == "grouped_matmul" for operator in operators):
        return _REGIMES["experts"]
    wide = workload.precision in ("fp32", "bf16", "fp16")
    return _REGIMES["dense, 16-bit" if wide else "dense, 8-bit and below"]


def uncertainty(
    graph: Graph,
    profile: HardwareProfile,
    workload: TrainWorkload,
    strategy: Strategy,
    step: StepTime,
    device_bytes: float,
) -> Uncertainty:
    """Intervals of an estimate, and the shares of its numbers by source."""
    regime = regime_of(graph, profile, workload)
    shares = source_shares(profile, workload, strategy, step)
    spread = math.hypot(regime.time_spread, _UNMEASURED_SPREAD * shares.assumed)
    return Uncertainty(
        confidence=CONFIDENCE,
        regime=regime.name,
        step_seconds=_around(step.total_seconds, spread * _WITHIN, spread * _WITHIN),
        memory_bytes=_around(device_bytes, regime.memory_spread * _WITHIN, regime.memory_spread * _MEMORY_ABOVE),
        sources=shares,
    )


def memory_headroom(graph: Graph, profile: HardwareProfile, workload: TrainWorkload) -> float:
    """How much larger the upper end of the memory's interval is than the estimate."""
    return math.exp(regime_of(graph, profile, workload).memory_spread * _MEMORY_ABOVE)


def _around(value: float, below: float, above: float) -> Interval:
    return Interval(low=value * math.exp(-below), high=value * math.exp(above))


def source_shares(
    profile: HardwareProfile, workload: TrainWorkload, strategy: Strategy, step: StepTime
) -> SourceShares:
    """Shares of the step by the source of the numbers behind each part; waiting rests on what is waited for."""
    seconds = dict.fromkeys(("measured", "datasheet", "paper", "assumed"), 0.0)
    for part, source in part_sources(profile, workload, strategy).items():
        seconds[source] += getattr(step, part)
    total = sum(seconds.values())
    if total <= 0.0:
        return SourceShares(assumed=1.0)
    return SourceShares(**{source: value / total for source, value in seconds.items()})
