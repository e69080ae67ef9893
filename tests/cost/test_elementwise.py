"""Kernels bound by memory and the host that issues them, by hand-worked numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost.elementwise import (
    activation_traffic,
    cast_bytes,
    cross_entropy_traffic,
    elementwise_seconds,
    embedding_traffic,
    host_seconds,
    issued_seconds,
    norm_traffic,
    optimizer_bytes_per_parameter,
    residual_traffic,
)
from planner.spec.hardware import Device, Elementwise, SoftwareStack
from planner.units import MIB

ROUND = Device(
    source="assumed",
    reference="round numbers",
    name="round",
    gpus_per_node=1,
    memory_gib=80.0,
    memory_bandwidth_gb_per_second=1000.0,
    peak_tflops={"bf16": 100.0},
)
CURVE = Elementwise(
    source="assumed", reference="round numbers", bandwidth_efficiency=0.5, floor_us=2.0, half_mib=4.0
)
EAGER = SoftwareStack(
    source="assumed",
    reference="round numbers",
    kernel_us=5.0,
    layer_us=100.0,
    expert_layer_us=300.0,
    collective_us=20.0,
    step_us=1000.0,
)


def test_a_kernel_by_hand() -> None:
    # 1 GB at 500 GB/s, and the ramp of 4 MiB
    assert elementwise_seconds(ROUND, CURVE, 1e9) == pytest.approx(2e-6 + 2e-3 + 4 * MIB / 500e9)
    three = elementwise_seconds(ROUND, CURVE, 1e9, kernels=3)
    assert three == pytest.approx(6e-6 + 2e-3 + 12 * MIB / 500e9)


def test_gelus_take_arithmetic_beside_their_bytes() -> None:
    dear = dataclasses.replace(CURVE, gelu_ns=2.0)
    assert elementwise_seconds(ROUND, dear, 1e9, gelus=1e6) - elementwise_seconds(ROUND, CURVE, 1e9) == (
        pytest.approx(2e-3)
    )
    assert elementwise_seconds(ROUND, dear, 1e9) == elementwise_seconds(ROUND, CURVE, 1e9)


def test_half_the_bandwidth_at_half() -> None:
    seconds = elementwise_seconds(ROUND, CURVE, 4 * MIB) - 2e-6
    assert 4 * MIB / seconds == pytest.approx(250e9)


def test_traffic_by_hand() -> None:
    norm = norm_traffic(100, 64, 2.0)
    assert (norm.forward_bytes, norm.backward_bytes) == (4 * 6400 + 400, 6 * 6400 + 400)
    gelu = activation_traffic(100, 64, 2.0)
    assert (gelu.forward_bytes, gelu.backward_bytes) == (2 * 12800, 3 * 12800)
    swiglu = activation_traffic(100, 64, 2.0, gated=True)
    assert (swiglu.forward_bytes, swiglu.backward_bytes) == (3 * 12800, 5 * 12800)
    residual = residual_traffic(100, 64, 2.0)
    assert (residual.forward_bytes, residual.backward_bytes) == (3 * 12800, 0)
    assert cast_bytes(10, 4.0, 2.0) == 60
    rows = embedding_traffic(100, 64, 2.0)
    assert (rows.forward_bytes, rows.backward_bytes) == (2 * 12800 + 800, 6400 * 10 + 800)
    # cast 2 → 4 bytes, read and written in fp32; a target and a loss per token
    loss = cross_entropy_traffic(10, 1000, 2.0)
    assert loss.forward_bytes == loss.backward_bytes == 10_000 * (6 + 8) + 120
    assert cross_entropy_traffic(10, 1000, 4.0).forward_bytes == 10_000 * 8 + 120


@pytest.mark.parametrize(
    ("optimizer", "width", "gradient_width", "expected"),
    [
        ("adamw", 2.0, 4.0, 30.0),  # gradient 4; master and two moments 12 read, 12 written; weight 2
        ("adamw", 2.0, 2.0, 28.0),
        ("adamw", 4.0, 4.0, 28.0),
        ("sgd", 4.0, 4.0, 12.0),
        ("sgd", 2.0, 4.0, 14.0),
    ],
)
def test_optimizer_bytes(optimizer: str, width: float, gradient_width: float, expected: float) -> None:
    assert optimizer_bytes_per_parameter(optimizer, width, gradient_width) == expected  # type: ignore[arg-type]


def test_the_host_adds_up_what_it_issues() -> None:
    seconds = host_seconds(EAGER, kernels=40, layers=2, expert_layers=1, collectives=3, steps=1)
    assert seconds == pytest.approx((200 + 200 + 300 + 60 + 1000) * 1e-6)
    assert host_seconds(EAGER) == 0


def test_the_slower_of_device_and_host_counts() -> None:
    assert issued_seconds(1e-3, 2e-3) == 2e-3
    assert list(issued_seconds(np.array([1.0, 3.0]), 2.0)) == [2.0, 3.0]


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.integers(1, 100))
def test_more_bytes_never_cost_less(bytes_: float, more: float, kernels: int) -> None:
    less = elementwise_seconds(ROUND, CURVE, bytes_, kernels)
    assert elementwise_seconds(ROUND, CURVE, bytes_ + more, kernels) >= less
    assert elementwise_seconds(ROUND, CURVE, bytes_, kernels + 1) > less
