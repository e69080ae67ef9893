"""The constants of a training step that no kernel benchmark tells, and what one believes of them without a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from planner.cost.kernels import LOW_PRECISIONS
from tests.bench.training_rows import Row, Values
from tests.measured_rows import profile

# profiles of the same GPU; the shipped value is that of the first
GPUS = {
    "A100": ("dgx-a100-80g", "dgx-a100-40g", "aws-p4d"),
    "H100": ("dgx-h100", "dgx-h200", "aws-p5"),
    "B200": ("dgx-b200",),
    "GB200": ("gb200-nvl72",),
    "GB300": ("gb300-nvl72", "dgx-b300"),
}
BLACKWELL = ("B200", "GB200", "GB300")
GRACE = ("gb200-nvl72", "gb300-nvl72")
MOST_BANDWIDTH = 0.92  # of the datasheet's: no elementwise kernel was seen to reach more


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number between bounds, and the belief that a fit starts from."""

    name: str
    prior: float
    spread: float  # one standard deviation of that belief
    least: float
    most: float
    because: str  # why one believes it


def _sustained(gpu: str) -> Constant:
    return Constant(name=f"sustained share, {gpu}", prior=0.9, spread=0.1, least=0.5, most=1.05,
                    because="kernels back to back run a little slower than one repeated by itself")  # fmt: skip


CONSTANTS = (
    *map(_sustained, GPUS),
    Constant(name="500 W over 700 W, H100", prior=0.89, spread=0.08, least=0.5, most=1.0,
             because="the clock goes as the cube root of the power"),
    Constant(name="low precision share, Hopper", prior=1.0, spread=0.2, least=0.7, most=1.7,
             because="training's kernels are those of the benchmarks"),
    Constant(name="low precision share, Blackwell", prior=1.0, spread=0.2, least=0.7, most=1.7,
             because="training's kernels are those of the benchmarks"),
    Constant(name="layer_us, Megatron", prior=500.0, spread=250.0, least=0.0, most=2000.0,
             because="50 launches of 10 µs in a pass of a layer"),
    Constant(name="expert_layer_us, Megatron", prior=1500.0, spread=1000.0, least=0.0, most=8000.0,
             because="150 launches more: routing, sorting, padding, exchange"),
    Constant(name="collective_us, Megatron", prior=10.0, spread=5.0, least=0.0, most=100.0, because="a launch"),
    Constant(name="Grace's host times over x86's", prior=1.0, spread=0.5, least=0.1, most=2.0,
             because="one core issues launches as fast as another"),
    Constant(name="blocking launches", prior=3.0, spread=1.5, least=0.2, most=10.0,
             because="a launch, its kernel's start and the way back"),
    Constant(name="hidden_tp", prior=0.5, spread=0.2, least=0.0, most=0.95, because="half of it"),
    Constant(name="hidden_ep", prior=0.5, spread=0.2, least=0.0, most=0.95, because="half of it"),
    Constant(name="attention share, torch", prior=0.6, spread=0.1, least=0.3, most=1.0,
             because="FlashAttention 2 beside 3 on Hopper, as their papers time them"),
    Constant(name="attention backward over forward", prior=0.85, spread=0.15, least=0.4, most=1.1,
             because="the rates of the papers on FlashAttention"),
    Constant(name="elementwise over matrix-vector products", prior=1.0, spread=0.15, least=0.6, most=1.4,
             because="memory bounds both"),
)  # fmt: skip
NAMES = tuple(constant.name for constant in CONSTANTS)


