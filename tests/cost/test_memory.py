"""Memory of each pipeline rank: states by stack and ZeRO stage, activations by schedule, and what lies around."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.cost.memory import MemoryCosts
from planner.cost.training import TrainingCost
from planner.spec.graph import Graph
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from planner.units import GIB
from tests.cost.training_cases import SMALL_ENDS, alone, exact, tiny, workload


def memory(graph: Graph, work: TrainWorkload | None = None, **strategy: Any) -> MemoryCosts:
    return alone(graph, exact(), work, **strategy).memory()


def part(costs: MemoryCosts, *names: str) -> list[float]:
    """Bytes of some parts together, by pipeline rank."""
    found: list[float] = sum(costs.parts[name][:, 0] for name in names).tolist()  # type: ignore[union-attr]
    return found


LONG = workload(seq_len=1024, global_batch=8)
STATES = ("weights", "gradients", "optimizer")


@pytest.mark.parametrize(
    ("zero", "grad_dtype", "bytes_"),
    [
        (0, "fp32", 18.0),
        (1, "fp32", 6.0 + 12.0 / 4),
        (2, "fp32", 2.0 + 16.0 / 4),
        (3, "fp32", 18.0 / 4),
        (0, "bf16", 16.0),
        (1, "bf16", 4.0 + 12.0 / 4),
    ],
)
def test_states_of_megatron(zero: int, grad_dtype: str, bytes_: float) -> None:
    """16-bit weights, gradients, and 12 bytes of fp32 master weight and moments, over four ranks."""
    graph = tiny("llama")
    found = memory(graph, workload(stack="megatron"), dp=4, zero=zero, grad_dtype=grad_dtype)
    assert part(found, *STATES) == pytest.approx([bytes_ * graph.parameter_count])


@pytest.mark.parametrize(
    ("zero", "gradients", "gathered"),
    [
        (0, 4.0, 2.0),  # whole, beside 16-bit copies of all weights
        (1, 4.0, 2.0),  # whole until the last microbatch
        (2, 4.0 / 4, 2.0),
        (3, 4.0 / 4, 2.0 / 8),  # a layer of eight at a time
    ],
)
def test_states_of_torch(zero: int, gradients: float, gathered: float) -> None:
    """FSDP2: fp32 shards of weights and moments, and bytes a parameter of what is not sharded."""
    graph = tiny("llama", layers=8, **SMALL_ENDS)
    parameters = graph.parameter_count
    found = memory(graph, dp=4, zero=zero)
    shared = 4 if zero else 1
    assert part(found, "weights", "optimizer") == pytest.approx([12.0 * parameters / shared])
    assert part(found, "gradients") == pytest.approx([gradients * parameters])
    assert part(found, "gathered") == pytest.approx([gathered * parameters], rel=0.02)


def test_a_pipeline_of_torch_keeps_gathered_parameters_and_gradients() -> None:
    """Until its last microbatch, as FSDP2 does: 12/4 + 2 + 4 bytes a parameter of the rank."""
    graph = tiny("llama", layers=8, **SMALL_ENDS)
    found = memory(graph, dp=4, pp=2, zero=3)
    held = np.array(part(memory(graph, pp=2), "weights")) / 4
    assert part(found, "weights", "optimizer", "gradients") == pytest.approx((held * (12 / 4 + 4)).tolist())
    assert part(found, "gathered") == pytest.approx((2 * held).tolist())


def test_one_microbatch_needs_no_sums() -> None:
    graph = tiny("llama", layers=8, **SMALL_ENDS)
    one = memory(graph, workload(global_batch=4), dp=4, zero=1)
    two = memory(graph, workload(global_batch=8), dp=4, zero=1)
    assert part(two, "gradients")[0] - part(one, "gradients")[0] == 4.0 * graph.parameter_count


def test_optimizers_and_precisions() -> None:
    graph, megatron = tiny("llama"), {"stack": "megatron"}
    parameters = graph.parameter_count
    plain = memory(graph, workload(optimizer="sgd", **megatron))
    assert part(plain, "optimizer") == [4.0 * parameters], "the master weight alone"
    wide = memory(graph, workload(precision="fp32", **megatron))
    assert part(wide, *STATES) == [16.0 * parameters], "which is the weight itself in fp32"
    assert part(memory(graph, workload(precision="fp8", **megatron)), "weights") == [2.0 * parameters]


def test_states_of_experts_are_spread_over_their_own_ranks() -> None:
    """tp 2 · dp 4, ep 4: each expert lies on two ranks, which share its optimizer."""
    graph = tiny("mixtral")
    found = memory(graph, workload(stack="megatron"), tp=2, dp=4, ep=4, zero=1)
    experts = 2 * 8 * 3 * 64 * 32 / 4
    weights = part(found, "weights")[0] / 2.0
    dense = weights - experts
    assert part(found, "optimizer") == pytest.approx([12.0 * (dense / 4 + experts / 2)])


def test_experts_that_lie_on_one_rank_are_not_gathered() -> None:
    """Under ZeRO-3 two layers' dense weights are, and experts where several ranks share one."""
    graph, work = tiny("mixtral", **SMALL_ENDS), workload(stack="megatron")
    dense = 2 * 64 * 64 + 2 * 64 * 32 + 8 * 64 + 2 * 64
    apart = memory(graph, work, dp=8, ep=8, zero=3)
    assert part(apart, "gathered") == [2 * 2.0 * dense]
    shared = memory(graph, work, dp=8, ep=4, zero=3)
    assert part(shared, "gathered") == [2 * 2.0 * (dense + 2 * 3 * 64 * 32)]


