"""Models, layouts and a GPU in round numbers, for the tests of the training cost model."""

from __future__ import annotations

import dataclasses
import functools
import random
from pathlib import Path
from typing import Any

import planner
from planner.cost.layouts import Layouts
from planner.cost.training import SharedStages, TrainingCost
from planner.spec.files import bundled_names
from planner.spec.graph import Graph, Placement
from planner.spec.hardware import HardwareProfile
from planner.spec.hardware_sources import load_hardware
from planner.spec.legality import violations
from planner.spec.model import ModelSpec, load_bundled
from planner.spec.overrides import with_changes
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from tests.tiny import NAMES, tiny_spec
from tests.trace import user_models

_USER_FILE = Path(user_models.__file__)
_ORIGIN = {"source": "assumed", "reference": "round numbers"}
_CURVE = {**_ORIGIN, "efficiency": 1.0, "bandwidth_efficiency": 1.0, "floor_us": 0.0}
_SOFTWARE = {**_ORIGIN, "kernel_us": 0.0}

# a GPT of Megatron's shape, with dropout everywhere
MEGATRON_SHAPE = {
    "hidden": 1024, "heads": 16, "kv_heads": 16, "ffn": 4096, "dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip
SMALL_ENDS = {"vocab": 8, "max_positions": 1024}  # an embedding and a head that weigh next to nothing

PEAK = 1e15  # FLOPs a second of the exact GPU
BANDWIDTH = 1e12  # bytes a second of its memory
LINK = 1e9  # bytes a second to any other GPU

EXACT: dict[str, Any] = {
    "name": "exact",
    "device": {
        **_ORIGIN, "name": "exact", "gpus_per_node": 8, "memory_gib": 1024.0,
        "memory_bandwidth_gb_per_second": BANDWIDTH / 1e9,
        "peak_tflops": {"fp32": PEAK / 1e12, "bf16": PEAK / 1e12, "fp8": 2 * PEAK / 1e12},
    },
    "memory": {**_ORIGIN, "context_gib": 0.0},
    "elementwise": {**_ORIGIN, "bandwidth_efficiency": 1.0, "floor_us": 0.0},
    "interference": {**_ORIGIN, "compute_factor": 1.0, "communication_factor": 1.0},
    "gemm": dict.fromkeys(("fp32", "bf16", "fp8"), _CURVE),
    "attention": {
        precision: {"prefill": _CURVE, "backward": {**_CURVE, "flops_factor": 2.5}, "decode": _CURVE}
        for precision in ("fp32", "bf16")
    },
    "software": dict.fromkeys(("eager", "compiled", "megatron", "cuda_graph"), _SOFTWARE),
    "topology": {"flat": {**_ORIGIN, "link": "wire", "bandwidth_gb_per_second": LINK / 1e9, "latency_us": 0.0}},
}  # fmt: skip


def exact(**changes: Any) -> HardwareProfile:
    """A GPU without launch cost, floors or latencies: times are FLOPs or bytes over a rate.

    `changes` are dotted keys of the profile with `__` for the dot.
    """
    profile = HardwareProfile.from_dict(EXACT)
    return with_changes(profile, {_dotted(key): value for key, value in changes.items()})


def hardware(name: str, **changes: Any) -> HardwareProfile:
    """A bundled profile with dotted keys changed, `__` for the dot."""
    return load_hardware({"base": name, "set": {_dotted(key): value for key, value in changes.items()}})


def _dotted(key: str) -> str:
    return key.replace("__", ".")


@functools.cache
def tiny(name: str, layers: int = 0, **changes: Any) -> Graph:
    """The graph of a tiny model, with other keys where asked for; further layers repeat the last one."""
    graph = planner.trace(tiny_spec(name, **changes))
    return _with_layers(graph, layers) if layers else graph


def _with_layers(graph: Graph, layers: int) -> Graph:
    before, *within, after = graph.sequence
    last = within[-1].block
    others = [placement for placement in within if placement.block != last]
    same = range(len(others), layers)
    repeated = [Placement(path=f"blocks.{place}", block=last) for place in same]
    return dataclasses.replace(graph, sequence=(before, *others, *repeated, after))


@functools.cache
def bundled(name: str) -> Graph:
    """The graph of a bundled model."""
    assert name in bundled_names("model_specs")
    return planner.trace(name)


@functools.cache
def user(name: str) -> Graph:
    """The graph of a module that a user wrote."""
    return planner.trace(f"{_USER_FILE}:{name}")


def workload(**keys: Any) -> TrainWorkload:
    """64 sequences of 128 tokens in bf16 unless told otherwise."""
    return TrainWorkload(**{"seq_len": 128, "global_batch": 64, "precision": "bf16", **keys})


def layouts(*given: dict[str, Any], batch: int = 64) -> Layouts:
    """Columns of strategies."""
    return Layouts.of([Strategy.from_dict(keys) for keys in given], batch)


def cost(graph: Graph, profile: HardwareProfile | str, work: TrainWorkload | None = None) -> TrainingCost:
    """The pricer of one model on one cluster."""
    return TrainingCost(graph, load_hardware(profile), work or workload())


def alone(
    graph: Graph, profile: HardwareProfile | str, work: TrainWorkload | None = None, **strategy: Any
) -> SharedStages:
    """One layout by itself."""
    return cost(graph, profile, work).alone(Strategy.from_dict(strategy))


@functools.cache
def legal(name: str, gpus: int, work: TrainWorkload, count: int = 400, **fixed: Any) -> tuple[Strategy, ...]:
    """Some of the layouts that a tiny or bundled model can run with, the same ones each time."""
    spec = tiny_spec(name) if name in NAMES else ModelSpec.from_dict(load_bundled(name))
    degrees = [degree for degree in (1, 2, 4, 8, 16, 32) if gpus % degree == 0]
    schedules = [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb", 2), ("zbv", 2)]
    choices: dict[str, list[Any]] = {
        "tp": degrees, "pp": degrees, "cp": [1, 2], "ep": [1, 2, 4], "microbatch": [1, 2], "zero": [0, 1, 2, 3],
        "sp": [False, True], "recompute": ["none", "selective", "full"], "schedule": schedules,
        "order": ["tp-cp-dp-pp", "tp-dp-cp-pp", "dp-tp-cp-pp"], "grad_dtype": ["fp32", "bf16"],
        "overlap": [{}, {"dp": False}, {"tp": True, "pp": True}],
    }  # fmt: skip
    choices |= {key: [value] for key, value in fixed.items()}
    draw, found = random.Random(0), {}
    for _ in range(200 * count):
        keys = {key: draw.choice(values) for key, values in choices.items()}
        if isinstance(keys["schedule"], tuple):
            keys["schedule"], keys["vpp"] = keys["schedule"]
        if gpus % (keys["tp"] * keys["pp"] * keys["cp"]):
            continue
        strategy = Strategy.from_dict(keys, gpus=gpus)
        if not violations(spec, work, strategy, gpus):
            found[strategy] = None
        if len(found) == count:
            break
    return tuple(found)