def shipped_values() -> dict[str, float]:
    """The constants that the profiles hold; those of a run's software stand in its reader, see `read_off`."""
    hopper, blackwell = profile("dgx-h100"), profile("dgx-b200")
    megatron = hopper.software_for("megatron")
    curves = hopper.attention_for("bf16")
    values = {f"sustained share, {gpu}": profile(names[0]).device.sustained_share for gpu, names in GPUS.items()}
    return values | {
        "low precision share, Hopper": megatron.low_precision_share,
        "low precision share, Blackwell": blackwell.software_for("megatron").low_precision_share,
        "layer_us, Megatron": megatron.layer_us,
        "expert_layer_us, Megatron": megatron.expert_layer_us,
        "collective_us, Megatron": megatron.collective_us,
        "Grace's host times over x86's": profile("gb200-nvl72").software_for("megatron").layer_us
        / megatron.layer_us,
        "hidden_tp": hopper.interference.hidden_tp,
        "hidden_ep": hopper.interference.hidden_ep,
        "attention share, torch": hopper.software_for("eager").attention_share,
        "attention backward over forward": curves.backward.efficiency / curves.prefill.efficiency,
        "elementwise over matrix-vector products": hopper.elementwise.bandwidth_efficiency
        / _matrix_vector_share("dgx-h100"),
    }


def read_off(rows: list[Row]) -> dict[str, float]:
    """The shipped constants, and those that the reader of runs sets for some of them."""
    values = shipped_values()
    for row in rows:
        if "device.sustained_share" in row.changes:
            values["500 W over 700 W, H100"] = float(str(row.changes["device.sustained_share"]).rstrip("x"))
        if "software.megatron.blocking" in row.changes:
            values["blocking launches"] = float(row.changes["software.megatron.blocking"])
    return values


def settings(row: Row, values: Values) -> dict[str, Any]:
    """The keys of a row's profile that constants set, and only those that its run depends on."""
    gpu = next(gpu for gpu, names in GPUS.items() if row.base in names)
    found: dict[str, Any] = {
        "device.sustained_share": values[f"sustained share, {gpu}"],
        "elementwise.bandwidth_efficiency": min(
            MOST_BANDWIDTH, _matrix_vector_share(row.base) * values["elementwise over matrix-vector products"]
        ),
    }
    if "device.sustained_share" in row.changes:
        found["device.sustained_share"] *= values["500 W over 700 W, H100"]
    if row.run.model.get("attention") != "unfused":
        for dtype, curves in profile(row.base).attention.items():
            share = values["attention backward over forward"]
            found[f"attention.{dtype}.backward.efficiency"] = curves.prefill.efficiency * share
    if row.strategy.overlap.tp:
        found["interference.hidden_tp"] = values["hidden_tp"]
    if row.strategy.overlap.ep:
        found["interference.hidden_ep"] = values["hidden_ep"]
    return found | {f"software.{row.workload.stack}.{key}": value for key, value in _software(row, gpu, values)}


def _software(row: Row, gpu: str, values: Values) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    if row.workload.precision in LOW_PRECISIONS and gpu != "A100":
        chip = "Blackwell" if gpu in BLACKWELL else "Hopper"
        found.append(("low_precision_share", values[f"low precision share, {chip}"]))
    if row.workload.stack != "megatron":
        return [*found, ("attention_share", values["attention share, torch"])] if gpu != "A100" else found
    host = values["Grace's host times over x86's"] if row.base in GRACE else 1.0
    found.append(("layer_us", host * values["layer_us, Megatron"]))
    found.append(("collective_us", host * values["collective_us, Megatron"]))
    found.append(("kernel_us", host * profile("dgx-h100").software_for("megatron").kernel_us))
    if row.run.model.get("moe"):
        found.append(("expert_layer_us", host * values["expert_layer_us, Megatron"]))
    if "software.megatron.blocking" in row.changes:
        found.append(("blocking", values["blocking launches"]))
    return found


def _matrix_vector_share(name: str) -> float:
    """The share of memory bandwidth of matrix-vector products, which elementwise kernels were derived from."""
    section = profile(name).elementwise
    reference = section.origin("bandwidth_efficiency").reference
    found = re.search(r"of that of matrix-vector products, ([\d.]+)", reference)
    assert found, f"{name}: elementwise.bandwidth_efficiency rests on something else: {reference}"
    return float(found[1])
