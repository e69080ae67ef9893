"""A hardware profile from the records of a measurement: every number with where it comes from."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import PlannerError
from planner.measure import fitting, levels
from planner.measure.cases import LARGE_BYTES, Case, MemoryCase, cases_for, key_of
from planner.measure.fitting import Formulas
from planner.measure.records import Measurement, RecordFolder
from planner.measure.request import MeasurementError
from planner.measure.topology import Layout, LevelShape, NodeShape
from planner.spec.hardware import Device, HardwareProfile, Level, MemoryOverhead
from planner.spec.provenance import Origin
from planner.units import GB

_RESERVED_SHARE = 0.09
_ALONE = (
    "One device was measured: the link to a second one is assumed, and more are refused. Measure with several, or "
    "write the levels of your cluster under topology."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What was measured, on what."""

    layout: Layout
    device: Any
    dtypes: tuple[str, ...]
    quick: bool
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, folder: RecordFolder) -> Setting:
        """The setting that a folder of records belongs to."""
        data = folder.setting()
        node = data["layout"]["node"]
        shape = NodeShape(**(node | {"levels": tuple(LevelShape(**level) for level in node["levels"])}))
        request = data["request"]
        return cls(
            layout=Layout(**(data["layout"] | {"node": shape})),
            device=request["device"],
            dtypes=tuple(request["dtypes"]),
            quick=request["quick"],
            facts=data["facts"],
        )

    @property
    def device_name(self) -> str:
        """The GPU, or the CPU."""
        return str(self.facts.get("gpu") or self.facts["cpu"])

    def cases(self) -> list[Case]:
        """Everything that may have been measured."""
        return cases_for(self.layout, self.device, self.dtypes, quick=self.quick)


def measured_cases(folder: RecordFolder, setting: Setting) -> dict[Case, Measurement]:
    """The cases that have been measured, in order."""
    found = folder.measurements()
    return {case: found[key_of(case)] for case in setting.cases() if key_of(case) in found}


def build(
    setting: Setting,
    measured: Mapping[Case, Measurement],
    memory: Mapping[str, float],
    formulas: Formulas,
    *,
    name: str,
    peaks: HardwareProfile | None,
    refusals: Mapping[str, str],
) -> HardwareProfile:
    """The profile; peaks and memory bandwidth are the best rates seen, or those of the profile `peaks`."""
    today = datetime.date.today().isoformat()
    facts = setting.facts
    reference = f"tp-plan profile, {today}, torch {facts['torch']}, {setting.device_name}"
    device = _device(setting, measured, peaks, reference)
    elementwise = fitting.elementwise(measured, device, reference)
    errors: dict[str, float] = {}
    gemm, attention = {}, {}
    for dtype in setting.dtypes:
        products = fitting.gemm(measured, formulas, device, dtype, reference)
        if products is not None:
            gemm[dtype], errors[f"gemm {dtype}"] = products.curve, products.error
        fused = fitting.attention(measured, formulas, device, dtype, elementwise.bandwidth_efficiency, reference)
        if fused is not None:
            attention[dtype], errors[f"attention {dtype}"] = fused.curve, fused.error
    if not gemm:
        reasons = "; ".join(dict.fromkeys(refusals.values()))
        raise MeasurementError(
            "no matrix products could be measured", value=reasons or None, remedy="ask for another --dtype"
        )
    topology, link_error = levels.topology(setting.layout, measured, _alone(measured, device), reference)
    if link_error is not None:
        errors["collectives"] = link_error
    data: dict[str, Any] = {"gemm": gemm, "attention": attention, "topology": topology}
    profile = HardwareProfile(
        name=name,
        device=device,
        memory=_memory(setting, memory, reference),
        elementwise=elementwise,
        interference=fitting.interference(measured, reference),
        software=fitting.software(measured, reference, host_computes=setting.device == "cpu"),
        environment=_environment(setting, today),
        notes=_notes(setting, errors, refusals),
        **data,
    )
    return HardwareProfile.from_dict(profile.to_dict())  # what is written passes the rules of what is read


