"""Assignments that keep some of a block whole run as one process does, in fp64: loss and every gradient.

And what such a step issues and takes, run without values, is what the cost model says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch

import planner
from planner.cost.expected import expected_collectives
from planner.cost.training import TrainingCost
from planner.cost.ways import Way
from planner.execute.dryrun import dry_run
from planner.spec.assignments import require_equal_ties
from planner.spec.graph import Graph
from planner.spec.model import ModelSpec
from planner.spec.paths import Span
from planner.spec.plan import ModuleSplit
from planner.spec.regions import alternatives, canonical
from planner.spec.splits import could_be_cut, module_splits
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from tests.execute import cases
from tests.execute.test_parity import STRATEGY_KEYS, TOLERANCE
from tests.execute.world import run_world
from tests.test_oracle import HARDWARE, LENGTH, WITHIN, traced
from tests.tiny import tiny_spec

CASTS_AT_ONCE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)
BOTH = pytest.mark.parametrize("sp", [False, True], ids=["whole", "sp"])


def whole_of(graph: Graph, parts: Mapping[str, tuple[int, ...] | None], *, sp: bool) -> dict[int, frozenset[str]]:
    """What to keep whole: modules whose paths contain a name, in some placements or, at None, in all."""
    found: dict[int, frozenset[str]] = {}
    for place, placement in enumerate(graph.sequence):
        block = graph.blocks[placement.block]
        could = could_be_cut(block)
        names = frozenset(
            operator.name
            for operator in block.operators
            for part, places in parts.items()
            if operator.name in could
            and part in operator.module.split(".")
            and (places is None or place in places)
        )
        found[place] = canonical(block, names)
        assert found[place] in alternatives(block, sequence_parallel=sp)
    assert any(found.values())
    require_equal_ties(graph, found)
    return found


def errors_of_mixed(
    spec: ModelSpec, strategy: Strategy, splits: dict[str, ModuleSplit], keys: dict[str, Any]
) -> dict[str, float]:
    """As `step_errors` tells, with the lines given."""
    with mock.patch.object(cases, "decoder_splits", return_value=splits):
        return cases.step_errors(spec, strategy, 2, **keys)


def check(
    model: str,
    parts: Mapping[str, tuple[int, ...] | None],
    *,
    model_keys: dict[str, Any] | None = None,
    **keys: Any,
) -> None:
    """`keys` are those of the strategy, and further arguments of `step_errors`."""
    spec = tiny_spec(model, **{"layers": 2, "vocab": 99} | (model_keys or {}))
    ranks = keys.get("tp", 1) * keys.get("cp", 1)
    strategy = Strategy.from_dict({key: keys.pop(key) for key in STRATEGY_KEYS & set(keys)}, gpus=ranks)
    graph = planner.trace(spec)
    splits = module_splits(graph, sequence_parallel=strategy.sp, whole=whole_of(graph, parts, sp=strategy.sp))
    for errors in run_world(ranks, errors_of_mixed, spec, strategy, splits, keys):
        assert not {path: error for path, error in errors.items() if not error < TOLERANCE}


@BOTH
@pytest.mark.parametrize("model", ["gpt", "llama", "falcon"])
def test_whole_feed_forward(model: str, sp: bool) -> None:
    """Under sequence parallelism each rank runs it on its own part, and its gradients are parts of a sum."""
    check(model, {"ffn": None}, tp=2, sp=sp)


@BOTH
def test_whole_table_and_head(sp: bool) -> None:
    check("llama", {"embedding": None}, tp=2, sp=sp)
    check("llama", {"head": None}, tp=2, sp=sp)


@BOTH
def test_whole_tied_table(sp: bool) -> None:
    """Each module's part of the one gradient is in the sum, and none twice."""
    check("gpt", {"embedding": None, "head": None}, tp=2, sp=sp)


@pytest.mark.parametrize("model", ["qwen3", "bloom", "gpt_oss", "deepseek"])
def test_whole_attention(model: str) -> None:
    """Norms of heads, slopes, sinks and a latent belong to heads only where heads are cut."""
    check(model, {"attention": None}, tp=2)


@BOTH
def test_layers_that_differ(sp: bool) -> None:
    check("llama", {"ffn": (1,), "head": None}, tp=2, sp=sp)


@BOTH
def test_whole_shared_expert(sp: bool) -> None:
    check("deepseek", {"shared": None}, tp=2, ep=2, sp=sp)


