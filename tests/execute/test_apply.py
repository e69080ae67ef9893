"""What is refused, what dropout draws, and that a real step issues what the dry run counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from planner.execute.dryrun import dry_run
from planner.spec.plan import ModuleSplit
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from tests.execute.cases import LENGTH, counted_step, masks_of_dropout, refusal
from tests.execute.layouts import decoder_splits
from tests.execute.world import run_world
from tests.tiny import tiny_spec


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("gpt", {"tp": 2, "sp": True, "zero": 2, "recompute": "full"}),
        ("llama", {"tp": 2, "cp": 2, "zero": 3}),
        ("qwen3", {"tp": 4, "sp": True}),
        ("mixtral", {"tp": 2, "ep": 2, "zero": 1}),
    ],
)
def test_a_dry_run_counts_what_a_real_step_issues(model: str, keys: dict[str, Any]) -> None:
    spec = tiny_spec(model, layers=2)
    strategy = Strategy.from_dict(keys, gpus=4)
    sequences = 2 * strategy.dp
    real = run_world(4, counted_step, spec, strategy, sequences)[0]
    workload = TrainWorkload(seq_len=LENGTH, global_batch=sequences, precision="bf16")
    dry = dry_run(spec, strategy, workload, decoder_splits(spec, sp=strategy.sp), clip=True)
    if spec.moe is not None:  # a dry run takes an even load, a real router does not
        real, dry_calls = (_without_bytes_of_experts(calls) for calls in (real, dry.collectives))
        assert real == dry_calls
    else:
        assert real == dry.collectives


def _without_bytes_of_experts(calls: Any) -> list[Any]:
    return [dataclasses.replace(call, bytes=0) if call.axis == "ep" else call for call in calls]


def test_dropout_is_equal_where_activations_are() -> None:
    spec = tiny_spec("unfused", dropout=0.5, attention_dropout=0.5)
    whole = run_world(2, masks_of_dropout, spec, Strategy(tp=2))
    assert whole[0][0] == whole[1][0]
    assert whole[0][1] != whole[1][1], "ranks have other heads and draw other masks"
    spec = tiny_spec("gpt", dropout=0.5)
    split = run_world(2, masks_of_dropout, spec, Strategy(tp=2))
    alone = run_world(1, masks_of_dropout, spec, Strategy())
    assert split[0][0] == pytest.approx(alone[0][0], rel=1e-12), "tp draws what one process draws"
    sharded = run_world(2, masks_of_dropout, spec, Strategy(dp=2))
    assert sharded[0][0] != alone[0][0]


@pytest.mark.parametrize(
    ("changed", "rule", "value"),
    [
        ({"blocks.*.mlp": ModuleSplit(split="replicate")}, "names a module of the model", "blocks.*.mlp"),
        ({"norm": None}, "every module with weights", "norm"),
        ({"norm": ModuleSplit(split="column")}, "does not fit a module of class LayerNorm", "norm"),
        (
            {"blocks.0.ffn.down": ModuleSplit(split="row", input="replicate")},
            "the input of a row split is features",
            "replicate",
        ),
    ],
)
def test_refused(changed: dict[str, ModuleSplit | None], rule: str, value: str) -> None:
    for found, got in run_world(2, refusal, tiny_spec("gpt"), Strategy(tp=2), changed):
        assert rule in found
        assert value in got


def test_pieces_are_equal() -> None:
    for found, got in run_world(2, refusal, tiny_spec("gpt", ffn=131), Strategy(tp=2), {}):
        assert found == "2 pieces of equal size make up dim 0 of a weight"
        assert got == "weight (131, 64) of Linear"
