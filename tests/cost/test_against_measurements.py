"""The bundled profiles against published measurements, which lie beside a checkout and not in the package."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from planner.cost.attention import attention_decode_seconds, prefill_seconds
from planner.cost.collectives import CollectiveKind, collective_seconds
from planner.cost.gemm import gemm_seconds
from planner.spec.hardware import HardwareProfile
from planner.spec.workload import KvPrecision, Precision
from tests.measured_rows import (
    ACROSS_NODES,
    COLLECTIVES,
    DATA,
    ELEMENTS,
    ENGINE_MODES,
    MESH,
    MESH_SIZES,
    SYSTEMS,
    Floats,
    across_nodes_profile,
    across_nodes_rows,
    attention_rows,
    custom_all_reduce_rows,
    custom_predicted,
    gemm_rows,
    mesh_rows,
    nccl_rows,
    profile,
)

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the published measurements do not lie beside this checkout"
)

# Matrix products

GEMM_LARGE = {"dgx-a100-80g": 9.0, "dgx-h100": 6.5, "dgx-h200": 7.0, "dgx-b200": 9.0, "gb200-nvl72": 9.0}
GEMM_BF16_MEAN, GEMM_FP8_MEAN = 12.0, 16.0


def _gemm_errors(name: str, precision: Precision) -> tuple[float, float]:
    """Mean absolute percentage error for n, k ≥ 1024 and for all shapes."""
    rows = gemm_rows(name, precision)
    m, n, k = rows.where(rows.kept).values()
    found = profile(name)
    predicted = gemm_seconds(found.device, found.gemm_for(precision), precision, m, n, k)
    errors = 100.0 * np.abs(predicted / rows.seconds[rows.kept] - 1.0)
    return float(errors[(n >= 1024) & (k >= 1024)].mean()), float(errors.mean())


@needs_data
@pytest.mark.parametrize(("name", "limit"), GEMM_LARGE.items())
def test_large_bf16_products(name: str, limit: float) -> None:
    large, _ = _gemm_errors(name, "bf16")
    assert large <= limit


@needs_data
def test_bf16_products_of_all_shapes() -> None:
    assert np.mean([_gemm_errors(name, "bf16")[1] for name in SYSTEMS]) <= GEMM_BF16_MEAN


@needs_data
def test_fp8_products_of_all_shapes() -> None:
    names = [name for name in SYSTEMS if name != "dgx-a100-80g"]  # which has no fp8
    assert np.mean([_gemm_errors(name, "fp8")[1] for name in names]) <= GEMM_FP8_MEAN


@needs_data
@pytest.mark.parametrize("precision", ["fp8_block", "nvfp4"])
def test_other_quantised_products(precision: Precision) -> None:
    """No target is set for these; a curve beside its own measurements would show here."""
    for name in SYSTEMS:
        curves = profile(name).gemm
        if precision in curves and curves[precision].source == "measured":
            assert _gemm_errors(name, precision)[1] <= 16.0, name


def test_few_numbers_for_each_gpu_and_precision() -> None:
    for name in SYSTEMS:
        keys = [number.key for number in profile(name).numbers()]
        for precision in profile(name).gemm:
            assert sum(key.startswith(f"gemm.{precision}.") for key in keys) <= 12, (name, precision)


# Attention

ATTENTION_SYSTEMS = ("dgx-a100-80g", "dgx-h100", "dgx-h200", "dgx-b200")
ATTENTION_MEAN = {"prefill": 12.0, "decode": 9.0}


def _attention_errors(name: str, phase: str, precision: KvPrecision, usual: bool = False) -> Floats:
    """Absolute percentage errors of a system's rows; `usual`: of those that the fitted kernels served."""
    rows = attention_rows(name, phase, precision)
    mask = rows.kept if usual else np.full(len(rows.seconds), True)
    sizes = rows.where(mask)
    sizes["value_dim"] = sizes["head_dim"]
    found = profile(name)
    attention = found.attention_for(precision)
    if phase == "prefill":
        predicted = prefill_seconds(found.device, attention.prefill, precision, **sizes)
    else:
        predicted = attention_decode_seconds(found.device, attention, precision, **sizes)
    errors: Floats = 100.0 * np.abs(predicted / rows.seconds[mask] - 1.0)
    return errors


@needs_data
@pytest.mark.parametrize(("phase", "limit"), ATTENTION_MEAN.items())
def test_bf16_attention_of_all_shapes(phase: str, limit: float) -> None:
    errors = [_attention_errors(name, phase, "bf16").mean() for name in ATTENTION_SYSTEMS]
    assert np.mean(errors) <= limit