@BOTH
def test_selective_recompute_keeps_the_sums_that_are_left(sp: bool) -> None:
    check("llama", {"ffn": None}, tp=2, sp=sp, recompute="selective")


def test_all_whole() -> None:
    everything = dict.fromkeys(("attention", "ffn", "embedding", "head"))
    check("gpt", everything, tp=2)
    check("gpt", everything, tp=2, recompute="selective")


@BOTH
def test_sharded_state(sp: bool) -> None:
    check("llama", {"ffn": None, "embedding": None}, tp=2, sp=sp, zero=3)


def test_context_parallel() -> None:
    check("llama", {"ffn": None, "head": None}, tp=2, cp=2, sp=True)
    check("gpt", {"attention": None}, tp=2, cp=2)


def test_the_gradient_of_a_shared_table_is_sent_once() -> None:
    """Its part is one of four shards of padded rows, in fp32."""
    spec, graph = traced("gpt", ())
    strategy = Strategy.from_dict({"tp": 2, "sp": True, "zero": 1}, gpus=8)
    workload = TrainWorkload(seq_len=LENGTH, global_batch=2 * strategy.dp, precision="bf16")
    sent = []
    for whole in ({}, whole_of(graph, dict.fromkeys(("embedding", "head")), sp=True)):
        splits = module_splits(graph, sequence_parallel=True, whole=whole)
        run = dry_run(spec, strategy, workload, splits)
        sent += [
            item.bytes
            for item in run.as_expected(Span(0, 0))
            if (item.axis, item.phase, item.kind) == ("tp", "gradient_sync", "all_reduce")
        ]
    assert sent[1] - sent[0] == -(-spec.vocab // 4) * spec.hidden * 4


# model, what stays whole, and the strategy
STEPS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "feed-forward": ("llama", ("ffn",), {"tp": 4, "zero": 1}),
    "feed-forward under sp": ("llama", ("ffn",), {"tp": 4, "sp": True, "zero": 1}),
    "feed-forward, selective": ("llama", ("ffn",), {"tp": 4, "sp": True, "zero": 1, "recompute": "selective"}),
    "feed-forward, full": ("llama", ("ffn",), {"tp": 4, "sp": True, "zero": 3, "recompute": "full"}),
    "table under sp": ("llama", ("embedding",), {"tp": 4, "sp": True, "zero": 1}),
    "head under sp": ("llama", ("head",), {"tp": 4, "sp": True, "zero": 1}),
    "beside attention": ("falcon", ("ffn",), {"tp": 2, "sp": True, "zero": 3}),
    "shared expert": ("deepseek", ("shared",), {"tp": 2, "ep": 2, "sp": True, "zero": 1}),
    "attention": ("qwen3", ("attention",), {"tp": 4, "zero": 1, "recompute": "selective"}),
    "latent attention": ("deepseek", ("attention",), {"tp": 2, "ep": 2, "zero": 1}),
    "all": ("gpt", ("attention", "ffn", "embedding", "head"), {"tp": 2, "zero": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_model_and_executor_agree(case: str) -> None:
    name, parts, keys = STEPS[case]
    spec, graph = traced(name, ())
    strategy = Strategy.from_dict(keys, gpus=8)
    workload = TrainWorkload(seq_len=LENGTH, global_batch=2 * strategy.dp * strategy.microbatch, precision="bf16")
    whole = whole_of(graph, dict.fromkeys(parts), sp=strategy.sp)
    ways = [Way(block=item.block, whole=whole[place]) for place, item in enumerate(graph.sequence)]
    predicted = TrainingCost(graph, planner.load_hardware(HARDWARE), workload, ways).alone(strategy, ways=ways)
    splits = module_splits(graph, sequence_parallel=strategy.sp, whole=whole)
    run = dry_run(spec, strategy, workload, splits, clip=True)
    found = {(x.axis, x.phase, x.kind): (x.count, x.bytes) for x in run.as_expected(Span(0, 0))}
    wanted = {(x.axis, x.phase, x.kind): (x.count, x.bytes) for x in expected_collectives(predicted)}
    assert wanted == found
    # FSDP2 of torch 2.15 casts the gradient of a weight that is whole over tp where it comes, beside the bf16 one
    beside = 2 * spec.vocab * spec.hidden if parts == ("head",) and CASTS_AT_ONCE else 0
    assert predicted.memory().allocated[0, 0] == pytest.approx(run.peak.bytes - beside, rel=WITHIN)
