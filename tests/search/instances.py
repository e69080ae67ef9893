"""Random small instances of planning: models of one to three kinds of layers, clusters, wishes."""

from __future__ import annotations

import dataclasses
import functools
import random
from dataclasses import dataclass
from typing import Any

from planner.cost.uncertainty import memory_headroom
from planner.search.optimize import Found, Search
from planner.search.space import Space, space_of
from planner.spec.graph import Block, Graph, Placement
from planner.spec.hardware import HardwareProfile
from planner.spec.model import ModelSpec
from planner.spec.strategy import Strategy
from planner.spec.wishes import Wishes
from planner.spec.workload import TrainWorkload
from tests.cost.training_cases import exact, hardware, tiny, user
from tests.search.exhaustive import Listing, between, calls, layers_of, listing, meant, strategies
from tests.tiny import tiny_spec

MOST_CALLS = 90
FEWEST_PLANS = 4
MOST_STRATEGIES = 200

_WIDER: dict[str, Any] = {"hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 2048, "vocab": 1000}
_USER_MODELS = ("hybrid", "pyramid", "odd_and_even", "mlp")
_BUNDLED = ("dgx-h100", "dgx-a100-40g", "a100-pcie", "rtx4090-pcie", "dgx-b200")
_WORDS = (("none",), ("full",), ("none", "full"), ("none", "selective"), ("none", "selective", "full"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One question to a planner."""

    graph: Graph
    model: ModelSpec | None
    profile: HardwareProfile
    workload: TrainWorkload
    gpus: int
    wishes: Wishes

    @property
    def space(self) -> Space:
        """The candidates that a search sees."""
        return space_of(self.model, self.workload, self.gpus, self.wishes, layers=layers_of(self.graph))

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """The candidates by plain enumeration."""
        layers, fixed = layers_of(self.graph), self.wishes.fix.given
        found = strategies(
            self.model, self.workload, self.gpus, fixed,
            layers=layers, schedules=self.wishes.allowed_schedules,
        )  # fmt: skip
        return tuple(strategy for strategy in found if meant(strategy, layers, fixed))

    @property
    def listing(self) -> Listing:
        """Every plan, whatever its memory."""
        words = self.wishes.allowed_recompute
        return listing(self.graph, self.profile, self.workload, self.strategies, words)

    @property
    def limit_bytes(self) -> float:
        """What the estimate of the fullest rank may take."""
        capacity = self.wishes.capacity_bytes(self.profile.device.memory_bytes)
        return capacity / memory_headroom(self.graph, self.profile, self.workload)

    def search(self, **changes: Any) -> Found:
        """What the planner finds, with other wishes where asked for."""
        wishes = dataclasses.replace(self.wishes, **changes)
        return Search(self.graph, self.profile, self.workload, self.space, wishes).run()

    def within(self, limit_bytes: float) -> Instance:
        """The same with as much memory for the estimate of a rank."""
        wanted = limit_bytes * memory_headroom(self.graph, self.profile, self.workload)
        device = dataclasses.replace(self.profile.device, memory_gib=max(wanted * 2 / 2**30, 1e-6))
        return dataclasses.replace(
            self,
            profile=dataclasses.replace(self.profile, device=device),
            wishes=dataclasses.replace(self.wishes, max_memory_bytes=wanted),
        )


@functools.lru_cache(maxsize=8)
def instance(seed: int, *, uneven: bool = False) -> Instance:
    """The instance of a seed, small enough to be enumerated, with room for everything.

    With `uneven` its pipelines have one stage a rank, and more layers than stages.
    """
    draw = random.Random(seed)
    while True:
        graph, model = _model(draw)
        found = Instance(
            graph=graph,
            model=model,
            profile=_profile(draw),
            workload=_workload(draw),
            gpus=draw.choice((2, 3, 4, 4, 6, 8, 8)),
            wishes=Wishes(),
        )
        found = dataclasses.replace(found, wishes=_uneven(draw) if uneven else _wishes(draw, found))
        if uneven and (layers_of(graph) < 4 or found.gpus % (found.wishes.fix.pp or 1)):
            continue
        if 12 % found.gpus and found.gpus != 8:
            continue
        if found.model is None and not layers_of(found.graph) and (found.wishes.fix.pp or 1) > 1:
            continue  # refused: no stages without layers
        if not FEWEST_PLANS <= len(found.space) <= MOST_STRATEGIES:
            continue
        every = found.strategies
        if 0 < calls(graph, every, found.wishes.allowed_recompute, MOST_CALLS + 1) <= MOST_CALLS:
            return found


def limits(draw: random.Random, found: Listing) -> tuple[float, ...]:
    """Memory with which few plans fit, and with which many, all or none do."""
    tight = between(found.device_bytes, draw.uniform(0.005, 0.15))
    return tight, between(found.device_bytes, draw.choice((0.0, 0.3, 0.6, 1.0)))


def _model(draw: random.Random) -> tuple[Graph, ModelSpec | None]:
    kind = draw.choice(("gpt", "llama", "llama", "mixtral", "deepseek", "gemma2", "mixed", "mixed", "t5", "user"))
    layers, wider = draw.randint(2, 6), draw.random() < 0.5
    if kind == "user":
        return user(draw.choice(_USER_MODELS)), None
    if kind == "mixed":
        return mixed(tuple(draw.choices(("plain", "wide", "experts"), k=layers)), wider)
    if kind == "t5":
        return tiny(kind), tiny_spec(kind)
    changes = _WIDER if wider and kind in ("llama", "mixtral") else {}
    layers = max(layers, 3) if kind == "deepseek" else layers
    return tiny(kind, layers, **changes), tiny_spec(kind, **{**changes, "layers": layers})


@functools.cache
def mixed(layers: tuple[str, ...], wider: bool) -> tuple[Graph, ModelSpec]:
    """A model whose layers are of several kinds in any order."""
    changes = _WIDER if wider else {}
    graphs = {
        "plain": tiny("llama", **changes),
        "wide": tiny("llama", **{**changes, "ffn": 4 * int(changes.get("ffn", 128))}),
        "experts": tiny("mixtral", **changes),
    }
    plain = graphs["plain"]
    held: dict[str, Block] = {kind: graphs[kind].blocks["blocks.0"] for kind in dict.fromkeys(layers)}
    start, end = plain.sequence[0], plain.sequence[-1]
    graph = dataclasses.replace(
        plain,
        name=f"mixed {' '.join(layers)}",
        blocks={start.block: plain.blocks[start.block], **held, end.block: plain.blocks[end.block]},
        sequence=(start, *(Placement(path=f"blocks.{at}", block=kind) for at, kind in enumerate(layers)), end),
    )
    return graph, tiny_spec("mixtral" if "experts" in layers else "llama", **{**changes, "layers": len(layers)})


def _profile(draw: random.Random) -> HardwareProfile:
    if draw.random() < 0.4:
        return hardware(draw.choice(_BUNDLED))
    slow = draw.choice((1.0, 1.0, 1e-3))  # as if the model were so much larger
    return exact(
        device__peak_tflops__bf16=1000.0 * slow * draw.uniform(0.1, 1.0),
        device__peak_tflops__fp32=500.0 * slow * draw.uniform(0.1, 1.0),
        device__memory_bandwidth_gb_per_second=1000.0 * slow * draw.uniform(0.3, 3.0),
        topology__flat__bandwidth_gb_per_second=slow * 10.0 ** draw.uniform(0.0, 3.0),
        topology__flat__latency_us=draw.choice((0.0, 1.0, 20.0)),
        gemm__bf16__floor_us=draw.choice((0.0, 2.0)),
        interference__compute_factor=draw.uniform(1.0, 1.4),
        interference__communication_factor=draw.uniform(1.0, 1.4),
        interference__hidden_tp=draw.choice((0.0, 0.5)),
        memory__context_gib=draw.choice((0.0, 1e-3)),
        memory__communicator_gib=draw.choice((0.0, 1e-4)),
        memory__workspace_gib=draw.choice((0.0, 1e-4)),
        memory__reserved_share=draw.choice((0.0, 0.05)),
        software__eager__kernel_us=draw.choice((0.0, 3.0)),
        software__eager__step_us=draw.choice((0.0, 50.0)),
        software__megatron__collective_us=draw.choice((0.0, 5.0)),
    )


def _workload(draw: random.Random) -> TrainWorkload:
    return TrainWorkload(
        seq_len=draw.choice((48, 96, 480)),
        global_batch=draw.choice((8, 12, 16, 24)),
        precision=draw.choice(("bf16", "bf16", "fp32")),
        optimizer=draw.choice(("adamw", "adamw", "sgd")),
        stack=draw.choice(("eager", "compiled", "megatron")),
    )


def _uneven(draw: random.Random) -> Wishes:
    schedule = draw.choice(("gpipe", "1f1b"))
    return Wishes.from_dict(
        {
            "fix": {"pp": draw.choice((2, 3)), "tp": 1, "cp": 1, "ep": 1, "order": "tp-cp-dp-pp"},
            "recompute": _recompute(draw, (schedule,)),
            "schedules": [schedule],
        }
    )


def _wishes(draw: random.Random, found: Instance) -> Wishes:
    gpus, fix = found.gpus, {}
    if draw.random() < 0.75:
        fix["pp"] = draw.choice([size for size in (1, 2, 2, 3, 4) if gpus % size == 0])
    left = gpus // fix.get("pp", 1)
    if draw.random() < 0.75:
        fix["tp"] = draw.choice([size for size in (1, 1, 2, 4) if left % size == 0])
    if found.model is None or draw.random() < 0.7:
        fix["cp"] = 1
    if draw.random() < 0.5:
        fix["sp"] = draw.random() < 0.5
    if draw.random() < 0.6:
        fix["microbatch"] = draw.choice((1, 1, 2))
    if draw.random() < 0.5:
        fix["zero"] = draw.randint(0, 3)
    if draw.random() < 0.6:
        fix["order"] = draw.choice(("tp-cp-dp-pp", "tp-cp-pp-dp"))
    if found.model is not None and found.model.moe is not None and draw.random() < 0.6:
        fix["ep"] = draw.choice((1, 2))
    if draw.random() < 0.2:
        fix["overlap"] = {"dp": False, "pp": draw.random() < 0.5}
    schedules = draw.choice(
        (("1f1b",), ("1f1b",), ("gpipe",), ("interleaved",), ("zb",), ("zbv",), ("gpipe", "1f1b", "interleaved"))
    )
    words = _recompute(draw, schedules)
    return Wishes.from_dict({"fix": fix, "recompute": words, "schedules": list(schedules)})


def _recompute(draw: random.Random, schedules: tuple[str, ...]) -> list[str]:
    """Words that leave a schedule something: zb and zbv run nothing again."""
    words = list(draw.choice(_WORDS))
    return words if not {"zb", "zbv"}.issuperset(schedules) or "none" in words else ["none", *words]
