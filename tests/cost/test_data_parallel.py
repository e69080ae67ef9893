"""What data-parallel ranks exchange, read off links without latency, and what of it is exposed."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from planner.cost.data_parallel import beside, copies, exchange, exposed, last_share, with_every_block
from planner.cost.network import MeshRows, Network
from tests.cost.training_cases import LINK, exact, layouts, workload
from tests.spec.strategies import STEADY

PARAMETERS = 1e9
WIDTH = 2.0

times = st.floats(0.0, 1e3)
factors = st.floats(1.0, 3.0)


def moved(*given: dict[str, Any], experts: bool = False) -> tuple[list[float], list[float]]:
    """Bytes of gradients and of gathered parameters that cross a rank's link."""
    rows = layouts(*given)
    counts = np.full(len(rows), PARAMETERS)
    found = exchange(Network(exact()), MeshRows(rows), rows, counts, width=WIDTH, experts=experts)
    return (found.reduce * LINK).tolist(), (found.gather * LINK).tolist()


def test_volumes() -> None:
    """DDP 2Ψ(n−1)/n of fp32 gradients; ZeRO the same, its second half as gathered 16-bit parameters."""
    reduce, gather = moved({"dp": 4}, {"dp": 4, "zero": 1}, {"dp": 4, "zero": 3}, {"dp": 2, "cp": 2, "zero": 1})
    gradients, values = 4 * PARAMETERS, 2 * PARAMETERS
    assert reduce == pytest.approx([2 * gradients * 3 / 4, *[gradients * 3 / 4] * 3])
    assert gather == pytest.approx([0.0, *[values * 3 / 4] * 3])


def test_gradients_in_16_bits_are_half_the_bytes() -> None:
    reduce, _ = moved({"dp": 4, "grad_dtype": "bf16"}, {"dp": 4, "grad_dtype": "fp16", "zero": 2})
    assert reduce == pytest.approx([2 * 2 * PARAMETERS * 3 / 4, 2 * PARAMETERS * 3 / 4])


def test_copies_of_the_sharded_state() -> None:
    """8 ranks as 2 copies of 4: scattered among 4, then quarters are reduced between the copies."""
    reduce, gather = moved({"dp": 8, "zero": 1, "dp_replicate": 2})
    gradients = 4 * PARAMETERS
    assert reduce == pytest.approx([gradients * 3 / 4 + 2 * (gradients / 4) * 1 / 2])
    assert gather == pytest.approx([2 * PARAMETERS * 3 / 4])


def test_experts_have_ranks_of_their_own() -> None:
    """tp 2 · dp 8 with ep 4: four copies of each expert."""
    reduce, gather = moved({"tp": 2, "dp": 8, "ep": 4}, {"tp": 2, "dp": 8, "ep": 4, "zero": 1}, experts=True)
    assert reduce == pytest.approx([2 * 4 * PARAMETERS * 3 / 4, 4 * PARAMETERS * 3 / 4])
    assert gather == pytest.approx([0.0, 2 * PARAMETERS * 3 / 4])


def test_copies_into_and_out_of_buffers() -> None:
    """Shards of 4: a 16-bit gradient becomes an fp32 one; a quarter is cast and copied, the whole copied out."""
    rows = layouts({"dp": 4, "zero": 3}, {"dp": 4, "zero": 0}, {})
    counts = np.full(len(rows), PARAMETERS)
    found = copies(rows, workload(stack="eager"), counts, width=WIDTH, experts=False)
    assert found.gradients.tolist() == [6 * PARAMETERS, (6 + 16) * PARAMETERS, 0.0]
    assert found.values.tolist() == [(6 / 4 + 4) * PARAMETERS, (6 + 4) * PARAMETERS, 0.0]
    assert not copies(rows, workload(stack="megatron"), counts, width=WIDTH, experts=False).gradients.any()


def test_whole_weights_in_fp32_are_only_packed() -> None:
    """Not those of models with experts, which FSDP2 has."""
    rows = layouts({"dp": 4, "zero": 3}, {"dp": 4, "zero": 0}, {})
    counts = np.full(len(rows), PARAMETERS)
    plain, routed = (copies(rows, workload(stack="eager"), counts, width=4.0, experts=by) for by in (False, True))
    assert plain.gradients.tolist() == [8 * PARAMETERS, 8 * PARAMETERS, 0.0]
    assert plain.values.tolist() == [(8 / 4 + 8) * PARAMETERS, 0.0, 0.0]
    assert routed.gradients.tolist() == [8 * PARAMETERS, (8 + 16) * PARAMETERS, 0.0]
    assert routed.values.tolist() == [(8 / 4 + 8) * PARAMETERS, 8 * PARAMETERS, 0.0]


