"""One block under many layouts, on a GPU whose times are FLOPs or bytes over a rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.cost.blocks import BlockPricer
from planner.cost.kernels import base_precision
from planner.cost.times import PARTS, BlockCost
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.workload import TrainWorkload
from tests.cost.training_cases import BANDWIDTH, LINK, PEAK, exact, layouts, tiny, workload

B, S, H, F, V, HEADS, DEPTH = 2, 128, 64, 128, 100, 4, 16  # the tiny models at microbatch 2
TOKENS = B * S
ONE = {"microbatch": B}
SPLIT = {"microbatch": B, "tp": 2}
SHARED = {"microbatch": B, "tp": 2, "sp": True}


def fast_memory(**changes: Any) -> HardwareProfile:
    """Bytes in memory take no time, so that products are bound by their FLOPs."""
    return exact(device__memory_bandwidth_gb_per_second=1e9, **changes)


def priced(
    graph: Graph,
    *given: dict[str, Any],
    block: str = "blocks.0",
    profile: HardwareProfile | None = None,
    work: TrainWorkload | None = None,
) -> BlockCost:
    return BlockPricer(graph, profile or exact(), work or workload()).costs(layouts(*given))[block]


def part(times: np.ndarray, name: str) -> list[float]:
    found: list[float] = times[PARTS.index(name)].tolist()
    return found


# products and attention


def test_products_of_a_layer() -> None:
    """2·tokens·(4h² + 2hf) FLOPs forward, twice that back; each rank of tp has its share."""
    cost = priced(tiny("gpt"), ONE, SPLIT, {"microbatch": B, "tp": 4}, profile=fast_memory())
    seconds = 2 * TOKENS * (4 * H * H + 2 * H * F) / PEAK
    shares = [seconds, seconds / 2, seconds / 4]
    assert part(cost.forward, "matmul") == pytest.approx(shares)
    assert part(cost.backward, "matmul") == pytest.approx([2 * share for share in shares], rel=1e-3)
    # of the backward, one of two products is of the weights
    assert cost.weight_seconds.tolist() == pytest.approx(shares, rel=1e-3)


def test_causal_attention() -> None:
    """Half of the square, 4·d FLOPs for each pair of a query and a key; the backward 2.5 times that."""
    cost = priced(tiny("gpt"), ONE, SPLIT, {"microbatch": B, "cp": 2}, profile=fast_memory())
    seconds = B * HEADS * S * (S + 1) / 2 * 4 * DEPTH / PEAK
    assert part(cost.forward, "attention") == pytest.approx([seconds, seconds / 2, seconds / 2])
    assert part(cost.backward, "attention") == pytest.approx(
        [2.5 * share for share in (seconds, *[seconds / 2] * 2)]
    )


def test_whole_products_are_shared_along_the_sequence() -> None:
    """Latent attention: down-projections stay whole without sequence parallelism and are halved with it."""
    cost = priced(tiny("deepseek"), ONE, SPLIT, SHARED, profile=fast_memory())
    low_ranks = 2 * TOKENS * H * (32 + 24)  # queries 32; keys and values 16 + 8
    cut = 2 * TOKENS * (32 * 4 * 24 + 16 * 4 * 32 + 4 * 16 * H + 3 * H * F)
    assert part(cost.forward, "matmul") == pytest.approx(
        [(low_ranks + cut) / PEAK, (low_ranks + cut / 2) / PEAK, (low_ranks + cut) / 2 / PEAK]
    )


def test_experts_share_the_tokens() -> None:
    """Two of eight experts a token. Spread over ranks, each has as many rows; cut, a part of every one."""
    given = [ONE, {**ONE, "dp": 4, "ep": 4}, {**SHARED, "etp": 2}, {**ONE, "dp": 8, "ep": 8}]
    cost = priced(tiny("mixtral"), *given, profile=fast_memory())
    dense = priced(tiny("llama"), *given, profile=fast_memory())
    feed_forward = 2 * TOKENS * 3 * H * F / PEAK * np.array([1, 1, 0.5, 1])
    router = 2 * TOKENS * H * 8 / PEAK * np.array([1, 1, 0.5, 1])
    experts = (
        np.array(part(cost.forward, "matmul")) - np.array(part(dense.forward, "matmul")) + feed_forward - router
    )
    rows = 2 * TOKENS
    assert experts.tolist() == pytest.approx((2 * rows * 3 * H * 32 / PEAK * np.array([1, 1, 0.5, 1])).tolist())


def test_the_busiest_expert_rank_sets_the_pace() -> None:
    spread = {**ONE, "dp": 4, "ep": 4}
    even = priced(tiny("mixtral"), ONE, spread, profile=fast_memory())
    uneven = priced(tiny("mixtral"), ONE, spread, profile=fast_memory(), work=workload(imbalance=1.5))
    experts = 2 * 2 * TOKENS * 3 * H * 32 / PEAK
    slower = np.array(part(uneven.forward, "matmul")) - np.array(part(even.forward, "matmul"))
    assert slower.tolist() == pytest.approx([0.0, 0.5 * experts])
    exchanged = np.array(part(uneven.forward, "ep")) / np.array([1.0, *part(even.forward, "ep")[1:]])
    assert exchanged.tolist() == pytest.approx([0.0, 1.5])


def test_8_bit_products_of_layers_are_twice_as_fast_and_the_head_is_not() -> None:
    profile = fast_memory()
    for block, factor in (("blocks.0", 0.5), ("end", 1.0)):
        wide = priced(tiny("gpt"), ONE, block=block, profile=profile)
        narrow = priced(tiny("gpt"), ONE, block=block, profile=profile, work=workload(precision="fp8"))
        assert part(narrow.forward, "matmul")[0] == pytest.approx(
            factor * part(wide.forward, "matmul")[0], rel=1e-2
        )
        assert part(narrow.forward, "attention") == part(wide.forward, "attention")
    assert (base_precision("fp8"), base_precision("nvfp4")) == ("bf16", "bf16")
    assert (base_precision("fp16"), base_precision("fp32")) == ("fp16", "fp32")


def test_gpus_that_sustain_less_are_slower() -> None:
    full = priced(tiny("gpt"), ONE)
    half = priced(tiny("gpt"), ONE, profile=exact(device__sustained_share=0.5))
    for name in ("matmul", "attention"):
        assert part(half.forward, name) == pytest.approx([2 * part(full.forward, name)[0]])
    assert part(half.forward, "elementwise") == part(full.forward, "elementwise")


# kernels that memory bounds


def test_bytes_of_an_eager_layer() -> None:
    """Two norms, two sums, a GELU; norms keep mean and deviation of each token in fp32."""
    given = [ONE, SPLIT, SHARED]
    cost = priced(tiny("gpt"), *given)
    whole = 2 * (2 * 2 * TOKENS * H + 2 * 4 * TOKENS) + 2 * 3 * 2 * TOKENS * H
    cut = 2 * 2 * TOKENS * F
    expected = np.array([whole + cut, whole + cut / 2, (whole + cut) / 2]) / BANDWIDTH
    assert part(cost.forward, "elementwise") == pytest.approx(expected.tolist())


def test_a_stack_without_fusion_moves_most() -> None:
    graph = tiny("llama")
    seconds = {
        stack: priced(graph, ONE, work=workload(stack=stack)).forward[PARTS.index("elementwise")][0]
        for stack in ("eager", "compiled", "megatron")
    }
    assert seconds["compiled"] < seconds["megatron"] < seconds["eager"]


# collectives


def test_a_layer_has_four_all_reduces() -> None:
    """Of 2·b·s·h bytes, two forward and two back; under sequence parallelism a gather and a scatter each."""
    for tp in (2, 4):
        given = [{"microbatch": B, "tp": tp}, {"microbatch": B, "tp": tp, "sp": True}]
        cost = priced(tiny("gpt"), *given)
        seconds = 2 * 2 * (tp - 1) / tp * 2 * TOKENS * H / LINK
        assert part(cost.forward, "tp") == pytest.approx([seconds, seconds])
        assert part(cost.backward, "tp") == pytest.approx([seconds, seconds])


def test_overlapped_tensor_parallelism_hides_a_share() -> None:
    profile = exact(interference__hidden_tp=0.75)
    cost = priced(tiny("gpt"), SPLIT, {**SPLIT, "overlap": {"tp": True}}, profile=profile)
    assert part(cost.forward, "tp")[1] == pytest.approx(0.25 * part(cost.forward, "tp")[0])


def test_a_parallel_loss_exchanges_three_numbers_a_token() -> None:
    """And gathers what the head reads; its gradient is summed once."""
    cost = priced(tiny("gpt"), SPLIT, SHARED, block="end")
    numbers, hidden = 3 * 4 * TOKENS / LINK, 2 * TOKENS * H / LINK
    assert part(cost.forward, "tp") == pytest.approx([numbers, numbers + hidden / 2])
    assert part(cost.backward, "tp") == pytest.approx([hidden, hidden / 2])


def test_an_embedding_sums_its_rows() -> None:
    cost = priced(tiny("gpt"), SPLIT, block="start")
    assert part(cost.forward, "tp") == pytest.approx([2 * TOKENS * H / LINK])


def test_context_parallel_ranks_gather_keys_and_values() -> None:
    """2·2·tokens·kv_heads·d bytes among cp ranks; Megatron passes them around beside the attention."""
    given = [ONE, {**ONE, "cp": 2}, {**ONE, "cp": 4}]
    cost = priced(tiny("llama"), *given)
    both = 2 * 2 * TOKENS * 2 * DEPTH / LINK
    assert part(cost.forward, "cp") == pytest.approx([0.0, both / 2, both * 3 / 4])
    assert part(cost.backward, "cp") == pytest.approx([0.0, both / 2, both * 3 / 4])
    ring = priced(tiny("llama"), *given, work=workload(stack="megatron"))
    exposed = np.array([0.0, both / 2, both * 3 / 4]) - np.array(part(ring.forward, "attention"))
    assert part(ring.forward, "cp") == pytest.approx(np.maximum(exposed, 0.0).tolist())


def test_tokens_travel_to_experts_and_back() -> None:
    """2·k·tokens·h bytes there and back, all but the share that stays."""
    given = [ONE, {**ONE, "dp": 4, "ep": 4}, {**SHARED, "ep": 2}]
    cost = priced(tiny("mixtral"), *given)
    sent = 2 * 2 * TOKENS * H / LINK
    expected = [0.0, 2 * sent * 3 / 4, 2 * sent / 2 / 2]
    assert part(cost.forward, "ep") == pytest.approx(expected)
    assert part(cost.backward, "ep") == pytest.approx(expected)


def test_alone_nothing_is_exchanged() -> None:
    for name in ("gpt", "llama", "mixtral", "deepseek"):
        graph = tiny(name)
        for cost in BlockPricer(graph, exact(), workload()).costs(layouts(ONE)).values():
            for times in (cost.forward, cost.backward, cost.recompute):
                assert [part(times, axis) for axis in ("tp", "cp", "ep", "dp", "pp", "bubble")] == [[0.0]] * 6


# recomputation


@pytest.mark.parametrize(("stack", "share"), [("megatron", 1.0), ("eager", 3 / 4)])
def test_full_recomputation_is_a_forward_with_its_collectives(stack: str, share: float) -> None:
    """Torch stops behind the last value that backward reads: the block's last sum is not made again."""
    none, full = SHARED, {**SHARED, "recompute": "full"}
    cost = priced(tiny("gpt"), none, full, work=workload(stack=stack))
    compute = sum(part(cost.forward, name)[1] for name in ("matmul", "attention", "elementwise"))
    assert part(cost.recompute, "recompute") == pytest.approx([0.0, compute])
    exchanged = part(cost.forward, "tp")[1] * share
    assert part(cost.recompute, "tp") == pytest.approx([0.0, exchanged])
    extra = cost.backward_seconds[1] - cost.backward_seconds[0]
    assert extra == pytest.approx(compute + exchanged + part(cost.recompute, "host")[1])


