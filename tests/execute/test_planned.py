"""Plans that nobody wrote by hand run as one process does: what the planner emits, any legal cut of each layer."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest

import planner
from planner.errors import PlannerError
from planner.spec.assignments import require_equal_ties
from planner.spec.graph import Graph
from planner.spec.legality import violations
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from planner.spec.regions import alternatives
from planner.spec.splits import module_splits
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from tests.execute.cases import LENGTH
from tests.execute.plans import plan_of
from tests.execute.test_runner import check_plan
from tests.tiny import tiny_spec

MODELS = ("llama", "gpt", "mixtral", "qwen3", "opt", "deepseek", "gemma2")
RECOMPUTE = ("none", "none", "selective", "full")
SEQUENCES = 8


def spec_of(seed: int) -> ModelSpec:
    return tiny_spec(MODELS[seed % len(MODELS)], layers=2, vocab=99)


def drawn_strategy(spec: ModelSpec, draw: random.Random, *, stages: bool) -> tuple[int, dict[str, Any]]:
    """GPUs, and keys of a strategy that can run on them, in a pipeline where `stages` asks for one."""
    workload = TrainWorkload(seq_len=LENGTH, global_batch=SEQUENCES, precision="bf16")
    while True:
        gpus = draw.choice((2, 2, 4, 4, 4, 8))
        keys: dict[str, Any] = {axis: draw.choice((1, 1, 2, 4)) for axis in ("tp", "cp", "ep")}
        keys |= {"pp": draw.choice((2, 2, 4)) if stages else 1, "recompute": draw.choice(RECOMPUTE)}
        keys |= {"microbatch": draw.choice((1, 2)), "zero": draw.choice((0, 1, 2, 3)), "sp": draw.random() < 0.5}
        keys |= {"vpp": draw.choice((1, 2)) if keys["pp"] > 1 else 1, "schedule": "1f1b"}
        if keys["pp"] > 1:
            keys["schedule"] = draw.choice(("gpipe", "1f1b") if keys["vpp"] == 1 else ("interleaved", "zb", "zbv"))
        if gpus % (keys["tp"] * keys["pp"] * keys["cp"]) or (keys["sp"] and keys["tp"] == 1):
            continue
        if not violations(spec, workload, Strategy.from_dict(keys, gpus=gpus), gpus):
            return gpus, keys


def emitted(seed: int) -> tuple[Plan, ModelSpec]:
    """What the planner answers for a small cluster whose GPUs are slow, so that cutting work may pay."""
    draw, spec = random.Random(seed), spec_of(seed)
    gpus, fix = drawn_strategy(spec, draw, stages=seed % 2 == 1)
    hardware = {"base": "dgx-h100", "set": {"device.peak_tflops.bf16": draw.choice((989.4, 0.02, 0.002))}}
    workload = {"seq_len": LENGTH, "global_batch": SEQUENCES, "precision": "bf16"}
    return planner.plan(spec.to_dict(), hardware, gpus, workload, fix), spec


@pytest.mark.parametrize("seed", range(30))
def test_what_the_planner_emits(seed: int) -> None:
    check_plan(*emitted(seed))


@functools.cache
def graph_of(name: str) -> Graph:
    return planner.trace(tiny_spec(name, layers=2, vocab=99))


def drawn_splits(graph: Graph, draw: random.Random, *, sp: bool) -> dict[int, frozenset[str]]:
    """For each layer and end what stays whole, among all that can run."""
    while True:
        whole = {
            place: draw.choice(alternatives(graph.blocks[item.block], sequence_parallel=sp))
            for place, item in enumerate(graph.sequence)
        }
        try:
            require_equal_ties(graph, whole)
        except PlannerError:
            continue
        return whole


@pytest.mark.parametrize("seed", range(30))
def test_any_cut_of_each_layer(seed: int) -> None:
    draw, spec = random.Random(seed), spec_of(seed)
    graph, sp = graph_of(spec.name), draw.random() < 0.5
    keys: dict[str, Any] = {"tp": 2, "sp": sp}
    if draw.random() < 0.3:
        keys |= {"pp": 2, "recompute": draw.choice(("none", "selective", "full"))}
    if spec.moe is not None:
        keys |= {"ep": 2}
    strategy = Strategy.from_dict(keys)
    splits = module_splits(graph, sequence_parallel=sp, whole=drawn_splits(graph, draw, sp=sp))
    check_plan(plan_of(spec, strategy, 2, splits=splits), spec)
