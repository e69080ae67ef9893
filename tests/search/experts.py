"""Layouts that experts published for models and clusters, and our plan beside each of them.

A run is as its source tells it. What no source tells is as NVIDIA's recipes set it: sequence parallel beside
tensor parallel, gradients in fp32, one sequence in a microbatch. Overlap and the precision of gradients are the
expert's in our plan too: a plan takes them as given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import planner
from planner.cost.estimates import arranged_estimate, training_estimate
from planner.search.optimize import Found, Search
from planner.search.space import space_of
from planner.spec.estimate import Estimate
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.legality import require_legal
from planner.spec.model import ModelSpec
from planner.spec.overrides import with_changes
from planner.spec.strategy import Strategy
from planner.spec.wishes import Wishes
from planner.spec.workload import TrainWorkload, workload_from_dict
from planner.units import GIB
from tests.cost.published import PUBLISHED

_LLAMA = "Grattafiori et al. 2024 (arXiv 2407.21783), table 4 and section 3.3.2"
_DEEPSEEK = "DeepSeek-AI 2024 (arXiv 2412.19437), sections 3.2 and 4.2; GPU hours in table 1"
_TITAN = "pytorch/torchtitan, docs/performance.md and benchmarks/llama3_h100_202412_torchtitan.md"
_BRIDGE = "NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md, DGX H100"
_MARGIN = 1.01  # of memory above what an expert's layout needs, where it needs more than the GPU has

HELD = ("overlap", "grad_dtype")  # keys of a strategy that no search decides
DEGREES = ("tp", "pp", "cp", "dp", "ep", "etp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """A published layout."""

    name: str
    citation: str
    model: str | Mapping[str, Any]
    hardware: str
    gpus: int
    workload: Mapping[str, Any]
    strategy: Mapping[str, Any]
    seconds: float = 0.0  # of a step, measured; 0 where none is told
    remark: str = ""  # what of the run is told otherwise than here

    @property
    def layout(self) -> Strategy:
        """The strategy in full."""
        return Strategy.from_dict(dict(self.strategy), gpus=self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a search is about."""

    graph: Graph
    spec: ModelSpec
    profile: HardwareProfile
    workload: TrainWorkload
    gpus: int

    def with_memory(self, bytes_: float) -> Case:
        """The same on GPUs of another memory."""
        return replace(self, profile=with_changes(self.profile, {"device.memory_gib": bytes_ / GIB}))

    def searched(self, wishes: Mapping[str, Any] | None = None) -> Found:
        """The best plans under these wishes."""
        wanted = Wishes.from_dict(dict(wishes or {}))
        space = space_of(self.spec, self.workload, self.gpus, wanted)
        return Search(self.graph, self.profile, self.workload, space, wanted).run()

    def estimated(self, found: Found) -> Estimate:
        """The estimate of the best."""
        return arranged_estimate(self.graph, self.profile, self.workload, found.best[0].arrangement)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """An expert's layout and our plan, both by our cost model."""

    expert: Expert
    theirs: Estimate
    ours: Estimate | None  # none where nothing fits
    found: Found
    degrees: bool  # whether ours was held to their degrees
    roomy: Estimate | None = None  # our plan where the GPU has the memory that theirs needs; none where it has

    @property
    def comparable(self) -> Estimate | None:
        """Our plan on GPUs that hold theirs."""
        return self.roomy or self.ours

    @property
    def ratio(self) -> float:
        """Our step over theirs, on GPUs that hold both."""
        assert self.comparable is not None, "on GPUs that hold the expert's layout something fits"
        return self.comparable.step_seconds / self.theirs.step_seconds


def case(model: Any, hardware: Any, gpus: int, **workload: Any) -> Case:
    """A search's givens from what `planner.estimate` takes."""
    spec = planner.load_model(model)
    return Case(
        graph=planner.trace(spec),
        spec=spec,
        profile=planner.load_hardware(hardware),
        workload=training(workload, spec),
        gpus=gpus,
    )


def case_of(expert: Expert) -> Case:
    """What an expert's run is about."""
    return case(expert.model, expert.hardware, expert.gpus, **expert.workload)


def beside(expert: Expert, *, degrees: bool = False) -> Beside:
    """Our plan beside the expert's layout; with `degrees`, ours has the same degrees and decides the rest."""
    given = case_of(expert)
    layout = expert.layout
    require_legal(given.spec, given.workload, layout, expert.gpus)
    theirs = training_estimate(given.graph, given.profile, given.workload, layout)
    keys = (*HELD, *(DEGREES if degrees else ()))
    wishes = {"fix": {key: value for key, value in layout.to_dict().items() if key in keys}}
    if degrees:
        wishes["fix"] |= {key: getattr(layout, key) for key in DEGREES}
    found = given.searched(wishes)
    ours = given.estimated(found) if found.best else None
    roomy = None
    if not theirs.fits:
        wider = given.with_memory(_MARGIN * theirs.uncertainty.memory_bytes.high)
        roomy = wider.estimated(wider.searched(wishes))
    return Beside(expert=expert, theirs=theirs, ours=ours, found=found, degrees=degrees, roomy=roomy)


def training(data: Mapping[str, Any], spec: ModelSpec) -> TrainWorkload:
    """A workload of training."""
    found = workload_from_dict(data, model=spec)
    assert isinstance(found, TrainWorkload)
    return found


def _run(seq_len: int, batch: int, precision: str, stack: str = "megatron") -> dict[str, Any]:
    return {"seq_len": seq_len, "global_batch": batch, "precision": precision, "stack": stack}