def test_selective_recomputation_of_torch_gathers_again() -> None:
    whole, parts = {**SPLIT, "recompute": "selective"}, {**SHARED, "recompute": "selective"}
    cost = priced(tiny("gpt"), whole, parts)
    assert part(cost.recompute, "tp") == pytest.approx([0.0, part(cost.forward, "tp")[1] / 2]), "no sums"


def test_selective_recomputation_of_megatron_is_the_attention_core() -> None:
    selective = {**SPLIT, "recompute": "selective"}
    fused = priced(tiny("gpt"), selective, work=workload(stack="megatron"))
    assert part(fused.recompute, "recompute") == pytest.approx(part(fused.forward, "attention"))
    assert part(fused.recompute, "tp") == [0.0]
    unfused = priced(tiny("unfused"), selective, work=workload(stack="megatron"), profile=fast_memory())
    core = B * HEADS * S * S * 4 * DEPTH / 2 / PEAK
    assert part(unfused.recompute, "recompute") == pytest.approx([core], rel=0.01)


def test_what_stands_around_the_layers_is_never_recomputed() -> None:
    for block in ("start", "end"):
        cost = priced(tiny("gpt"), {**ONE, "recompute": "full"}, {**ONE, "recompute": "selective"}, block=block)
        assert not cost.recompute.any()


