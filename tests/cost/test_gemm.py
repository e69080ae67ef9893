"""Matrix products: worked by hand, monotone, never above the datasheet, grouped and batched as plain ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.gemm import gemm_seconds, grouped_gemm_seconds
from planner.errors import PlannerError
from planner.spec.hardware import Device, GemmCurve
from planner.spec.workload import Precision

DEVICE = Device(
    source="datasheet",
    reference="round numbers",
    name="round",
    gpus_per_node=8,
    memory_gib=80.0,
    memory_bandwidth_gb_per_second=1000.0,
    peak_tflops={"fp32": 10.0, "bf16": 100.0, "fp8": 200.0, "fp4": 400.0},
)
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8", "fp8_block", "mxfp8", "nvfp4", "mxfp4")


def curve(**numbers: Any) -> GemmCurve:
    neutral = {"efficiency": 1.0, "bandwidth_efficiency": 1.0, "floor_us": 0.0}
    return GemmCurve(source="assumed", reference="chosen for the test", **(neutral | numbers))


FULL = curve(
    efficiency=0.8, bandwidth_efficiency=0.9, floor_us=2.5, m_half=20.0, n_half=10.0, k_half=100.0,
    roofline_power=3.5, write_factor=1.3, k_step_ns=1.5, split_k=2800.0, cast_bytes=6.0, cast_row_ns=5.0,
)  # fmt: skip

sizes = st.integers(1, 1 << 17)
shares = st.floats(0.1, 1.0)
curves = st.builds(
    curve,
    efficiency=shares,
    bandwidth_efficiency=shares,
    floor_us=st.floats(0.0, 100.0),
    m_half=st.floats(0.0, 500.0),
    n_half=st.floats(0.0, 500.0),
    k_half=st.floats(0.0, 1000.0),
    roofline_power=st.just(0.0) | st.floats(1.0, 100.0),
    write_factor=st.floats(1.0, 5.0),
    k_step_ns=st.floats(0.0, 10.0),
    split_k=st.just(0.0) | st.floats(10.0, 1e6),
    cast_bytes=st.floats(0.0, 20.0),
    cast_row_ns=st.floats(0.0, 20.0),
)


def test_the_longer_of_compute_and_memory() -> None:
    # 2·1000³ / 100e12 = 20 µs against 6e6 bytes / 1e12 = 6 µs
    assert gemm_seconds(DEVICE, curve(), "bf16", 1000, 1000, 1000) == pytest.approx(20e-6)
    # one row: 2·(1000 + 1000² + 1000) bytes
    assert gemm_seconds(DEVICE, curve(), "bf16", 1, 1000, 1000) == pytest.approx(2.004e-6)


@pytest.mark.parametrize(
    ("numbers", "microseconds"),
    [
        ({"efficiency": 0.5}, 40.0),
        ({"floor_us": 3.0}, 23.0),
        ({"m_half": 1000.0}, 40.0),
        ({"n_half": 1000.0, "k_half": 500.0}, 60.0),
        ({"roofline_power": 1.0}, 26.0),
        ({"roofline_power": 2.0}, (20.0**2 + 6.0**2) ** 0.5),
        ({"roofline_power": 1.0, "write_factor": 2.0}, 28.0),
        ({"roofline_power": 1.0, "bandwidth_efficiency": 0.5}, 32.0),
        ({"k_step_ns": 2.0}, 22.0),
        ({"k_step_ns": 2.0, "split_k": 1000.0}, 21.0),
        ({"cast_bytes": 3.0, "cast_row_ns": 4.0}, 20.0 + 3.0 + 4.0),
    ],
)
def test_what_each_number_does(numbers: dict[str, float], microseconds: float) -> None:
    found = gemm_seconds(DEVICE, curve(**numbers), "bf16", 1000, 1000, 1000)
    assert found == pytest.approx(microseconds * 1e-6)


@pytest.mark.parametrize(
    ("precision", "weight_bytes"),
    [("fp32", 4.0), ("bf16", 2.0), ("fp8", 1.0), ("nvfp4", 0.5625), ("mxfp4", 0.53125)],
)
def test_a_single_row_reads_the_weight(precision: Precision, weight_bytes: float) -> None:
    found = gemm_seconds(DEVICE, curve(), precision, 1, 10_000, 10_000)
    assert found == pytest.approx(weight_bytes * 1e8 / 1e12, rel=1e-3)


def test_a_batch_pays_each_product_and_one_floor() -> None:
    one = gemm_seconds(DEVICE, FULL, "bf16", 512, 512, 64)
    assert gemm_seconds(DEVICE, FULL, "bf16", 512, 512, 64, batch=1) == one
    walk = 1.5e-9 * 64 / (1 + 64 / 2800)
    once = 2.5e-6 + walk
    batch = gemm_seconds(DEVICE, FULL, "bf16", 512, 512, 64, batch=32)
    assert batch - once == pytest.approx(32 * (one - once))


def test_nothing_to_multiply_costs_nothing() -> None:
    assert gemm_seconds(DEVICE, FULL, "bf16", 0, 512, 512) == 0.0
    assert gemm_seconds(DEVICE, FULL, "bf16", 512, 512, 512, batch=0) == 0.0
    assert grouped_gemm_seconds(DEVICE, FULL, "bf16", 0, 512, 512, experts=8) == 0.0
    assert gemm_seconds(DEVICE, FULL, "bf16", np.array([0, 8]), 512, 512)[0] == 0.0


def test_a_precision_without_a_peak_is_refused() -> None:
    with pytest.raises(PlannerError) as caught:
        gemm_seconds(DEVICE, FULL, "int8", 8, 8, 8)
    assert caught.value.key == "device.peak_tflops.int8"


def test_scalars_give_a_float_and_arrays_broadcast() -> None:
    assert type(gemm_seconds(DEVICE, FULL, "fp8", 8, 8, 8)) is float
    assert type(grouped_gemm_seconds(DEVICE, FULL, "fp8", 8, 8, 8, experts=2)) is float
    m, n = np.array([1, 2, 3]), np.array([[10], [20]])
    table = gemm_seconds(DEVICE, FULL, "fp8", m, n, 30)
    assert table.shape == (2, 3)
    assert table[1, 2] == gemm_seconds(DEVICE, FULL, "fp8", 3, 20, 30)
    assert list(m) == [1, 2, 3]


def test_grouped_reads_the_weights_of_the_experts_it_touches() -> None:
    # memory bound: 64 experts of 1000×1000 bf16 weights; one row touches one of them
    found = grouped_gemm_seconds(DEVICE, curve(), "bf16", 1, 1000, 1000, experts=64)
    assert found == pytest.approx(2.004e-6)
    # two rows touch 64·(1 − (63/64)²) = 1.984 of them
    found = grouped_gemm_seconds(DEVICE, curve(), "bf16", 2, 1000, 1000, experts=64)
    assert found == pytest.approx(2e-6 * (2 - 1 / 64) + 2 * 0.004e-6)
    # many rows touch all
    found = grouped_gemm_seconds(DEVICE, curve(roofline_power=1.0), "bf16", 64_000, 1000, 1000, experts=64)
    assert found == pytest.approx(1280e-6 + 64 * 2e-6 + 256e-6)


def test_imbalance_is_more_rows_on_the_busiest() -> None:
    even = grouped_gemm_seconds(DEVICE, FULL, "bf16", 1500, 512, 512, experts=8)
    assert grouped_gemm_seconds(DEVICE, FULL, "bf16", 1000, 512, 512, experts=8, imbalance=1.5) == even


@given(curves, st.sampled_from(PRECISIONS), sizes, sizes, sizes)
def test_one_expert_is_a_plain_product(numbers: GemmCurve, precision: Precision, m: int, n: int, k: int) -> None:
    plain = gemm_seconds(DEVICE, numbers, precision, m, n, k)
    assert grouped_gemm_seconds(DEVICE, numbers, precision, m, n, k, experts=1) == pytest.approx(plain, rel=1e-12)
    assert gemm_seconds(DEVICE, numbers, precision, m, n, k, batch=1) == plain


@given(curves, st.sampled_from(PRECISIONS), sizes, sizes, sizes, sizes, sizes, sizes)
def test_more_never_costs_less(
    numbers: GemmCurve, precision: Precision, m: int, n: int, k: int, dm: int, dn: int, dk: int
) -> None:
    before = gemm_seconds(DEVICE, numbers, precision, m, n, k)
    slack = 1.0 + 1e-12
    for more in ((m + dm, n, k), (m, n + dn, k), (m, n, k + dk), (m + dm, n + dn, k + dk)):
        assert gemm_seconds(DEVICE, numbers, precision, *more) * slack >= before
    assert gemm_seconds(DEVICE, numbers, precision, m, n, k, batch=1 + dm) * slack >= before
    grouped = grouped_gemm_seconds(DEVICE, numbers, precision, m, n, k, experts=8)
    assert grouped * slack >= before
    assert grouped_gemm_seconds(DEVICE, numbers, precision, m + dm, n, k, experts=8) * slack >= grouped
    assert grouped_gemm_seconds(DEVICE, numbers, precision, m, n, k, experts=9) * slack >= grouped


@given(curves, st.sampled_from(PRECISIONS), sizes, sizes, sizes)
def test_never_faster_than_the_datasheet(numbers: GemmCurve, precision: Precision, m: int, n: int, k: int) -> None:
    best = gemm_seconds(DEVICE, curve(), precision, m, n, k)
    assert best >= 2.0 * m * n * k / DEVICE.peak_flops(precision) * (1 - 1e-12)
    assert gemm_seconds(DEVICE, numbers, precision, m, n, k) >= best * (1 - 1e-12)


@given(curves, st.sampled_from(PRECISIONS), sizes, sizes, sizes)
def test_continuous(numbers: GemmCurve, precision: Precision, m: int, n: int, k: int) -> None:
    """A millionth more of a dim moves the cost by a few millionths, at joints of the roofline too."""
    here = gemm_seconds(DEVICE, numbers, precision, m, n, k)
    for near in ((m * 1.000001, n, k), (m, n * 1.000001, k), (m, n, k * 1.000001)):
        assert gemm_seconds(DEVICE, numbers, precision, *near) == pytest.approx(here, rel=3e-6)


@given(curves, sizes, sizes, sizes)
def test_a_faster_device_is_never_slower(numbers: GemmCurve, m: int, n: int, k: int) -> None:
    before = gemm_seconds(DEVICE, numbers, "bf16", m, n, k) * (1 + 1e-12)
    memory = dataclasses.replace(DEVICE, memory_bandwidth_gb_per_second=2000.0)
    compute = dataclasses.replace(DEVICE, peak_tflops={"bf16": 200.0})
    assert gemm_seconds(memory, numbers, "bf16", m, n, k) <= before
    assert gemm_seconds(compute, numbers, "bf16", m, n, k) <= before


def test_extremes_stay_finite() -> None:
    steep = curve(roofline_power=1000.0, m_half=1.0)
    assert np.isfinite(
        gemm_seconds(DEVICE, steep, "bf16", np.array([1.0, 1e9]), 1e9, np.array([[1.0], [1e9]]))
    ).all()