def _device(
    setting: Setting, measured: Mapping[Case, Measurement], peaks: HardwareProfile | None, reference: str
) -> Device:
    facts = setting.facts
    rates = fitting.rates(measured, LARGE_BYTES[setting.device])
    best = {dtype: _digits(rate / 1e12) for dtype, rate in fitting.peaks(measured).items()}
    own: dict[Any, Any] = dict(best)
    others = {"peak_tflops": Origin(source="measured", reference=f"best product: {reference}")}
    bandwidth = _digits(max(rates.values()) / GB)
    if peaks is not None:
        for dtype in best:
            if dtype in peaks.device.peak_tflops:
                own[dtype] = dict(peaks.device.peak_tflops)[dtype]
                others[f"peak_tflops.{dtype}"] = peaks.device.origin(f"peak_tflops.{dtype}")
        bandwidth = peaks.device.memory_bandwidth_gb_per_second
        others["memory_bandwidth_gb_per_second"] = peaks.device.origin("memory_bandwidth_gb_per_second")
    return Device(
        source="measured",
        reference=reference,
        name=setting.device_name,
        gpus_per_node=setting.layout.per_node,
        memory_gib=facts["memory_gib"],
        memory_bandwidth_gb_per_second=bandwidth,
        peak_tflops=own,
        processors=facts.get("processors", 0),
        other_sources=others,
    )


def _memory(setting: Setting, memory: Mapping[str, float], reference: str) -> MemoryOverhead:
    overhead = MemoryOverhead(
        source="measured",
        reference=reference,
        context_gib=_digits(memory["context_gib"]),
        communicator_gib=_digits(memory["communicator_gib"]),
    )
    if setting.device != "cuda":
        return overhead
    kept = "torch's caching allocator reserves 8 to 10 % above what training allocates"
    origin = Origin(source="assumed", reference=kept)
    return replace(overhead, reserved_share=_RESERVED_SHARE, other_sources={"reserved_share": origin})


def _alone(measured: Mapping[Case, Measurement], device: Device) -> Level:
    """What a device measured alone says about a peer: it would be reached through the host's memory.

    A profile names how GPUs reach one another, so that one device cannot leave it out; two are as many as an
    assumption should speak for. More are refused, and an estimate for two shows that its link is assumed.
    """
    slowest = 0.0
    for case, item in measured.items():
        if isinstance(case, MemoryCase) and case.what in ("to_device", "from_device"):
            rate = case.bytes_ / item.seconds / GB
            slowest = min(slowest or rate, rate)
    told = "copies between host and device" if slowest else "half the memory bandwidth"
    return Level(
        source="assumed",
        reference=f"no peer was measured; a message through the host's memory, from {told}",
        link="host memory, not measured",
        gpus=2,
        bandwidth_gb_per_second=_digits(slowest or device.memory_bandwidth_gb_per_second / 2),
        latency_us=10.0,
    )


def _environment(setting: Setting, today: str) -> dict[str, str]:
    facts, layout = setting.facts, setting.layout
    words = {"date": today, "cpu": f"{facts['cpu']}, {facts['cores']} cores, sockets: {facts['sockets']}"}
    for key in ("gpu", "torch", "cuda", "nccl", "driver"):
        if key in facts:
            words[key] = str(facts[key])
    words["ranks"] = f"{layout.world}, nodes: {layout.nodes}, {facts['threads']} threads each"
    words["backend"] = "nccl" if setting.device == "cuda" else "gloo"
    words["effort"] = "quick" if setting.quick else "thorough"
    return words


def _notes(setting: Setting, errors: Mapping[str, float], refusals: Mapping[str, str]) -> str:
    said = ", ".join(f"{name} {error:.1f} %" for name, error in errors.items())
    notes = [f"Mean absolute error of the fits over their own timings: {said}."]
    if setting.layout.world == 1:
        notes.append(_ALONE)
    if setting.layout.node.note:
        notes.append(f"{setting.layout.node.note}.")
    for reason in dict.fromkeys(refusals.values()):
        keys = [key for key, why in refusals.items() if why == reason]
        notes.append(f"Not measured: {keys[0]}{' and alike' if len(keys) > 1 else ''} ({reason}).")
    return " ".join(notes)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def require_name(name: str) -> str:
    """A profile's name is a word."""
    if not name or any(character.isspace() for character in name):
        raise PlannerError(
            "a profile's name is one word", value=name, remedy="give --name or another file name", key="name"
        )
    return name
