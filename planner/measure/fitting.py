"""From measurements of one device to the curves of a profile, through the cost formulas that planning uses.

The formulas are handed in, so that a curve is fitted to exactly the function that will read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.measure.cases import AttentionCase, Case, GemmCase, LaunchCase, MemoryCase, OverlapCase
from planner.measure.fit_attention import assess, fit_curve
from planner.measure.fit_gemm import FEWEST_ROWS, GemmFormula, fit_gemm
from planner.measure.records import Measurement
from planner.spec.hardware import (
    Attention,
    AttentionCurve,
    DecodeCurve,
    Device,
    Elementwise,
    GemmCurve,
    Interference,
    SoftwareStack,
)
from planner.spec.provenance import Origin

Measured = Mapping[Case, Measurement]

_SIZES = ("batch", "query_len", "kv_len", "heads", "kv_heads", "head_dim")
_FEWEST_ATTENTION = 4
_LEAST_FLOOR_US = 1e-3
_MOST_EFFICIENT = 2.0  # that a profile takes; a fit passes it where the timings show no limit of computation
_MEMORY_BOUND = 1.2  # up to so many times what its bytes take, memory rules a kernel
_DAO = Origin(source="paper", reference="Dao 2023, FlashAttention-2: backward has five products, forward two")
_SAME_CORE = Origin(
    source="assumed", reference="cores that issue kernels run them too: neither waits for the other"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Formulas:
    """The cost formulas of `planner.cost`."""

    gemm: GemmFormula
    prefill: Callable[..., Any]  # (device, curve, precision, *, batch, …), as the next two
    backward: Callable[..., Any]
    decode: Callable[..., Any]
    elementwise: Callable[..., Any]  # (device, curve, bytes)
    collective: Callable[..., Any]  # (profile, kind, bytes, *, ranks, concurrent_groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A curve and its mean absolute error over the timings it was fitted to, in percent."""

    curve: Any
    error: float


def median_spread(measurements: Sequence[Measurement]) -> float:
    """The typical spread of a section's measurements."""
    return round(min(1.0, float(np.median([item.spread for item in measurements]))), 4) if measurements else 0.0


def rates(measured: Measured, least_bytes: int) -> dict[str, float]:
    """The best bytes a second of copies and additions from a size on that no cache holds."""
    found: dict[str, float] = {}
    for case, item in measured.items():
        if isinstance(case, MemoryCase) and case.bytes_ >= least_bytes:
            found[case.what] = max(found.get(case.what, 0.0), case.bytes_ / item.seconds)
    return found


def peaks(measured: Measured) -> dict[str, float]:
    """The best FLOPs a second of a product, by dtype."""
    found: dict[str, float] = {}
    for case, item in measured.items():
        if isinstance(case, GemmCase):
            found[case.dtype] = max(found.get(case.dtype, 0.0), case.flops / item.seconds)
    return found


def elementwise(measured: Measured, device: Device, reference: str) -> Elementwise:
    """The rate of the largest additions, the time of the smallest, and what GELUs take beyond their bytes."""
    adds = {
        case.bytes_: item for case, item in measured.items() if isinstance(case, MemoryCase) and case.what == "add"
    }
    largest, smallest = max(adds), min(adds)
    rate = largest / adds[largest].seconds
    dear = [
        (item.seconds - case.bytes_ / rate) / case.gelus
        for case, item in measured.items()
        if isinstance(case, MemoryCase) and case.gelus and item.seconds > _MEMORY_BOUND * case.bytes_ / rate
    ]
    return Elementwise(
        source="measured",
        reference=reference,
        spread=median_spread(list(adds.values())),
        bandwidth_efficiency=_digits(rate / device.memory_bandwidth),
        floor_us=_digits(adds[smallest].seconds * 1e6),
        gelu_ns=_digits(max(dear, default=0.0) * 1e9),
    )


def interference(measured: Measured, reference: str) -> Interference:
    """How much longer products and an all-reduce take side by side."""
    times = {case.what: item for case, item in measured.items() if isinstance(case, OverlapCase)}
    if len(times) < 4:
        alone = "a device alone, where nothing overlaps"
        return Interference(source="assumed", reference=alone, compute_factor=1.0, communication_factor=1.0)
    compute = times["compute_beside"].seconds / times["compute_alone"].seconds
    communication = times["communication_beside"].seconds / times["communication_alone"].seconds
    return Interference(
        source="measured",
        reference=reference,
        spread=median_spread(list(times.values())),
        compute_factor=_digits(min(100.0, max(1.0, compute))),
        communication_factor=_digits(min(100.0, max(1.0, communication))),
    )