def _llama(name: str, gpus: int, seq_len: int, batch: int, cp: int) -> Expert:
    return Expert(
        name=name, citation=_LLAMA, model="llama3.1-405b", hardware="dgx-h100", gpus=gpus,
        workload=_run(seq_len, batch, "bf16"),
        strategy={"tp": 8, "cp": cp, "pp": 16, "vpp": 8, "sp": True, "zero": 2, "overlap": {"pp": True}},
        remark="virtual stages are not told: a layer each, embedding and head counted as one each",
    )  # fmt: skip


def _bridge(
    name: str, model: str, gpus: int, workload: dict[str, Any], seconds: float, overlap: tuple[str, ...],
    **strategy: Any,
) -> Expert:  # fmt: skip
    """A recipe of NVIDIA's on DGX H100."""
    return Expert(
        name=name, citation=_BRIDGE, model=model, hardware="dgx-h100", gpus=gpus, workload=workload,
        strategy={"zero": 1, "sp": strategy.get("tp", 1) > 1, "overlap": dict.fromkeys(overlap, True)} | strategy,
        seconds=seconds,
    )  # fmt: skip


def _titan(
    name: str, model: str, hardware: str, gpus: int, workload: dict[str, Any], seconds: float, **strategy: Any
) -> Expert:
    """FSDP2, alone or beside tensor parallel."""
    return Expert(
        name=name, citation=_TITAN, model=model, hardware=hardware, gpus=gpus, workload=workload,
        strategy={"zero": 3} | strategy, seconds=seconds,
        remark="GPUs of 96 GB, 2.4 TB/s and 500 W" if hardware == "dgx-h100" else "",
    )  # fmt: skip


EXPERTS: tuple[Expert, ...] = (
    *(
        Expert(
            name=run.name, citation=run.citation, model=run.model, hardware=run.hardware, gpus=run.gpus,
            workload=run.workload, strategy=run.strategy, seconds=run.step_seconds,
        )
        for run in PUBLISHED
    ),
    _llama("Llama 3 405B on 8192", 8192, 8192, 2048, cp=1),
    _llama("Llama 3 405B on 16384", 16_384, 8192, 2048, cp=1),
    _llama("Llama 3 405B, long context", 16_384, 131_072, 128, cp=16),
    Expert(
        name="DeepSeek-V3", citation=_DEEPSEEK, model="deepseek-v3", hardware="dgx-h100", gpus=2048,
        workload=_run(4096, 15_360, "fp8_block"),
        strategy={"pp": 16, "ep": 64, "zero": 1, "recompute": "selective", "overlap": {"ep": True, "pp": True}},
        seconds=2.664e6 * 3600 / 2048 / (14.8e12 / (4096 * 15_360)),
        remark="H800, whose NVLink is slower; DualPipe stands as 1F1B; the seconds are those of the mean step",
    ),
    _titan("torchtitan Llama 3 8B", "llama3.1-8b", "dgx-h100", 8, _run(8192, 16, "bf16", "eager"), 2.84,
           microbatch=2, recompute="selective"),
    _titan("torchtitan Llama 3 8B, two axes", "llama3.1-8b", "dgx-h100", 64, _run(8192, 96, "bf16", "compiled"),
           2.81, tp=8, sp=True, microbatch=12, recompute="selective"),
    _titan("torchtitan Llama 3 70B on A100", "llama3.1-70b", "dgx-a100-80g", 64, _run(8192, 64, "bf16", "eager"),
           24.75, recompute="full"),
    _titan("torchtitan Llama 3 70B", "llama3.1-70b", "dgx-h100", 256, _run(8192, 512, "bf16", "compiled"), 27.43,
           tp=8, sp=True, microbatch=16, recompute="full"),
    _bridge("Bridge Llama 3 8B", "llama3.1-8b", 8, _run(8192, 128, "fp8"), 9.07, (), zero=3),
    _bridge("Bridge Llama 3 70B", "llama3.1-70b", 64, _run(8192, 128, "fp8"), 10.23, ("tp", "pp"),
            tp=4, pp=8, vpp=5),
    _bridge("Bridge Llama 2 70B", "llama2-70b", 64, _run(4096, 128, "fp8"), 4.80, ("tp", "pp"),
            tp=4, pp=4, vpp=20),
    _bridge("Bridge GPT-3 175B", "gpt3-175b", 128, _run(2048, 256, "fp8"), 5.64, ("pp",), tp=4, pp=8, vpp=6),
    _bridge("Bridge Nemotron-4 340B", "nemotron4-340b", 128, _run(4096, 32, "fp8"), 3.18, ("tp", "pp"),
            tp=8, pp=8, vpp=12, recompute="selective"),
    _bridge("Bridge Llama 3.1 405B", "llama3.1-405b", 1024, _run(8192, 512, "fp8"), 14.03, ("tp", "pp"),
            tp=8, cp=2, pp=8, vpp=8),
    _bridge("Bridge Qwen3 30B-A3B", "qwen3-30b-a3b", 16, _run(4096, 1024, "fp8"), 29.70, ("ep",), ep=16),
    _bridge("Bridge GPT-OSS 120B", "gpt-oss-120b", 64, _run(4096, 1280, "bf16"), 14.10, (), pp=4, ep=8),
    _bridge("Bridge Qwen3 235B-A22B", "qwen3-235b-a22b", 256, _run(4096, 2048, "fp8"), 20.81, ("tp", "pp"),
            tp=2, pp=8, vpp=4, ep=32),
    _bridge("Bridge DeepSeek-V3", "deepseek-v3", 1024, _run(4096, 8192, "fp8"), 25.26, ("tp", "pp"),
            tp=2, pp=8, vpp=4, ep=64),
)  # fmt: skip
