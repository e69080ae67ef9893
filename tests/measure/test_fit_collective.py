"""The fitter finds the constants that made a curve, and refuses what it cannot fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.cost.curves import table_curve
from planner.errors import PlannerError
from planner.measure.fit_collective import (
    MOST_NUMBERS_PER_SIZE,
    SHAPES,
    Timings,
    fit_collective,
    left_out_error,
    mean_error,
    predicted_seconds,
)
from planner.spec.hardware import CollectiveTable

BYTES = 512.0 * 2.0 ** np.arange(21)
TRUE = CollectiveTable(
    source="assumed",
    reference="made up",
    ranks=(2, 4, 8),
    floor_us=(6.0, 9.0, 15.0),
    bandwidth_gb_per_second=(300.0, 340.0, 360.0),
    latency_us=(20.0, 30.0, 55.0),
    low_latency_share=(0.3,),
    power=0.8,
)


def timings(kind: str, table: CollectiveTable, noise: float = 0.0, one_byte: bool = False) -> Timings:
    """What a table predicts, at every size and group size, with lognormal noise."""
    ranks = np.repeat(np.array(table.ranks), len(BYTES))
    many = np.tile(BYTES, len(table.ranks))
    bits = np.zeros(len(many), dtype=np.bool_)
    if one_byte:
        ranks, many, bits = np.tile(ranks, 2), np.tile(many, 2), np.repeat([False, True], len(many))
    made = Timings(ranks=ranks, bytes=many, seconds=np.ones(len(many)), one_byte=bits)
    random = np.random.default_rng(7)
    seconds = predicted_seconds(kind, table, made) * np.exp(noise * random.standard_normal(len(many)))
    return Timings(ranks=ranks, bytes=many, seconds=seconds, one_byte=bits)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_the_fitter_and_the_cost_read_a_table_alike(kind: str) -> None:
    made = timings(kind, TRUE)
    expected = [
        table_curve(TRUE, kind, int(size)).seconds(count)
        for size, count in zip(made.ranks, made.bytes, strict=True)
    ]
    assert list(made.seconds) == pytest.approx(expected)


def test_known_constants_are_recovered() -> None:
    found = fit_collective("all_gather", timings("all_gather", TRUE), reference="made up")
    assert found.ranks == TRUE.ranks
    assert found.power == pytest.approx(0.8, rel=0.02)
    assert found.low_latency_share == pytest.approx((0.3,), rel=0.02)
    for key in ("floor_us", "bandwidth_gb_per_second", "latency_us"):
        assert getattr(found, key) == pytest.approx(getattr(TRUE, key), rel=0.02)


def test_known_constants_are_recovered_from_noise() -> None:
    noisy = timings("all_gather", TRUE, noise=0.03)
    found = fit_collective("all_gather", noisy, reference="made up")
    assert found.floor_us == pytest.approx(TRUE.floor_us, rel=0.05)
    assert found.bandwidth_gb_per_second == pytest.approx(TRUE.bandwidth_gb_per_second, rel=0.08)
    assert mean_error("all_gather", found, noisy) < 0.03
    assert left_out_error("all_gather", noisy) < 0.04


@pytest.mark.parametrize("switches", [False, True])
def test_element_size_matters_where_elements_are_added(switches: bool) -> None:
    shares = (1.0, 1.0, 0.8) if switches else (0.9,)
    table = CollectiveTable(
        source="assumed", reference="made up", ranks=(2, 4, 8), floor_us=(6.0, 9.0, 15.0),
        bandwidth_gb_per_second=(300.0, 340.0, 440.0), latency_us=(20.0, 30.0, 55.0), low_latency_share=(0.3,),
        one_byte_share=shares,
    )  # fmt: skip
    made = timings("all_reduce", table, one_byte=True)
    found = fit_collective("all_reduce", made, reference="made up", switches_reduce=switches)
    assert found.one_byte_share == pytest.approx(shares, rel=0.01)
    gathered = fit_collective("all_gather", timings("all_gather", table, one_byte=True), reference="made up")
    assert gathered.one_byte_share == ()


def test_the_same_timings_give_the_same_table() -> None:
    made = timings("all_to_all", TRUE, noise=0.05)
    assert fit_collective("all_to_all", made, reference="x") == fit_collective("all_to_all", made, reference="x")


@pytest.mark.parametrize("sizes", [1, 2, 3])
def test_no_more_than_four_numbers_a_group_size(sizes: int) -> None:
    made = timings("all_reduce", TRUE, noise=0.02, one_byte=True)
    some = made.where(made.ranks <= TRUE.ranks[sizes - 1])
    table = fit_collective("all_reduce", some, reference="made up")
    assert table.numbers_per_size <= MOST_NUMBERS_PER_SIZE
    assert any(shape.numbers(sizes) <= MOST_NUMBERS_PER_SIZE * sizes for shape in SHAPES)


def test_few_sizes_give_latency_and_bandwidth_alone() -> None:
    made = timings("all_gather", TRUE)
    few = made.where(np.isin(made.bytes, BYTES[::5]))
    table = fit_collective("all_gather", few, reference="a quick measurement")
    assert (table.latency_us, table.low_latency_share, table.power) == ((), (), 1.0)
    assert np.all(np.diff(table.floor_us) > 0)


def test_one_protocol_where_the_other_was_not_timed() -> None:
    plain = replace(TRUE, power=1.0, latency_us=(), low_latency_share=())
    made = timings("all_gather", plain, noise=0.01)
    large = made.where(made.bytes >= 2**20)
    table = fit_collective("all_gather", large, reference="large messages", low_latency=False)
    assert (table.latency_us, table.low_latency_share, table.power) == ((), (), 1.0)
    assert table.floor_us == pytest.approx(plain.floor_us, rel=0.2)
    assert table.bandwidth_gb_per_second == pytest.approx(plain.bandwidth_gb_per_second, rel=0.02)


def test_an_outlier_moves_little() -> None:
    made = timings("all_gather", TRUE, noise=0.01)
    seconds = made.seconds.copy()
    seconds[[5, 30, 50]] *= 3.0
    spoilt = Timings(ranks=made.ranks, bytes=made.bytes, seconds=seconds, one_byte=made.one_byte)
    clean, found = (fit_collective("all_gather", item, reference="x") for item in (made, spoilt))
    assert found.bandwidth_gb_per_second == pytest.approx(clean.bandwidth_gb_per_second, rel=0.05)
    assert found.floor_us == pytest.approx(clean.floor_us, rel=0.05)


@pytest.mark.parametrize("seconds", [[], [0.0], [1.0, 1.0]])
def test_what_cannot_be_fitted_is_refused(seconds: list[float]) -> None:
    one = len(seconds) == 2
    with pytest.raises(PlannerError) as caught:
        Timings(
            ranks=np.array([2] * (1 if one else len(seconds)), dtype=np.int64),
            bytes=np.array([1.0] * len(seconds)),
            seconds=np.array(seconds),
            one_byte=np.array([False] * len(seconds)),
        )
    assert caught.value.key == "timings"
