"""Prices of one block's assignments, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from planner.cost.layouts import Floats
from planner.search.block_prices import BlockPrices
from planner.spec.graph import Graph
from planner.spec.splits import could_be_cut
from planner.spec.strategy import Strategy
from tests.cost.training_cases import exact, tiny, workload

TOKENS, HIDDEN, FFN = 128, 64, 128
VALUES = TOKENS * HIDDEN * 2  # bytes of what goes from module to module, in bf16


def feed_forward(graph: Graph) -> frozenset[str]:
    block = graph.blocks["blocks.0"]
    could = could_be_cut(block)
    return frozenset(op.name for op in block.operators if op.name in could and op.module.startswith("ffn."))


def change(link_gb_per_second: float = 1.0, *, sp: bool = False) -> Floats:
    """What cutting the feed-forward of a tiny GPT over two ranks changes."""
    graph = tiny("gpt")
    price = BlockPrices(
        graph=graph,
        block="blocks.0",
        profile=exact(topology__flat__bandwidth_gb_per_second=link_gb_per_second),
        workload=workload(seq_len=TOKENS),
        strategy=Strategy.from_dict({"tp": 2, "sp": sp}),
    )
    cut, whole = price([frozenset(), feed_forward(graph)])
    return np.asarray(cut - whole)


def test_two_sums_of_whole_values() -> None:
    """The result forward and the input's gradient backward: each rank sends half of twice what it has."""
    assert change(1.0)[0] - change(1e9)[0] == pytest.approx(2 * VALUES / 1e9, rel=1e-6)


def test_gathers_and_scatters_instead() -> None:
    """Under sequence parallelism a gather and a scatter each way, of half the values each."""
    assert change(1.0, sp=True)[0] - change(1e9, sp=True)[0] == pytest.approx(4 * VALUES / 2 / 1e9, rel=1e-6)


@pytest.mark.parametrize("sp", [False, True])
def test_half_of_the_weights(sp: bool) -> None:
    """Two matrices and the first one's bias; the second bias is added once, whole."""
    assert change(sp=sp)[1] == -(2 * HIDDEN * FFN + FFN) / 2


def test_kept_bytes() -> None:
    """Before and behind the activation, halved; the gathered input is kept whole where it was kept in halves."""
    inner = 2 * TOKENS * FFN * 2
    assert change()[2] == -inner / 2
    assert change(sp=True)[2] == VALUES / 2


def test_the_order_of_assignments_is_kept() -> None:
    graph = tiny("gpt")
    price = BlockPrices(
        graph=graph, block="blocks.0", profile=exact(), workload=workload(), strategy=Strategy.from_dict({"tp": 2})
    )
    cut, whole = price([frozenset(), feed_forward(graph)])
    assert price([feed_forward(graph), frozenset()]).tolist() == [whole.tolist(), cut.tolist()]
