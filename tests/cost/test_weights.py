"""Parameters that each rank holds, counted by hand and against the model's own number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.cost.kernels import kernels_of
from planner.cost.stages import stage_counts
from planner.cost.ways import usual_ways
from planner.cost.weights import RankWeights, block_weights, rank_weights, tied_parameters
from planner.spec.graph import Graph
from planner.spec.splits import block_splits
from tests.cost.training_cases import bundled, layouts, tiny, workload

# the tiny GPT: width 64, ffn 128, vocabulary 100
LAYER = 4 * (64 * 64 + 64) + 2 * 64 * 128 + 128 + 64 + 4 * 64
POSITIONS = 64


def held(graph: Graph, *given: dict[str, Any], pp: int = 1, vpp: int = 1, schedule: str = "1f1b") -> RankWeights:
    rows = layouts(*[{"pp": pp, "vpp": vpp, "schedule": schedule, **keys} for keys in given])
    kernels = kernels_of(graph, workload(), usual_ways(graph))
    return rank_weights(kernels, tied_parameters(graph), rows, stage_counts(graph, pp, vpp, schedule))


def rows_of(graph: Graph, path: str) -> int:
    return graph.parameters()[path].shape[0]


def test_a_layer_of_gpt() -> None:
    block = tiny("gpt").blocks["blocks.0"]
    found = block_weights(block, block_splits(block), layouts({}, {"tp": 2}, {"tp": 4}))
    # whole: norms and the biases of row cuts
    whole = 4 * 64 + 2 * 64
    cut = LAYER - whole
    assert found.dense.tolist() == [LAYER, whole + cut / 2, whole + cut / 4]
    assert found.experts.tolist() == [0, 0, 0]


def test_the_vocabulary_is_padded() -> None:
    """100 rows in eighths: 13 each."""
    block = tiny("gpt").blocks["end"]
    found = block_weights(block, block_splits(block), layouts({}, {"tp": 8}))
    assert found.dense.tolist() == [100 * 64 + 2 * 64, 13 * 64 + 2 * 64]


def test_experts_are_spread_over_ep_and_cut_by_etp() -> None:
    """8 experts of three matrices 64·32; a router of 8 rows, whole; attention with 2 kv heads of 16."""
    block = tiny("mixtral").blocks["blocks.0"]
    rows = layouts({}, {"dp": 8, "ep": 8}, {"dp": 4, "ep": 4}, {"tp": 4, "dp": 2, "ep": 2, "etp": 4}, {"tp": 2})
    found = block_weights(block, block_splits(block), rows)
    experts = 8 * 3 * 64 * 32
    assert found.experts.tolist() == [experts, experts / 8, experts / 4, experts / 8, experts]
    attention, whole = 2 * 64 * 64 + 2 * 64 * 32, 8 * 64 + 2 * 64
    assert found.dense[[0, 1, 2, 4]].tolist() == [attention + whole] * 3 + [attention / 2 + whole]


def test_tied_weights_are_held_once_on_a_rank_and_by_both_ends() -> None:
    graph = tiny("gpt", layers=4)
    table, positions = 100 * 64, rows_of(graph, "embedding.positions.weight") * 64
    assert held(graph, {}).dense.tolist() == [[graph.parameter_count]]
    found = held(graph, {}, pp=2).dense[:, 0]
    assert found.tolist() == [2 * LAYER + table + positions, 2 * LAYER + table + 2 * 64]
    back_again = held(graph, {}, pp=2, vpp=2, schedule="zbv").dense[:, 0]  # both ends, each with its own
    assert back_again.tolist() == [2 * LAYER + 2 * table + positions + 2 * 64, 2 * LAYER]


def test_towers_share_one_table_on_a_rank() -> None:
    """T5's table serves encoder, decoder and head."""
    graph = tiny("t5")
    assert held(graph, {}).dense.tolist() == [[graph.parameter_count]]


@pytest.mark.parametrize("name", ["gpt", "llama", "deepseek", "mixtral", "vit", "bert", "t5"])
def test_one_rank_holds_the_model(name: str) -> None:
    graph = tiny(name)
    found = held(graph, {})
    assert found.dense[0, 0] + found.experts[0, 0] == graph.parameter_count


@pytest.mark.parametrize("name", ["llama", "deepseek", "mixtral"])
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_ranks_together_hold_the_model(name: str, pp: int) -> None:
    """Untied models: pipeline ranks add up; a second tensor-parallel rank repeats what is whole alone."""
    graph = tiny(name, layers=6)
    found = held(graph, {}, {"tp": 2, "ep": 2}, {"dp": 8, "ep": 8}, {"dp": 4, "ep": 4, "tp": 2, "etp": 2}, pp=pp)
    spread = np.array([1, 2, 8, 8])
    experts = found.experts.sum(axis=0) * spread
    assert experts.tolist() == [experts[0]] * 4
    assert found.dense[:, 0].sum() + experts[0] == graph.parameter_count
    assert found.dense[:, 2].sum() == found.dense[:, 0].sum()
    cut = 2 * found.dense[:, 1].sum() - found.dense[:, 0].sum()
    assert 0 < cut < 0.2 * found.dense[:, 0].sum(), "norms, routers, low ranks"
    assert found.dense[:, 3].tolist() == found.dense[:, 1].tolist()


def test_the_largest_block() -> None:
    graph = tiny("gpt", layers=4)
    ends = 100 * 64 + 2 * 64
    positions = rows_of(graph, "embedding.positions.weight") * 64
    start = 100 * 64 + positions
    assert held(graph, {}, pp=2).largest_block.tolist() == [[max(start, LAYER)], [max(ends, LAYER)]]


def test_sizes_of_published_models() -> None:
    graph = bundled("llama3.1-70b")
    found = held(graph, {"tp": 8}, {"tp": 1}, pp=4)
    assert found.dense[:, 1].sum() == graph.parameter_count
    assert found.dense[:, 0].sum() * 8 == pytest.approx(graph.parameter_count, rel=1e-3)


def test_kv_heads_are_held_whole_beyond_their_number() -> None:
    """2 kv heads under tp 4: each rank keeps one of 16 rows for keys and one for values, not half of one."""
    block = tiny("llama").blocks["blocks.0"]
    found = block_weights(block, block_splits(block), layouts({"tp": 2}, {"tp": 4}))
    keys_and_values = 2 * 64 * 16
    others = 2 * 64 * 64 + 3 * 64 * 128
    norms = 2 * 64
    assert found.dense.tolist() == [keys_and_values + others / 2 + norms, keys_and_values + others / 4 + norms]