def test_copies_of_sharded_state_are_whole_each() -> None:
    graph = tiny("llama")
    shared = part(memory(graph, workload(stack="megatron"), dp=8, zero=3, dp_replicate=2), *STATES)
    assert shared == pytest.approx([18.0 * graph.parameter_count / 4])


# activations


def test_microbatches_in_flight() -> None:
    """1F1B: rank i of p holds p − i, never more than there are; GPipe holds all."""
    graph = tiny("gpt", layers=8, **SMALL_ENDS)
    one = np.array(part(memory(graph, LONG, pp=4, schedule="gpipe", dp=8), "activations"))
    for schedule, counts in (("1f1b", [4, 3, 2, 1]), ("gpipe", [8] * 4)):
        found = part(memory(graph, LONG, pp=4, schedule=schedule), "activations")
        assert found == pytest.approx((one * counts).tolist())


def test_interleaved_stages_hold_more() -> None:
    graph = tiny("gpt", layers=8, **SMALL_ENDS)
    plain = part(memory(graph, LONG, pp=4), "activations")
    found = part(memory(graph, LONG, pp=4, vpp=2, schedule="interleaved"), "activations")
    assert found[0] == pytest.approx(plain[0] * (1 + 3 / (4 * 2)), rel=0.02)


def test_the_head_counts_once_and_on_its_rank() -> None:
    graph = tiny("gpt", layers=4)
    found = memory(graph, workload(stack="megatron"), pp=2, microbatch=2)
    tokens = 2 * 128
    norm, labels = tokens * (2 * 2 * 64 + 2 * 4), tokens * 8
    assert part(found, "logits") == [0.0, pytest.approx((4 + 2) * tokens * 100 + norm + labels, rel=1e-3)]
    layers = part(memory(graph, workload(stack="megatron"), pp=2, microbatch=2), "activations")
    assert layers[0] == pytest.approx(2 * layers[1], rel=0.05), "the head's are not among them"


def test_recomputation_brings_one_layer_back() -> None:
    graph = tiny("gpt", layers=8, **SMALL_ENDS)
    none, full = memory(graph, LONG, pp=2), memory(graph, LONG, pp=2, recompute="full")
    assert part(none, "recompute") == [0.0, 0.0]
    inputs = 2.0 * 1024 * 64
    assert part(full, "activations")[1] == pytest.approx(4 * inputs)
    layer = part(none, "activations")[1] / 4
    assert part(full, "recompute") == pytest.approx([layer - inputs] * 2)


# around the tensors


def test_parts_add_up() -> None:
    profile = exact(memory__reserved_share=0.1, memory__context_gib=1.0)
    found = alone(tiny("deepseek"), profile, tp=2, pp=2, dp=2, zero=1).memory()
    for rank in range(2):
        memory_of_rank = found.memory(rank, 0)
        assert memory_of_rank.allocated_bytes == pytest.approx(found.allocated[rank, 0])
        assert memory_of_rank.reserve_bytes >= 0.1 * memory_of_rank.allocated_bytes, "and what other moments held"
        assert memory_of_rank.device_bytes == pytest.approx(found.device[rank, 0])
        assert memory_of_rank.context_bytes == pytest.approx(GIB)


def test_each_kind_of_group_has_its_communicator() -> None:
    profile = exact(memory__communicator_gib=0.25, memory__context_gib=1.0)
    given = {"one GPU": {}, "dp": {"dp": 4}, "all": {"tp": 2, "pp": 2, "dp": 2, "cp": 2}}
    found = {name: alone(tiny("gpt"), profile, **keys).memory() for name, keys in given.items()}
    assert {name: part(costs, "context")[0] / GIB for name, costs in found.items()} == {
        "one GPU": 1.0, "dp": 1.5, "all": 2.25,
    }  # fmt: skip


def test_workspace_is_allocated() -> None:
    plain = alone(tiny("gpt"), exact()).memory()
    more = alone(tiny("gpt"), exact(memory__workspace_gib=0.5)).memory()
    assert more.allocated[0, 0] - plain.allocated[0, 0] == pytest.approx(0.5 * GIB)


def test_layouts_do_not_change_one_another() -> None:
    """In fp32, DDP has no gathered copy, whatever else is asked for at the same time."""
    graph, work = tiny("llama"), workload(precision="fp32")
    cost = TrainingCost(graph, exact(), work)
    both = [Strategy(dp=4), Strategy(dp=4, zero=3)]
    alone_each = [cost.costs([item]).device_bytes[0] for item in both]
    assert cost.costs(both).device_bytes.tolist() == alone_each
