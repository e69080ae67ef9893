"""The dry run's counts as worked out by hand, and its memory where it is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from planner.execute.dryrun import DryRun, dry_run, fake_world
from planner.spec.model import ModelSpec
from planner.spec.orders import messages, rank_stages
from planner.spec.paths import Span
from planner.spec.strategy import Schedule, Strategy
from planner.spec.workload import TrainWorkload
from tests.execute.layouts import decoder_splits
from tests.tiny import tiny_spec

LENGTH = 32
LAYERS = 2
Counts = dict[tuple[str, str, str], tuple[int, int]]


def run(spec: ModelSpec, gpus: int, *, microbatches: int = 1, sequences: int = 1, **keys: Any) -> DryRun:
    run_keys = {key: keys.pop(key) for key in ("layers", "stage", "clip") if key in keys}
    strategy = Strategy.from_dict({"microbatch": sequences} | keys, gpus=gpus)
    batch = strategy.dp * sequences * microbatches
    workload = TrainWorkload(seq_len=LENGTH, global_batch=batch, precision="bf16")
    return dry_run(spec, strategy, workload, decoder_splits(spec, sp=strategy.sp), **run_keys)


def counts(result: DryRun, axis: str = "") -> Counts:
    """(axis, phase, kind) → (count, bytes)."""
    return {
        (call.axis, call.phase, call.kind): (call.count, call.bytes)
        for call in result.collectives
        if axis in ("", call.axis)
    }


@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_tensor_parallel_has_four_all_reduces_a_layer(model: str) -> None:
    spec = tiny_spec(model, layers=LAYERS, vocab=99)
    activation = 2 * 2 * LENGTH * spec.hidden  # two sequences in bf16
    tokens = 2 * LENGTH
    times = 2 * (2 * LAYERS + 1)  # two microbatches; the embedding is one more forward, the head one more backward
    assert counts(run(spec, 2, tp=2, sequences=2, microbatches=2)) == {
        ("tp", "forward", "all_reduce"): (times, times * activation),
        ("tp", "backward", "all_reduce"): (times, times * activation),
        ("tp", "loss", "all_reduce"): (4, 2 * (4 * tokens + 2 * 4 * tokens)),  # maxima; sums and labels' logits
    }


@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_sequence_parallel_gathers_and_scatters_instead(model: str) -> None:
    spec = tiny_spec(model, layers=LAYERS)
    activation = 2 * LENGTH * spec.hidden
    times = 2 * LAYERS + 1
    found = counts(run(spec, 2, tp=2, sp=True))
    whole = 4 * _whole_elements(spec)
    assert found == {
        **{
            ("tp", phase, kind): (times, times * activation)
            for phase in ("forward", "backward")
            for kind in ("all_gather", "reduce_scatter")
        },
        ("tp", "loss", "all_reduce"): (2, 12 * LENGTH),
        ("tp", "gradient_sync", "all_reduce"): (1, whole),
    }


def _whole_elements(spec: ModelSpec) -> int:
    """Weights that every tp rank holds whole and uses on its part of the sequence."""
    norms = (2 * spec.layers + 1) * spec.hidden * (2 if spec.norm_bias else 1)
    biases = 2 * spec.layers * spec.hidden if spec.bias else 0
    table = spec.max_positions * spec.hidden if spec.positions == "learned" else 0
    return norms + biases + table


def test_full_recompute_stops_before_the_last_sum() -> None:
    spec = tiny_spec("gpt", layers=LAYERS)
    activation = 2 * LENGTH * spec.hidden
    whole = counts(run(spec, 2, tp=2, recompute="full"))
    assert whole["tp", "recompute", "all_reduce"] == (LAYERS, LAYERS * activation)
    cut = counts(run(spec, 2, tp=2, sp=True, recompute="full"))
    assert cut["tp", "recompute", "all_gather"] == (2 * LAYERS, 2 * LAYERS * activation)
    assert cut["tp", "recompute", "reduce_scatter"] == (LAYERS, LAYERS * activation)
    selective = counts(run(spec, 2, tp=2, recompute="selective"))
    assert not [key for key in selective if key[1] == "recompute"]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_stages_over_three_microbatches(zero: int) -> None:
    spec = tiny_spec("llama", layers=LAYERS)
    groups = LAYERS + 2  # embedding; blocks; final norm and head
    elements = sum(_elements(spec).values())
    block = _elements(spec)["block"]
    found = counts(run(spec, 4, zero=zero, microbatches=3))
    if zero == 0:
        assert found == {("dp", "gradient_sync", "all_reduce"): (groups, 4 * elements)}
        return
    reductions = {1: 1, 2: 3, 3: 3}[zero]
    gathers = 3 if zero == 3 else 1
    expected: Counts = {
        ("dp", "forward", "all_gather"): (gathers * groups, gathers * 2 * elements),
        ("dp", "gradient_sync", "reduce_scatter"): (reductions * groups, reductions * 4 * elements),
    }
    if zero == 3:  # the head is still there and a look-up's gradient needs no table
        expected["dp", "backward", "all_gather"] = (3 * LAYERS, 3 * LAYERS * 2 * block)
    assert found == expected


def _elements(spec: ModelSpec) -> dict[str, int]:
    head_width = spec.kv_heads * spec.head_dim
    block = 2 * spec.hidden**2 + 2 * spec.hidden * head_width + 3 * spec.hidden * spec.ffn + 2 * spec.hidden
    ends = 2 * spec.vocab * spec.hidden + spec.hidden
    return {"ends": ends, "block": block, "other blocks": (spec.layers - 1) * block}


def test_copies_meet_once_a_step() -> None:
    spec = tiny_spec("llama", layers=LAYERS)
    elements = sum(_elements(spec).values())
    for zero, reductions in ((1, 1), (3, 2)):
        found = counts(run(spec, 4, zero=zero, dp_replicate=2, microbatches=2))
        groups = LAYERS + 2
        assert found["dp_replicate", "gradient_sync", "all_reduce"] == (groups, 4 * elements // 2)
        assert found["dp", "gradient_sync", "reduce_scatter"] == (reductions * groups, reductions * 4 * elements)


def test_context_parallel_gathers_keys_and_values_once_a_layer() -> None:
    spec = tiny_spec("llama", layers=LAYERS)
    both = 2 * 2 * LENGTH * spec.kv_heads * spec.head_dim
    found = counts(run(spec, 2, cp=2))
    assert found["cp", "forward", "all_gather"] == (LAYERS, LAYERS * both)
    assert found["cp", "backward", "reduce_scatter"] == (LAYERS, LAYERS * both)
    assert found["dp", "gradient_sync", "all_reduce"][1] == 4 * sum(_elements(spec).values())
    again = counts(run(spec, 2, cp=2, recompute="selective"))
    assert again["cp", "recompute", "all_gather"] == (LAYERS, LAYERS * both)


def test_experts_exchange_rows_four_times_a_layer() -> None:
    spec = tiny_spec("mixtral", layers=LAYERS)
    assert spec.moe is not None
    rows = 2 * LENGTH * spec.moe.top_k * spec.hidden
    for recompute, more in (("none", 0), ("full", 2)):
        found = counts(run(spec, 4, ep=4, zero=1, recompute=recompute), "ep")
        assert found["ep", "forward", "all_to_all"] == (2 * LAYERS, 2 * LAYERS * rows)
        assert found["ep", "backward", "all_to_all"] == (2 * LAYERS, 2 * LAYERS * rows)
        assert found.get(("ep", "recompute", "all_to_all"), (0, 0)) == (more * LAYERS, more * LAYERS * rows)


def test_experts_are_reduced_over_their_own_copies() -> None:
    spec = tiny_spec("mixtral", layers=LAYERS, vocab=96)  # whole rows for each of 8 ranks
    assert spec.moe is not None
    experts = LAYERS * 3 * spec.moe.experts * spec.moe.expert_ffn * spec.hidden
    result = run(spec, 8, ep=2, zero=1)
    reduced = {call.ranks: call.bytes for call in result.collectives if call.kind == "reduce_scatter"}
    assert reduced[4] == 4 * experts // 2
    router = LAYERS * spec.moe.experts * spec.hidden
    dense = sum(_elements(spec).values()) - LAYERS * 3 * spec.hidden * spec.ffn + router
    assert reduced[8] == 4 * dense
    (listed,) = [call for call in result.as_expected(Span(0, 0)) if call.kind == "reduce_scatter"]
    assert (listed.axis, listed.phase) == ("dp", "gradient_sync")
    assert listed.bytes == reduced[4] + reduced[8]


def test_axes_that_span_the_same_ranks_are_told_apart() -> None:
    spec = tiny_spec("mixtral", layers=LAYERS)
    found = counts(run(spec, 2, tp=2, ep=2, sp=True))
    rows = LENGTH // 2 * 2 * spec.hidden * 2  # half the sequence, two experts a token
    assert found["ep", "forward", "all_to_all"] == (2 * LAYERS, 2 * LAYERS * rows)
    activation = 2 * LENGTH * spec.hidden
    times = LAYERS + 1  # attention; the experts take the sequence as it is cut
    assert found["tp", "forward", "all_gather"] == (times, times * activation)
    assert found["tp", "backward", "reduce_scatter"] == (times, times * activation)


def test_the_norm_of_gradients_is_one_number() -> None:
    for keys in ({"tp": 2, "zero": 1}, {"tp": 4}, {"zero": 1}):
        found = counts(run(tiny_spec("gpt"), 4, clip=True, **keys), "world")
        assert found == {("world", "clip", "all_reduce"): (1, 4)}


def test_a_stage_between_others() -> None:
    spec = tiny_spec("gpt", layers=6)
    result = run(spec, 6, pp=3, tp=2, stage=1, layers=Span(2, 3), microbatches=4)
    activation = 2 * LENGTH * spec.hidden
    assert counts(result) == {
        **{("tp", phase, "all_reduce"): (16, 16 * activation) for phase in ("forward", "backward")},
        ("pp", "p2p", "p2p"): (8, 8 * activation),  # four results to the next stage, four gradients to the last
    }


def test_ends_send_one_way_and_sum_their_tied_table() -> None:
    spec = tiny_spec("gpt", layers=LAYERS)
    for stage in (0, 1):
        found = counts(run(spec, 2, pp=2, stage=stage, layers=Span(stage, stage), microbatches=2), "pp")
        assert found == {
            ("pp", "p2p", "p2p"): (2, 2 * 2 * LENGTH * spec.hidden),
            ("pp", "gradient_sync", "all_reduce"): (1, 4 * spec.vocab * spec.hidden),
        }


def test_at_the_turn_of_a_v_nothing_is_sent() -> None:
    """Two virtual stages a rank, of which one sends results and one gradients; tied ends are on one rank."""
    spec = tiny_spec("gpt", layers=4)
    for stage in (0, 1):
        layers = [Span(stage, stage), Span(3 - stage, 3 - stage)]
        found = counts(run(spec, 2, pp=2, vpp=2, schedule="zbv", stage=stage, layers=layers, microbatches=3), "pp")
        assert found == {("pp", "p2p", "p2p"): (6, 6 * 2 * LENGTH * spec.hidden)}


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_messages_go_where_torch_sends_them(schedule: Schedule) -> None:
    made: Any = {"interleaved": ScheduleInterleaved1F1B, "zbv": ScheduleZBVZeroBubble}[schedule]
    for rank, numbers in enumerate(rank_stages(schedule, 3, 2)):
        with fake_world(3, rank):
            like, where = torch.empty(1, device="meta"), torch.device("cpu")
            stages = [
                PipelineStage(nn.Identity(), number, 6, where, input_args=like, output_args=like)
                for number in numbers
            ]
            actions = made(stages, 6, loss_fn=lambda *_: None).pipeline_order_with_comms[rank]
        torchs = {(action.stage_index, action.computation_type.value) for action in actions}
        ours = {(number, kind) for number in numbers for kind in messages(schedule, 3, 2, number)}
        for number in numbers:
            assert ((number, "SEND_F") in torchs) == ((number, "F") in ours)
            assert ((number, "SEND_B") in torchs) == ((number, "B") in ours) == ((number, "I") in ours)


def test_memory_of_state_is_exact() -> None:
    """fp32 weights, two moments and a step count each, over four ranks."""
    spec = tiny_spec("llama", layers=LAYERS)
    elements = sum(_elements(spec).values())
    peak = run(spec, 4, zero=1, sequences=16).peak
    assert peak.phase == "loss"
    tensors = 9 * LAYERS + 3
    assert peak.optimizer == 8 * elements // 4 + 4 * tensors
    assert peak.parameters == 4 * elements // 4 + 2 * elements, "shards, and every weight gathered"
    assert peak.parameters + peak.gradients + peak.optimizer + peak.activations + peak.other == peak.bytes


def test_memory_by_layers_recompute_and_flight() -> None:
    sizes = {"hidden": 128, "ffn": 256, "vocab": 128}

    def peak(depth: int, gpus: int = 2, **keys: Any) -> Any:
        return run(tiny_spec("llama", layers=depth, **sizes), gpus, tp=2, sequences=16, **keys).peak

    two, four, six = peak(2).activations, peak(4).activations, peak(6).activations
    assert six - four == four - two > 0, "each layer keeps the same"
    kept = (four - two) // 2
    selective, full = (peak(4, recompute=choice).activations for choice in ("selective", "full"))
    assert full < selective < four
    at_once = [
        peak(6, gpus=6, pp=3, stage=stage, layers=Span(2 * stage, 2 * stage + 1), microbatches=4).activations
        for stage in range(2)
    ]
    assert at_once[1] - 2 * 2 * kept == pytest.approx(0, abs=kept)
    assert at_once[0] - 3 * 2 * kept == pytest.approx(0, abs=kept)


def test_a_dry_run_leaves_no_group_behind() -> None:
    spec = tiny_spec("gpt")
    assert run(spec, 256, tp=4, zero=3) == run(spec, 256, tp=4, zero=3)
