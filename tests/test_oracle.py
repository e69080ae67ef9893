"""The cost model against the executor: what a step issues, exactly, and what its tensors take, within 7 %.

The executor runs each case without values and without peers. Widths are shrunk, what a layer does is not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import planner
from planner.cost.expected import expected_collectives
from planner.cost.training import SharedStages, TrainingCost
from planner.execute.dryrun import dry_run
from planner.execute.gradients import whole_backward
from planner.spec.graph import Graph
from planner.spec.model import ModelSpec, load_bundled
from planner.spec.paths import Span
from planner.spec.splits import module_splits
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload

HARDWARE = {"base": "dgx-h100", "set": {"memory.workspace_gib": 0.0}}
WITHIN = 0.07
LENGTH = 1024
Counts = dict[tuple[str, str, str], tuple[int, int]]

_WIDTHS: dict[str, Any] = {"hidden": 512, "heads": 8, "ffn": 2048, "vocab": 16000, "layers": 2}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt3-1.3b", {"vocab": 10257}),
    "opt": ("opt-1.3b", {"vocab": 10272}),
    "llama": ("llama3.1-8b", {"kv_heads": 4}),
    "qwen3": ("qwen3-8b", {"kv_heads": 2, "head_dim": 64}),
    "falcon": ("falcon-40b", {"kv_heads": 4}),
    "gemma2": ("gemma2-9b", {"kv_heads": 4, "head_dim": 64}),
    "mixtral": ("mixtral-8x7b", {"kv_heads": 4, "moe": {"experts": 8, "top_k": 2, "expert_ffn": 1024}}),
    "gpt_oss": ("gpt-oss-20b", {"kv_heads": 4}),
    "deepseek": (
        "deepseek-v2",
        {
            "head_dim": 96,
            "moe": {"experts": 16, "top_k": 4, "expert_ffn": 256, "shared_experts": 2, "first_dense_layers": 1},
            "mla": {
                "query_rank": 256, "kv_rank": 128, "nope_head_dim": 64, "rope_head_dim": 32, "value_head_dim": 64
            },
        },
    ),
}  # fmt: skip

# model, GPUs, microbatches, and the strategy; `precision`, `length` and `model` are keys of their own
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "tp": ("llama", 8, 2, {"tp": 4, "zero": 0}),
    "tp sp over nodes": ("llama", 256, 2, {"tp": 8, "sp": True, "zero": 3}),
    "zero 2, two microbatches": ("llama", 8, 2, {"zero": 2}),
    "zero 2, four microbatches": ("llama", 64, 4, {"zero": 2, "tp": 2}),
    "copies of shards": ("llama", 32, 2, {"tp": 2, "cp": 2, "zero": 3, "dp_replicate": 2}),
    "single precision": ("llama", 16, 1, {"tp": 2, "zero": 3, "precision": "fp32"}),
    "context": ("llama", 8, 2, {"cp": 4, "zero": 1, "recompute": "full"}),
    "tied table": ("gpt", 8, 2, {"tp": 4, "zero": 1}),
    "tied table in eighths": ("gpt", 8, 1, {"zero": 3}),
    "positions and biases under sp": ("opt", 8, 2, {"tp": 2, "sp": True, "zero": 1}),
    "fewer kv heads than ranks": ("qwen3", 16, 2, {"tp": 8, "sp": True, "zero": 3, "microbatch": 4}),
    "fewer kv heads than ranks, cp": ("qwen3", 16, 1, {"tp": 4, "cp": 2, "zero": 1}),
    "parallel block, full": ("falcon", 8, 2, {"tp": 2, "sp": True, "zero": 1, "recompute": "full"}),
    "norms behind sums, full": ("gemma2", 8, 2, {"tp": 2, "zero": 1, "recompute": "full"}),
    "dropout, full": ("gpt", 8, 2, {"tp": 2, "sp": True, "recompute": "full", "model": {"dropout": 0.1}}),
    "selective": ("llama", 8, 2, {"tp": 4, "sp": True, "recompute": "selective", "microbatch": 8}),
    "selective, cp": ("llama", 8, 2, {"tp": 2, "cp": 2, "zero": 3, "recompute": "selective", "microbatch": 4}),
    "selective, dropout": ("gpt", 8, 2, {"tp": 2, "recompute": "selective", "model": {"dropout": 0.1}}),
    "experts on every rank": ("mixtral", 8, 2, {"zero": 1}),
    "experts, one a rank": ("mixtral", 64, 2, {"ep": 8, "zero": 3, "microbatch": 4}),
    "experts and copies": ("mixtral", 16, 1, {"ep": 2, "zero": 2, "dp_replicate": 2}),
    "experts in tp": ("mixtral", 8, 2, {"tp": 2, "ep": 2, "zero": 1, "recompute": "full"}),
    "experts in tp with sp": ("mixtral", 8, 2, {"tp": 4, "ep": 4, "sp": True, "zero": 3}),
    "experts cut, selective": (
        "mixtral", 8, 2,
        {"tp": 2, "ep": 2, "etp": 2, "sp": True, "zero": 1, "recompute": "selective", "microbatch": 4},
    ),
    "experts with biases and sinks": ("gpt_oss", 8, 2, {"ep": 8, "zero": 1}),
    "latent attention": ("deepseek", 8, 2, {"ep": 8, "zero": 1, "recompute": "selective"}),
    "latent attention in tp": ("deepseek", 8, 2, {"tp": 2, "ep": 2, "sp": True, "zero": 1}),
    "pipeline": ("llama", 16, 6, {"pp": 4, "tp": 2, "model": {"layers": 4}}),
    "pipeline, zero 3": ("llama", 8, 3, {"pp": 2, "zero": 3, "recompute": "full", "model": {"layers": 4}}),
    "pipeline of experts": ("mixtral", 16, 4, {"pp": 2, "ep": 8, "zero": 1, "model": {"layers": 4}}),
    "rounds": ("llama", 8, 8, {"pp": 4, "vpp": 2, "zero": 1, "schedule": "interleaved", "model": {"layers": 8}}),
    "backward in two": (
        "llama", 8, 12, {"pp": 4, "vpp": 2, "schedule": "zb", "zero": 1, "microbatch": 8, "model": {"layers": 8}},
    ),
    "backward in two, in tp": (
        "llama", 12, 9, {"pp": 3, "vpp": 2, "schedule": "zb", "tp": 2, "sp": True, "zero": 3, "microbatch": 8,
                       "model": {"layers": 6}},
    ),
    "backward in two, a round": (
        "llama", 8, 8, {"pp": 4, "vpp": 2, "schedule": "zb", "microbatch": 8, "model": {"layers": 8}},
    ),
    "backward in two, experts": (
        "mixtral", 8, 6, {"pp": 2, "vpp": 2, "schedule": "zb", "ep": 2, "zero": 1, "microbatch": 8,
                          "model": {"layers": 4}},
    ),
    "in a V": (
        "qwen3", 16, 16, {"pp": 4, "vpp": 2, "schedule": "zbv", "zero": 3, "tp": 2, "sp": True, "microbatch": 8,
                          "model": {"layers": 8}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_model_and_executor_agree(case: str) -> None:
    name, gpus, count, keys = CASES[case]
    keys = dict(keys)
    precision, changes = keys.pop("precision", "bf16"), keys.pop("model", {})
    spec, graph = traced(name, tuple(changes.items()))
    strategy = Strategy.from_dict(keys, gpus=gpus)
    batch = strategy.dp * strategy.microbatch * count
    workload = TrainWorkload(seq_len=LENGTH, global_batch=batch, precision=precision)
    predicted = TrainingCost(graph, planner.load_hardware(HARDWARE), workload).alone(strategy)
    splits = module_splits(graph, sequence_parallel=strategy.sp)
    expected, allocated = expected_collectives(predicted), predicted.memory().allocated[:, 0]
    for stage, layers in enumerate(layers_of_ranks(predicted)):
        run = dry_run(spec, strategy, workload, splits, layers=layers, stage=stage, clip=True)
        found: Counts = {(x.axis, x.phase, x.kind): (x.count, x.bytes) for x in run.as_expected(Span(0, 0))}
        wanted = {(x.axis, x.phase, x.kind): (x.count, x.bytes) for x in expected if x.stages.first == stage}
        assert wanted == found, f"stage {stage}"
        if whole_backward(strategy.schedule):  # torch 2.11 does not split it, which keeps less
            assert allocated[stage] > (1 - WITHIN) * run.peak.bytes, f"stage {stage}: {run.peak}"
        else:
            assert allocated[stage] == pytest.approx(run.peak.bytes, rel=WITHIN), f"stage {stage}: {run.peak}"


@cache
def traced(name: str, changes: tuple[tuple[str, Any], ...]) -> tuple[ModelSpec, Graph]:
    base, widths = _MODELS[name]
    given = load_bundled(base) | _WIDTHS | widths | dict(changes)
    spec = ModelSpec.from_dict({key: value for key, value in given.items() if key != "parameters"})
    return spec, planner.trace(spec)


def layers_of_ranks(predicted: SharedStages) -> list[list[Span]]:
    """The layers of each virtual stage of every rank."""
    stages, kernels = predicted.stages, predicted.pricer.kernels
    spans: list[list[Span]] = [[] for _ in range(stages.pp)]
    first = 0
    for rank, counts in zip(stages.rank_of, stages.counts.tolist(), strict=True):
        held = sum(count for name, count in zip(stages.blocks, counts, strict=True) if kernels[name].layer)
        spans[rank].append(Span(first, first + held - 1))
        first += held
    return spans