@needs_data
@pytest.mark.parametrize("phase", ATTENTION_MEAN)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_attention_of_every_measured_system(phase: str, precision: KvPrecision) -> None:
    """No target is set for each; a curve beside its own measurements would show here."""
    for name in SYSTEMS:
        if precision in profile(name).attention:
            assert _attention_errors(name, phase, precision, usual=True).mean() <= 15.0, name


def test_few_numbers_for_each_attention_kernel() -> None:
    for name in SYSTEMS:
        keys = [number.key for number in profile(name).numbers() if number.key.startswith("attention.")]
        for kernel in {key.rpartition(".")[0] for key in keys}:
            assert sum(key.startswith(f"{kernel}.") for key in keys) <= 13, (name, kernel)


# Collectives

COLLECTIVE_LIMIT, ACROSS_NODES_LIMIT, CUSTOM_LIMIT = 6.0, 20.0, 7.0


def _nccl_error(name: str, kind: CollectiveKind) -> float:
    """Mean absolute percentage error over group sizes, element sizes and bytes; known bad rows left out."""
    found = _with_collectives(name)
    rows = nccl_rows(name, kind)
    errors: list[Floats] = []
    for size in (2, 4, 8):
        for one_byte, dtype in enumerate(ELEMENTS.values()):
            here = rows.kept & (rows.sizes["ranks"] == size) & (rows.sizes["int8"] == one_byte)
            if here.any():
                count = rows.sizes["bytes"][here]
                predicted = collective_seconds(found, kind, count, ranks=range(size), dtype=dtype)
                errors.append(100.0 * np.abs(predicted / rows.seconds[here] - 1.0))
    return float(np.concatenate(errors).mean())


def _with_collectives(name: str) -> HardwareProfile:
    found = profile(name)
    if not any(level.collectives for level in found.topology.values()):
        pytest.skip(f"the profile {name} holds no measured collectives")
    return found


@needs_data
@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("name", SYSTEMS)
def test_collectives_inside_a_node(name: str, kind: CollectiveKind) -> None:
    assert _nccl_error(name, kind) <= COLLECTIVE_LIMIT


@pytest.mark.parametrize("name", SYSTEMS)
def test_few_numbers_for_each_collective(name: str) -> None:
    for level in _with_collectives(name).topology.values():
        for table in (*level.collectives.values(), *level.custom_all_reduce.values()):
            assert table.numbers_per_size <= 4.0


def test_eight_bit_elements_are_not_reduced_in_switches() -> None:
    """8 H100 at 512 MiB: 445 GB/s of bus bandwidth in half precision, 351 in int8."""
    found = _with_collectives("dgx-h100")
    for dtype, published in (("fp16", 445e9), ("int8", 351e9)):
        seconds = collective_seconds(found, "all_reduce", 2.0**29, ranks=range(8), dtype=dtype)
        assert 1.75 * 2**29 / seconds == pytest.approx(published, rel=0.1)


@needs_data
@pytest.mark.parametrize("mode", ENGINE_MODES)
@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "l40s-pcie"])  # slower there than NCCL
def test_the_all_reduce_of_serving_engines(name: str, mode: Literal["graph", "eager"]) -> None:
    rows, _ = custom_all_reduce_rows(name, mode)
    errors = 100.0 * np.abs(custom_predicted(name, rows, mode) / rows.seconds[rows.kept] - 1.0)
    assert errors.size >= 20
    assert errors.mean() <= CUSTOM_LIMIT


@needs_data
@pytest.mark.parametrize("size", MESH_SIZES)
def test_all_reduces_in_a_cube_mesh(size: int) -> None:
    rows = mesh_rows((size,))
    predicted = collective_seconds(profile(MESH), "all_reduce", rows.sizes["bytes"], ranks=range(size))
    assert (100.0 * np.abs(predicted / rows.seconds - 1.0)).mean() <= COLLECTIVE_LIMIT


@needs_data
def test_collectives_across_nodes() -> None:
    errors: list[float] = []
    for system, (name, _) in ACROSS_NODES.items():
        _with_collectives(name)
        found = across_nodes_profile(system)
        for nodes, count, measured in zip(*across_nodes_rows(system), strict=True):
            ranks = range(8 * int(nodes))
            predicted = collective_seconds(found, "all_reduce", float(count), ranks=ranks, dtype="fp32")
            errors.append(100.0 * abs(predicted / measured - 1.0))
    assert len(errors) >= 90
    assert np.mean(errors) <= ACROSS_NODES_LIMIT
