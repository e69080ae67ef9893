"""Intervals and what an estimate rests on."""

from __future__ import annotations

import math
from typing import Any

import pytest

from planner.cost.estimates import training_estimate
from planner.cost.uncertainty import CONFIDENCE, regime_of, source_shares, uncertainty
from planner.spec.estimate import Estimate, StepTime
from planner.spec.hardware_sources import load_hardware
from planner.spec.strategy import Strategy
from tests.cost.training_cases import exact, hardware, tiny, workload

H100 = load_hardware("dgx-h100")
GIB = 2**30


def estimate(name: str = "gpt", profile: Any = H100, strategy: Strategy | None = None, **work: Any) -> Estimate:
    return training_estimate(tiny(name), profile, workload(**work), strategy or Strategy(tp=2, dp=2))


@pytest.mark.parametrize(
    ("name", "precision", "regime"),
    [
        ("gpt", "bf16", "dense, 16-bit"),
        ("llama", "fp32", "dense, 16-bit"),
        ("llama", "fp8", "dense, 8-bit and below"),
        ("gpt", "nvfp4", "dense, 8-bit and below"),
        ("mixtral", "bf16", "experts"),
        ("deepseek", "fp8", "experts"),
    ],
)
def test_regimes(name: str, precision: str, regime: str) -> None:
    found = regime_of(tiny(name), H100, workload(precision=precision))
    assert found.name == regime
    assert found.runs > 0
    assert 0 < found.time_spread < 0.5
    assert 0 < found.memory_spread < 0.5


def test_intervals_hold_the_estimate() -> None:
    for name in ("gpt", "mixtral"):
        found = estimate(name)
        known = found.uncertainty
        assert known.confidence == CONFIDENCE
        assert known.step_seconds.low < found.step_seconds < known.step_seconds.high
        assert known.memory_bytes.low < found.memory_bytes < known.memory_bytes.high


def test_time_is_as_likely_above_as_below_and_80_percent_within() -> None:
    """±1.2816 standard deviations of the logarithm; memory rather errs above, 95 % lie below its end."""
    measured = StepTime(matmul_seconds=2.0)
    profile = hardware("dgx-h100")
    found = uncertainty(tiny("gpt"), profile, workload(), Strategy(), measured, 10.0 * GIB)
    regime = regime_of(tiny("gpt"), profile, workload())
    assert found.sources.assumed == 0.0
    assert math.log(found.step_seconds.high / 2.0) == pytest.approx(1.2816 * regime.time_spread)
    assert math.log(2.0 / found.step_seconds.low) == pytest.approx(1.2816 * regime.time_spread)
    assert math.log(found.memory_bytes.high / (10.0 * GIB)) == pytest.approx(1.645 * regime.memory_spread)
    assert found.memory_bytes.low > 10.0 * GIB * math.exp(-1.645 * regime.memory_spread)


def test_what_was_assumed_widens_the_interval() -> None:
    def width(profile: Any) -> float:
        interval = estimate(profile=profile).uncertainty.step_seconds
        return interval.high / interval.low

    assert estimate(profile=exact()).uncertainty.sources.assumed == 1.0
    assert width(exact()) > width(H100)


def test_shares_follow_the_seconds() -> None:
    step = StepTime(matmul_seconds=3.0, attention_seconds=2.0, elementwise_seconds=1.0, bubble_seconds=4.0)
    found = source_shares(H100, workload(), Strategy(), step)
    elementwise = H100.elementwise.origin("bandwidth_efficiency").source
    assert (H100.gemm["bf16"].source, H100.attention["bf16"].prefill.source) == ("measured", "measured")
    expected = {"measured": 5 / 6, "datasheet": 0.0, "paper": 0.0, "assumed": 0.0}
    expected[elementwise] += 1 / 6
    assert {key: getattr(found, key) for key in expected} == pytest.approx(expected)


def test_links_count_by_how_far_a_group_reaches() -> None:
    step = StepTime(tp_seconds=1.0)
    inside = source_shares(H100, workload(), Strategy(tp=8), step)
    across = source_shares(H100, workload(), Strategy(tp=16), step)
    assert inside.measured == 1.0
    levels = list(H100.topology.values())
    tables = list(levels[1].collectives.values())
    assert getattr(across, tables[0].source if tables else levels[1].source) == 1.0


def test_nothing_known_is_assumed() -> None:
    assert source_shares(H100, workload(), Strategy(), StepTime(bubble_seconds=1.0)).assumed == 1.0


@pytest.mark.parametrize("name", ["gpt", "mixtral", "deepseek"])
def test_shares_add_up(name: str) -> None:
    sources = estimate(name, strategy=Strategy(tp=2, pp=2, dp=4, zero=1)).uncertainty.sources
    assert sources.measured + sources.datasheet + sources.paper + sources.assumed == pytest.approx(1.0)


def test_fitting_is_judged_by_the_upper_end() -> None:
    found = estimate()
    high = found.uncertainty.memory_bytes.high / GIB
    assert estimate(profile=hardware("dgx-h100", device__memory_gib=high * 1.001)).fits
    short = estimate(profile=hardware("dgx-h100", device__memory_gib=high * 0.999))
    assert not short.fits
    assert short.memory_bytes < short.capacity_bytes