# host


def test_a_slow_host_sets_the_pace() -> None:
    """A kernel each: 6 products, the attention, 5 others. Little is left where the device is far slower."""
    slow = {f"software__{stack}__kernel_us": 1000.0 for stack in ("eager", "compiled")}
    cost = priced(tiny("gpt"), ONE, profile=exact(**slow))
    assert cost.forward_seconds.tolist() == pytest.approx([12e-3], rel=1e-6)
    busy = priced(tiny("gpt"), ONE, profile=exact(software__eager__kernel_us=0.001, device__sustained_share=1e-3))
    assert part(busy.forward, "host")[0] < 1e-3 * busy.forward_seconds[0]
    assert part(priced(tiny("gpt"), ONE).forward, "host") == [0.0]


def test_launches_that_block_add_up() -> None:
    changes = {"software__eager__kernel_us": 1.0, "software__eager__blocking": 0.5}
    cost = priced(tiny("gpt"), ONE, profile=exact(**changes))
    assert part(cost.forward, "host") == pytest.approx([0.5 * 12e-6])


# blocks as kernels


def test_layers_are_told_from_what_stands_around_them() -> None:
    found = BlockPricer(tiny("deepseek"), exact(), workload(precision="fp8")).kernels
    assert {name: kernels.layer for name, kernels in found.items()} == {
        "start": False, "blocks.0": True, "blocks.1": True, "end": False,
    }  # fmt: skip
    assert [bool(kernels.low_precision) for kernels in found.values()] == [False, True, True, False]
    assert not any(
        kernels.low_precision for kernels in BlockPricer(tiny("deepseek"), exact(), workload()).kernels.values()
    )


def test_what_a_rank_has_of_each_tensor() -> None:
    shares = BlockPricer(tiny("mixtral"), exact(), workload()).kernels["blocks.0"].shares
    of = {name.removeprefix("blocks.0."): share for name, share in shares.items()}
    assert of["attention.query/linear"] == of["attention.core/sdpa"] == "cut"
    assert of["attention.output/linear"] == of["add"] == of["ffn_norm/rms_norm"] == "whole"
    assert of["ffn.experts.gate/grouped_matmul"] == of["ffn.experts.activation/mul"] == "routed"


def test_keys_beyond_their_heads_are_computed_whole() -> None:
    """2 kv heads under tp 4: each rank makes a whole head of keys and one of values."""
    given = [{**ONE, "tp": 2}, {**ONE, "tp": 4}]
    cost = priced(tiny("llama"), *given, profile=fast_memory())
    others = 2 * TOKENS * (2 * H * H + 3 * H * F)
    keys_and_values = 2 * TOKENS * 2 * H * DEPTH
    expected = [(others / 2 + keys_and_values) / PEAK, (others / 4 + keys_and_values) / PEAK]
    assert part(cost.forward, "matmul") == pytest.approx(expected)
