"""Strategies as columns."""

from __future__ import annotations

import numpy as np
import pytest

from planner.spec.strategy import Strategy
from tests.cost.training_cases import layouts

MIXED = (
    {"tp": 2, "dp": 4, "zero": 1, "sp": True, "microbatch": 2, "grad_dtype": "bf16"},
    {"dp": 8, "cp": 2, "zero": 3, "dp_replicate": 2, "recompute": "full", "order": "tp-dp-cp-pp"},
    {"pp": 4, "vpp": 2, "sp": True, "overlap": {"tp": True, "dp": False}},
    {"tp": 4, "cp": 2, "dp": 4, "ep": 8, "etp": 2},
)


def test_columns_hold_what_the_strategies_say() -> None:
    found = layouts(*MIXED)
    strategies = [Strategy.from_dict(keys) for keys in MIXED]
    assert len(found) == 4
    assert found.gpus.tolist() == [item.gpus for item in strategies] == [8, 16, 4, 32]
    for key in ("tp", "pp", "dp", "cp", "ep", "etp", "vpp", "microbatch", "zero", "dp_replicate", "recompute",
                "schedule", "order"):  # fmt: skip
        assert getattr(found, key).tolist() == [getattr(item, key) for item in strategies]
    assert found.expert_dp.tolist() == [item.expert_dp for item in strategies]
    assert found.microbatches.tolist() == [8, 8, 64, 16]
    assert found.gradient_bytes.tolist() == [2.0, 4.0, 4.0, 4.0]
    assert found.overlap_tp.tolist() == [False, False, True, False]
    assert found.overlap_dp.tolist() == [True, True, False, True]


def test_sharing() -> None:
    found = layouts(*MIXED)
    assert found.sp.tolist() == [True, False, False, False], "with tp 1 there is nothing to share"
    assert found.whole_shards.tolist() == [2, 1, 1, 1]
    # zero shards over data and context parallel ranks of one copy
    assert found.dp_shard.tolist() == [4, 8 // 2 * 2, 1, 1]


@pytest.mark.parametrize("rows", [np.array([2, 0]), np.array([True, False, True, False])])
def test_some_of_the_rows(rows: np.ndarray) -> None:
    found = layouts(*MIXED).take(rows)
    expected = layouts(*[MIXED[place] for place in np.arange(4)[rows]])
    assert len(found) == 2
    assert found.tp.tolist() == expected.tp.tolist()
    assert found.order.tolist() == expected.order.tolist()
    assert found.microbatches.tolist() == expected.microbatches.tolist()
