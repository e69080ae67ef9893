"""A plan: what the executor applies, what a person reads and edits, and the proof that it is the best.

Modules and blocks are named by path patterns (`layers.0-79.attention.query`, see paths.py); a line for one
path overrides those for many. Layers are numbered in the order in which they run. The same input gives the
same bytes: no time of day, no seconds spent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from planner.errors import PlannerError
from planner.spec.codec import Bytes, Count, Degree, Range, Seconds, decode, encode
from planner.spec.estimate import Estimate
from planner.spec.files import read_yaml, write_text
from planner.spec.hardware import HardwareProfile
from planner.spec.model import ModelSpec
from planner.spec.paths import Span, is_pattern, lookup
from planner.spec.strategy import Recompute, Strategy
from planner.spec.workload import Workload
from planner.spec.yaml_text import Source, dump_yaml

PLAN_VERSION: Literal[1] = 1

# `heads` is for modules without weights of their own that compute head by head; the others cut weights.
Split = Literal["column", "row", "vocab", "expert", "sequence", "heads", "replicate"]
# of an activation over tp: whole on each rank, cut along the sequence or the last dim, or yet to be summed
Layout = Literal["replicate", "sequence", "features", "partial"]
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "p2p"]
CollectiveAxis = Literal["tp", "cp", "dp", "dp_replicate", "ep", "etp", "pp", "attention_dp", "world"]
Phase = Literal["forward", "recompute", "backward", "loss", "gradient_sync", "clip", "p2p"]

Objective = Annotated[float, Range(0.0, 1e21)]  # seconds, GPUs or money

_SHARED = ("model", "hardware", "gpus", "workload", "strategy")  # keys that plan and estimate have in common


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """SHA-256 of what the plan was made from, and of its layout as it was made."""

    model: str
    hardware: str
    layout: str

    def __post_init__(self) -> None:
        for key in ("model", "hardware", "layout"):
            text = getattr(self, key)
            if len(text) != 64 or set(text) - set("0123456789abcdef"):
                raise PlannerError(
                    "a digest is 64 hexadecimal digits", value=text, remedy="make the plan again", key=key
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A pipeline rank. The embedding stands before the first layer of all, the head after the last."""

    layers: tuple[Span, ...]  # of each of its virtual stages
    forward_seconds: Seconds = 0.0  # of one microbatch, all its virtual stages
    backward_seconds: Seconds = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSplit:
    """How tensor parallelism cuts a module, and the layout of what goes in and comes out."""

    split: Split
    input: Layout = "replicate"
    output: Layout = "replicate"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedCollective:
    """What one rank of some stages issues in one steady optimizer step. `bytes` is the sum over all calls."""

    stages: Span
    axis: CollectiveAxis
    phase: Phase
    kind: CollectiveKind
    count: Count
    bytes: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Why no other candidate is better: every one was solved, bounded away, or illegal."""

    solver: str
    minimize: Literal["step_seconds", "gpus", "cost_per_token", "ttft_seconds", "tpot_seconds"] = "step_seconds"
    objective: Objective
    bound: Objective  # least value that any candidate can reach
    candidates: Count
    illegal: dict[str, Count] = field(default_factory=dict)  # by rule
    pruned: Count
    solved: Count

    DERIVED: ClassVar[tuple[str, ...]] = ("gap",)

    def __post_init__(self) -> None:
        if self.bound > self.objective * (1 + 1e-9):
            raise PlannerError(
                f"the bound is at most the objective, {self.objective}",
                value=self.bound,
                remedy="make the plan again",
                key="bound",
            )
        if self.pruned + self.solved + sum(self.illegal.values()) > self.candidates:
            raise PlannerError(
                "illegal, pruned and solved are among the candidates",
                value=self.candidates,
                remedy="make the plan again",
                key="candidates",
            )

    @property
    def gap(self) -> float:
        """Share of the objective that a better candidate could save at most; 0 proves the best."""
        return max(0.0, 1 - self.bound / self.objective) if self.objective else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A layout that lost, and why."""

    strategy: Strategy
    objective: Objective  # in the certificate's unit
    memory_bytes: Bytes
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to run a model on a cluster. Build the file with `save`, read it with `load_plan`."""

    version: Literal[1] = PLAN_VERSION
    model: str  # a bundled name, a path, or file.py:callable
    hardware: str
    gpus: Degree
    workload: Workload
    strategy: Strategy
    digests: Digests
    command: str  # reproduces the plan
    estimate: Estimate
    stages: tuple[Stage, ...]
    modules: dict[str, ModuleSplit] = field(default_factory=dict)
    recompute: dict[str, Recompute] = field(default_factory=dict)  # of blocks; none where nothing is said of one
    collectives: tuple[ExpectedCollective, ...] = ()
    certificate: Certificate | None = None  # none: the layout was given, not searched for
    runners_up: tuple[RunnerUp, ...] = ()
    model_spec: ModelSpec | None = None  # where the model was given by its keys, not by a name
    hardware_profile: HardwareProfile | None = None

    DERIVED: ClassVar[tuple[str, ...]] = ("mesh",)

    @classmethod
    def from_dict(cls, data: Any, source: Source | None = None) -> Plan:
        """A plan from YAML data."""
        if not isinstance(data, Mapping):
            return decode(cls, data, source)
        _require_no_measurements(data, source or Source())
        _check_version(data, source or Source())
        _check_shared(data, source or Source())
        resized = _with_figures_for(data)
        plan = _decoded(resized, source)
        return plan if resized is data or plan.edited else _decoded(data, source)

    def to_dict(self) -> dict[str, Any]:
        """YAML data without neutral keys, in the order in which a person reads."""
        data: dict[str, Any] = {"version": self.version, **encode(self, omit_defaults=True)}
        data["estimate"] = {key: value for key, value in data["estimate"].items() if key not in _SHARED}
        first = {key: data.pop(key) for key in ("version", *_SHARED, "mesh")}
        return first | data

    def to_yaml(self) -> str:
        """The file's text."""
        return dump_yaml(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_text(Path(path), self.to_yaml())

    def __post_init__(self) -> None:
        for holds, key, value, rule, remedy in self._rules():
            if not holds:
                raise PlannerError(rule, value=value, remedy=remedy, key=key)
        self._check_patterns()
        self._check_layers()

    def _rules(self) -> tuple[tuple[bool, str, object, str, str], ...]:
        estimate, proof, degree = self.estimate, self.certificate, self.strategy
        differs = [key for key in _SHARED if getattr(self, key) != getattr(estimate, key)]
        proven = proof.objective if proof and proof.minimize == "step_seconds" else estimate.step_seconds
        last = max((item.stages.last for item in self.collectives), default=0)
        return (
            (self.gpus == degree.gpus, "gpus", self.gpus,
             f"the strategy's degrees take {degree.gpus} GPUs", "mend gpus or the degrees"),
            (len(self.stages) == degree.pp, "stages", len(self.stages),
             f"there are pp = {degree.pp} stages", "give one entry for each pipeline rank"),
            (not differs, f"estimate.{differs[0] if differs else ''}", "another",
             "the estimate is of this plan", "leave the key out of the estimate"),
            (math.isclose(proven, estimate.step_seconds, rel_tol=1e-6), "certificate.objective", proven,
             f"the certificate's objective is the step time, {estimate.step_seconds}", "estimate the plan again"),
            (last < degree.pp, "collectives", last,
             f"stages are numbered from 0 to {degree.pp - 1}", "mend stages"),
        )  # fmt: skip

    def _check_patterns(self) -> None:
        for key, table in (("modules", self.modules), ("recompute", self.recompute)):
            for pattern in table:
                if not is_pattern(pattern):
                    raise PlannerError(
                        "a key is a module path, perhaps with ranges that rise",
                        value=pattern,
                        remedy="write it like layers.0-79.mlp.up",
                        key=key,
                    )

    def _check_layers(self) -> None:
        following = 0
        for rank, position, span in self.virtual_stages():
            if len(span):
                if span.first != following:
                    raise PlannerError(
                        f"the next virtual stage starts with layer {following}",
                        value=span.to_plain(),
                        remedy="let the stages follow one another without gap or overlap",
                        key=f"stages.{rank}.layers.{position}",
                    )
                following = span.last + 1

    @property
    def layer_count(self) -> int:
        """Layers of all stages together."""
        return max(span.last for _, _, span in self.virtual_stages()) + 1

    def virtual_stages(self) -> tuple[tuple[int, int, Span], ...]:
        """Pipeline rank, position on that rank and layers of each virtual stage, in the order of the model."""
        vpp, ranks = self.strategy.vpp, range(self.strategy.pp)
        for rank in ranks:
            if len(self.stages[rank].layers) != vpp:
                raise PlannerError(
                    f"a stage has layers for each of its vpp = {vpp} virtual stages",
                    value=len(self.stages[rank].layers),
                    remedy="list a range for each",
                    key=f"stages.{rank}.layers",
                )
        turns = self.strategy.schedule == "zbv"  # the second virtual stages run back from the last rank
        order = [(rank, turn) for turn in range(vpp) for rank in (reversed(ranks) if turns and turn else ranks)]
        return tuple((rank, turn, self.stages[rank].layers[turn]) for rank, turn in order)

    @property
    def mesh(self) -> dict[str, int]:
        """Mesh dims, outermost first."""
        return self.strategy.mesh()

    @property
    def layout_digest(self) -> str:
        """Of what the executor applies."""
        spans = [list(stage.layers) for stage in self.stages]
        return content_digest([self.workload, self.strategy, spans, self.modules, self.recompute])

    @property
    def edited(self) -> bool:
        """Whether a person changed the layout since it was made: its figures need a new estimate."""
        return self.layout_digest != self.digests.layout

    def sealed(self) -> Plan:
        """The same plan with the digest of its layout as it is now."""
        return dataclasses.replace(self, digests=dataclasses.replace(self.digests, layout=self.layout_digest))

    def split_of(self, path: str) -> ModuleSplit | None:
        """How a module is cut, or None where the plan says nothing."""
        return lookup(self.modules, path)

    def recompute_of(self, path: str) -> Recompute:
        """What backward computes again of a block: where no line speaks of any block, what the strategy says."""
        word = self.strategy.recompute
        if not self.recompute and word != "auto":
            return word
        return lookup(self.recompute, path) or "none"

    def require_same(self, model_digest: str, hardware_digest: str) -> None:
        """Refuse a model or a profile that is not what the plan was made for."""
        for key, actual in (("model", model_digest), ("hardware", hardware_digest)):
            if actual != getattr(self.digests, key):
                raise PlannerError(
                    f"the plan was made for this {key} with other content",
                    value=f"{getattr(self, key)}: {actual[:12]}…, planned {getattr(self.digests, key)[:12]}…",
                    remedy=f"plan again, or restore the {key} that the plan was made for",
                    key=f"digests.{key}",
                )


def load_plan(path: str | Path) -> Plan:
    """A plan from its file."""
    return read_plan(path)[0]


def read_plan(path: str | Path) -> tuple[Plan, Source]:
    """A plan from its file, and where each key stands in it: for what is found wrong with it later."""
    data, source = read_yaml(Path(path))
    return Plan.from_dict(data, source), source


def _decoded(data: Mapping[str, Any], source: Source | None) -> Plan:
    inner = data.get("estimate")
    if isinstance(inner, Mapping):
        data = {**data, "estimate": {**{key: data[key] for key in _SHARED if key in data}, **inner}}
    try:
        return decode(Plan, data, source)
    except PlannerError as error:
        if source and error.key.startswith("stages."):  # a rule of the plan itself names places in lists
            path = tuple(int(part) if part.isdigit() else part for part in error.key.split("."))
            error.where = source.place(path)
        raise


def _with_figures_for(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a person gave another pp and its stages, memory of that many stages, and no collectives.

    The figures of an edited plan wait for a new estimate whatever they are.
    """
    strategy, stages, inner = data.get("strategy"), data.get("stages"), data.get("estimate")
    if not (isinstance(strategy, Mapping) and isinstance(stages, list) and isinstance(inner, Mapping)):
        return data
    memory = inner.get("memory_per_stage")
    if not isinstance(memory, list) or not memory:
        return data
    count = len(stages)
    if count in (0, len(memory)) or strategy.get("pp", 1) != count:
        return data
    kept = {key: value for key, value in inner.items() if key != "memory_bytes"}
    resized = (memory + memory[-1:] * count)[:count]
    return {**data, "estimate": {**kept, "memory_per_stage": resized}, "collectives": []}


def content_digest(content: Any) -> str:
    """SHA-256 of a specification's keys and values, whatever their order in the file."""
    text = json.dumps(encode(content, omit_defaults=True), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_no_measurements(data: Mapping[str, Any], source: Source) -> None:
    """Measurements stand beside a plan, have a version as well, and are easily given in its place."""
    if "each_seconds" in data and "estimate" not in data:
        raise PlannerError(
            "a plan is wanted here",
            value=f"measurements of a run, {source.name}",
            remedy="give the plan that ran; tp-plan compare takes the plan first, then its measured.json",
            key="file",
        )


def _check_shared(data: Mapping[str, Any], source: Source) -> None:
    """The estimate takes these keys from the plan, and would be told to lack them."""
    for key in _SHARED:
        if key not in data:
            raise PlannerError(
                f"a plan has the key {key}",
                value=", ".join(map(str, data)),
                remedy=f"add {key}, or make the plan again with tp-plan plan",
                key=key,
                where=source.name,
            )


def _check_version(data: Mapping[str, Any], source: Source) -> None:
    version = data.get("version")
    if type(version) is int and version == PLAN_VERSION:
        return
    newer = type(version) is int and version > PLAN_VERSION
    raise PlannerError(
        f"plans of version {PLAN_VERSION} are read",
        value="no version" if version is None else version,
        remedy="upgrade tp-plan" if newer else "make the plan again with tp-plan plan",
        key="version",
        where=source.place(("version",)),
    )
