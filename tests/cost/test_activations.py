"""What backward keeps of a block: the published table of Megatron, and what other stacks and models keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.cost.activations import Activations, BlockActivations
from planner.cost.blocks import BlockPricer
from planner.spec.graph import Graph
from tests.cost.training_cases import MEGATRON_SHAPE, exact, layouts, tiny, workload

B = 4
S, H, A = 1024, 1024, 16
SBH = S * B * H
SCORES = 5 * A * S / H

UNIT = B * 128 * 64  # tokens · width of the tiny models


def kept(graph: Graph, *given: dict[str, Any], block: str = "blocks.0", **work: Any) -> Activations:
    rows = layouts(*[{"microbatch": B, **keys} for keys in given])
    return BlockActivations(BlockPricer(graph, exact(), workload(**work)), rows).of(block)


def per_sbh(*given: dict[str, Any], attention: str = "unfused") -> Activations:
    graph = tiny("gpt", **MEGATRON_SHAPE, attention=attention)
    return kept(graph, *given, stack="megatron", seq_len=S)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_layer_keeps_what_korthikanti_counted(tp: int) -> None:
    """Korthikanti et al. 2022, table 2: sbh·(10 + 24/t + 5as/ht), and /t of it all under sequence parallelism."""
    found = per_sbh({"tp": tp}, {"tp": tp, "sp": True}).kept / SBH
    shared = tp if tp > 1 else 1
    assert found.tolist() == pytest.approx([10 + 24 / tp + SCORES / tp, (34 + SCORES) / shared], rel=0.02)


@pytest.mark.parametrize("tp", [1, 4])
def test_flash_attention_keeps_no_scores(tp: int) -> None:
    found = per_sbh({"tp": tp}, {"tp": tp, "sp": True}, attention="flash").kept / SBH
    assert found.tolist() == pytest.approx([10 + 24 / tp, 34 / tp], rel=0.02)


@pytest.mark.parametrize("attention", ["unfused", "flash"])
@pytest.mark.parametrize("tp", [1, 4])
def test_selective_recomputation_leaves_34sbh(tp: int, attention: str) -> None:
    """The scores go; queries, keys and values stay to make them again, and the result for the projection."""
    given = {"tp": tp, "recompute": "selective"}
    found = per_sbh(given, {**given, "sp": True}, attention=attention).kept / SBH
    assert found.tolist() == pytest.approx([10 + 24 / tp, 34 / tp], rel=0.02)


def test_full_recomputation_leaves_the_input() -> None:
    """2sbh; a tensor-parallel rank has all of it, or its share of the sequence."""
    full = {"recompute": "full"}
    found = per_sbh(full, {**full, "tp": 4}, {**full, "tp": 4, "sp": True})
    assert (found.kept / SBH).tolist() == [2.0, 2.0, 0.5]
    everything = per_sbh({}, {"tp": 4}, {"tp": 4, "sp": True}).kept
    assert (found.kept + found.again).tolist() == pytest.approx(everything.tolist())


def test_context_parallel_ranks_keep_their_part_of_the_queries() -> None:
    found = per_sbh({}, {"cp": 2}, attention="flash").kept
    assert found[1] == pytest.approx(found[0] / 2)
    scores = per_sbh({}, {"cp": 2}).kept
    assert scores[1] == pytest.approx(scores[0] / 2, rel=1e-3)


def test_twice_the_microbatch_is_twice_the_bytes() -> None:
    found = kept(tiny("llama"), {"microbatch": 1}, {"microbatch": 2}, {"microbatch": 4})
    assert found.kept.tolist() == pytest.approx([found.kept[0], 2 * found.kept[0], 4 * found.kept[0]])
    assert found.passing[0] < found.passing[1] < found.passing[2]


@pytest.mark.parametrize(
    ("stack", "widths"),
    [
        # of bytes a token over h: norms' inputs and results, q, k with v, the core's result twice, the ffn of 2h
        ("eager", 4 * 2 + 2 + 2 * 1 + 2 * 2 + 4 * 4),
        ("megatron", 4 * 2 + 2 + 2 * 1 + 2 * 2 + 3 * 4),
    ],
)
def test_a_layer_of_llama(stack: str, widths: float) -> None:
    """Eager keeps gate, up, silu(gate) and their product; fused, silu(gate) is made again."""
    found = kept(tiny("llama"), {}, stack=stack).kept / UNIT
    statistics = (2 * 4 + 4 * 4) / 64  # of two norms and of four heads, fp32 for each token
    assert found.tolist() == pytest.approx([widths + statistics])


def test_nothing_is_kept_twice_by_neighbours() -> None:
    """A layer's result is the next one's input, which that one keeps."""
    graph = tiny("gpt")
    whole = BlockActivations(BlockPricer(graph, exact(), workload()), layouts({"microbatch": B}))
    total = sum(count * whole.of(name).kept[0] for name, count in graph.repeats().items())
    assert total == pytest.approx(graph.kept_bytes(B, 128), rel=1e-5), "but for the loss, one number"


@pytest.mark.parametrize("name", ["gpt", "llama", "mixtral", "unfused", "deepseek"])
def test_an_eager_layer_keeps_what_the_graph_does(name: str) -> None:
    graph = tiny(name)
    block = graph.blocks["blocks.0"]
    expected = sum(t.bytes(B, 128) for t in block.kept().values() if t.name not in block.outputs)
    found = kept(graph, {})
    assert found.kept.tolist() == pytest.approx([expected])
    assert found.again.tolist() == [0.0]


def test_tokens_of_experts() -> None:
    """Two of eight experts: gate, up, silu(gate) and their product, 32 wide, for every token twice."""
    found = kept(tiny("mixtral"), {}, {"recompute": "full"})
    assert found.routed[0] == pytest.approx(4 * 2 * 2 * B * 128 * 32, rel=0.02)
    assert found.routed[1] <= found.kept[1]
    assert kept(tiny("llama"), {}).routed.tolist() == [0.0]


def test_a_loss_in_place() -> None:
    """One fp32 buffer of logits, cut over tp, and gradients in 16 bits as they pass."""
    tokens, vocab = B * 128, 100
    found = kept(tiny("gpt"), {}, {"tp": 4}, block="end", stack="megatron")
    apart = kept(tiny("gpt"), {}, {"tp": 4}, block="end", loss_in_place=False)
    norm = tokens * (2 * 2 * 64 + 2 * 4)
    labels = tokens * 8
    assert found.kept[0] == pytest.approx(4 * tokens * vocab + norm + labels, rel=0.01)
    assert found.kept[0] - found.kept[1] == pytest.approx(3 * tokens * vocab, rel=0.03)
    assert found.passing.tolist() == [2 * tokens * vocab, 2 * tokens * vocab / 4]
    assert apart.passing[0] - 4 == 2 * 4 * tokens * vocab, (
        "the loss, gradients of log-probabilities, and of logits"
    )


def test_products_of_torch_keep_what_was_gathered() -> None:
    """Under sequence parallelism the inputs of columns are whole again; Megatron keeps its part of them."""
    given = {"tp": 4, "sp": True}
    eager = kept(tiny("gpt"), given).kept[0]
    megatron = kept(tiny("gpt"), given, stack="megatron").kept[0]
    assert eager - megatron == pytest.approx(2 * 2 * UNIT * 3 / 4), "of two norms"


def test_ends_are_never_recomputed() -> None:
    for block in ("start", "end"):
        found = kept(tiny("gpt"), {}, {"recompute": "full"}, {"recompute": "selective"}, block=block)
        assert np.ptp(found.kept) == 0
        assert not found.again.any()


@pytest.mark.parametrize("stack", ["eager", "compiled", "megatron"])
@pytest.mark.parametrize("name", ["gpt", "llama", "mixtral", "deepseek", "unfused"])
def test_recomputing_more_keeps_less(name: str, stack: str) -> None:
    levels = [{"recompute": level} for level in ("none", "selective", "full")]
    found = kept(tiny(name), *levels, stack=stack)
    assert found.kept[0] >= found.kept[1] >= found.kept[2] > 0
    assert found.again[0] == 0.0
    assert np.all(found.kept + found.again >= found.kept[0] * (1 - 1e-12)), "what was dropped comes back"
    assert found.kept[2] + found.again[2] == pytest.approx(found.kept[0])


@pytest.mark.parametrize(("keys", "units"), [({}, 10.0), ({"tp": 2}, 7.0), ({"tp": 2, "sp": True}, 6.0)])
def test_gradients_that_a_weight_part_waits_for(keys: dict[str, Any], units: float) -> None:
    """Of results of products and norms: q 1, k and v ½ each, output 1, gate and up 2 each, down 1, norms 1 each.

    Heads and hidden width are cut by tp, what is summed up is whole; norms' results are cut with sp.
    """
    found = kept(tiny("llama"), keys, {**keys, "recompute": "full"})
    assert (found.gradients / (2 * UNIT)).tolist() == [units, 0.0]
    assert (found.unfinished == [found.kept[0], 0.0]).all()


def test_behind_the_loss_only_the_head_waits_for_its_weight_part() -> None:
    """Norm and projection have their inputs kept, and the gradients of their results; probabilities are gone."""
    graph = tiny("llama")
    found = kept(graph, {}, block="end", loss_in_place=False)
    logits = 2 * B * 128 * 100
    assert found.gradients[0] == 2 * UNIT + logits
    assert found.unfinished[0] < found.kept[0] - 2 * logits