def test_one_rank_exchanges_nothing() -> None:
    assert moved({}, {"zero": 3}, {"tp": 2, "pp": 2}) == ([0.0] * 3, [0.0] * 3)


def test_who_gathers_with_every_block() -> None:
    given = [{"dp": 4, "zero": zero, "pp": pp} for zero in (0, 1, 3) for pp in (1, 2)]
    rows = layouts(*given)
    # torch's pipeline keeps parameters between microbatches
    assert with_every_block(rows, workload(stack="eager")).tolist() == [False, False, True, False, True, False]
    assert with_every_block(rows, workload(stack="megatron")).tolist() == [False] * 4 + [True] * 2


def test_what_is_reduced_last() -> None:
    """Torch: a block. Megatron: a bucket of 40 million gradients, or of a million for each rank."""
    rows = layouts({"dp": 4}, {"dp": 64}, {"dp": 32, "cp": 2})
    counts = np.array([1e9, 1e9, 1e6])
    blocks = np.array([1e8, 2e8, 1e6])
    assert last_share(rows, counts, blocks, workload()) == pytest.approx([0.1, 0.2, 1.0])
    assert last_share(rows, counts, blocks, workload(stack="megatron")) == pytest.approx([0.04, 0.064, 1.0])


@pytest.mark.parametrize(
    ("transfer", "window", "last", "overlapped", "expected"),
    [
        (10.0, 4.0, 0.1, True, 6.0),  # outlasts the work beside it
        (10.0, 40.0, 0.1, True, 1.0),  # all but the last bucket is hidden
        (10.0, 40.0, 0.1, False, 10.0),
        (10.0, 0.0, 0.1, True, 10.0),
        (0.0, 5.0, 0.5, True, 0.0),
    ],
)
def test_exposed(transfer: float, window: float, last: float, overlapped: bool, expected: float) -> None:
    found = exposed(np.array([transfer]), np.array([window]), np.array([last]), np.array([overlapped]))
    assert found.tolist() == [expected]


def side_by_side(work: float, transfer: float, slow_work: float, slow_transfer: float) -> float:
    return float(beside(np.array([work]), np.array([transfer]), slow_work, slow_transfer)[0])


@pytest.mark.parametrize(
    ("work", "transfer", "slow_work", "slow_transfer", "expected"),
    [
        (10.0, 0.0, 1.5, 1.25, 10.0),
        (0.0, 10.0, 1.5, 1.25, 10.0),
        (4.0, 4.0, 1.13, 1.13, 4.52),
        # 5 s side by side take the transfer to its end and 3⅓ s of the work; 6⅔ s are left
        (10.0, 4.0, 1.5, 1.25, 5.0 + 20.0 / 3.0),
        # 3 s side by side take the work to its end and 2.4 s of the transfer; 7.6 s are left
        (2.0, 10.0, 1.5, 1.25, 3.0 + 7.6),
        (10.0, 4.0, 1.0, 1.0, 10.0),
    ],
)
def test_beside(work: float, transfer: float, slow_work: float, slow_transfer: float, expected: float) -> None:
    assert side_by_side(work, transfer, slow_work, slow_transfer) == pytest.approx(expected)


@settings(max_examples=200, **STEADY)
@given(times, times, factors, factors)
def test_beside_lies_between_the_longer_and_the_slowed_sum(
    work: float, transfer: float, slow_work: float, slow_transfer: float
) -> None:
    found = side_by_side(work, transfer, slow_work, slow_transfer)
    assert found == pytest.approx(side_by_side(transfer, work, slow_transfer, slow_work))
    assert found >= max(work, transfer) * (1 - 1e-12)
    assert found <= (work * slow_work + transfer * slow_transfer) * (1 + 1e-12)
    assert found <= max(work * slow_work, transfer * slow_transfer) * (1 + 1e-12) + 1e-300


@settings(max_examples=100, **STEADY)
@given(times, times, times, factors, factors)
def test_more_to_do_is_never_done_sooner(
    work: float, transfer: float, more: float, slow_work: float, slow_transfer: float
) -> None:
    least = side_by_side(work, transfer, slow_work, slow_transfer) * (1 - 1e-9)
    assert side_by_side(work + more, transfer, slow_work, slow_transfer) >= least
    assert side_by_side(work, transfer + more, slow_work, slow_transfer) >= least