def gemm(measured: Measured, formulas: Formulas, device: Device, dtype: Any, reference: str) -> Fitted | None:
    """The curve of one dtype's products; none where too few could be measured."""
    rows = {case: item for case, item in measured.items() if isinstance(case, GemmCase) and case.dtype == dtype}
    if len(rows) < FEWEST_ROWS:
        return None
    m, n, k = (np.array([getattr(case, dim) for case in rows], dtype=float) for dim in "mnk")
    seconds = np.array([item.seconds for item in rows.values()])
    numbers: dict[str, Any] = dict(fit_gemm(formulas.gemm, device, dtype, m, n, k, seconds))
    curve = GemmCurve(source="measured", reference=reference, spread=median_spread(list(rows.values())), **numbers)
    error = assess(formulas.gemm(device, curve, dtype, m, n, k), seconds).mean_absolute_error
    return Fitted(curve=curve, error=error)


def attention(
    measured: Measured, formulas: Formulas, device: Device, dtype: Any, memory_share: float, reference: str
) -> Fitted | None:
    """The curves of one dtype's fused attention; none where too little could be measured."""
    rows: dict[str, dict[AttentionCase, Measurement]] = {"prefill": {}, "backward": {}, "decode": {}}
    for case, item in measured.items():
        if isinstance(case, AttentionCase) and case.dtype == dtype:
            rows[case.phase][case] = item
    if min(map(len, rows.values())) < _FEWEST_ATTENTION:
        return None
    shared = Origin(source="assumed", reference="memory traffic at the rate of elementwise kernels")
    common: dict[str, Any] = {"source": "measured", "reference": reference, "efficiency": 0.5, "floor_us": 1.0}
    common["bandwidth_efficiency"] = memory_share
    forward = AttentionCurve(**common, other_sources={"bandwidth_efficiency": shared})
    backward = replace(
        forward,
        flops_factor=2.5,
        bytes_factor=2.0,
        other_sources={"bandwidth_efficiency": shared, "flops_factor": _DAO, "bytes_factor": _DAO},
    )
    start = {"efficiency": 0.5, "floor_us": _floor_us(rows["prefill"]), "head_dim_half": 20.0}
    backward_start = start | {"floor_us": _floor_us(rows["backward"])}
    decode_start = {
        "efficiency": 0.2,
        "bandwidth_efficiency": 0.6,
        "floor_us": _floor_us(rows["decode"]),
        "sequence_head_us": 0.5,
        "cached_share": 0.5,
        "cached_mib": 4.0,
    }
    fitted = {
        "prefill": _attention_curve(forward, start, formulas.prefill, device, dtype, rows["prefill"]),
        "backward": _attention_curve(backward, backward_start, formulas.backward, device, dtype, rows["backward"]),
        "decode": _attention_curve(
            DecodeCurve(**common), decode_start, formulas.decode, device, dtype, rows["decode"]
        ),
    }
    return Fitted(
        curve=Attention(**{phase: item.curve for phase, item in fitted.items()}),
        error=float(np.mean([item.error for item in fitted.values()])),
    )


def software(measured: Measured, reference: str, *, host_computes: bool) -> dict[Any, SoftwareStack]:
    """Host time per kernel and per collective of each stack that was measured.

    Where the host computes too, nothing runs while it issues.
    """
    launches = {case.what: item for case, item in measured.items() if isinstance(case, LaunchCase)}
    stacks: dict[Any, SoftwareStack] = {}
    for stack in ("eager", "compiled", "cuda_graph"):
        if stack not in launches:
            continue
        numbers: dict[str, Any] = {"kernel_us": _digits(launches[stack].seconds * 1e6)}
        if host_computes:
            numbers |= {"blocking": 1.0, "other_sources": {"blocking": _SAME_CORE}}
        used = [launches[stack]]
        if "collective" in launches and stack != "cuda_graph":
            numbers["collective_us"] = _digits(launches["collective"].seconds * 1e6)
            used.append(launches["collective"])
        stacks[stack] = SoftwareStack(
            source="measured", reference=reference, spread=median_spread(used), **numbers
        )
    return stacks


def _attention_curve(
    fixed: Any,
    start: Mapping[str, float],
    formula: Callable[..., Any],
    device: Device,
    dtype: Any,
    rows: Mapping[AttentionCase, Measurement],
) -> Fitted:
    sizes = {name: np.array([getattr(case, name) for case in rows], dtype=float) for name in _SIZES}
    sizes["value_dim"] = sizes["head_dim"]
    seconds = np.array([item.seconds for item in rows.values()])

    def predict(curve: Any) -> Any:
        return formula(device, curve, dtype, **sizes)

    curve = fit_curve(replace(fixed, spread=median_spread(list(rows.values()))), start, predict, seconds)
    if curve.floor_us < _LEAST_FLOOR_US:
        curve = replace(curve, floor_us=0.0)
    curve = replace(curve, efficiency=min(curve.efficiency, _MOST_EFFICIENT))
    return Fitted(curve=curve, error=assess(predict(curve), seconds).mean_absolute_error)


def _floor_us(rows: Mapping[AttentionCase, Measurement]) -> float:
    return min(item.seconds for item in rows.values()) * 1e6 / 2


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
