"""A user's own module under plans: loss and every gradient are those of the module alone, in fp64."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

import planner
from planner.errors import PlannerError
from planner.spec.graph import Graph
from planner.spec.paths import NOTHING, Span
from planner.spec.plan import ModuleSplit, Plan, Stage
from planner.spec.splits import module_splits
from tests.execute import own_models
from tests.execute.own_runs import (
    LENGTH,
    SEQUENCES,
    WHOLE,
    counted_step,
    cut_refusals,
    own_plan,
    refusals,
    run_cases,
    slopes,
)
from tests.execute.world import run_world

MIXERS = {"tokens": WHOLE, "layers.*.gate": WHOLE}
COLUMN, ROW = ModuleSplit(split="column", output="features"), ModuleSplit(split="row", input="features")
SLOW = {"base": "dgx-h100", "set": {"device.peak_tflops.bf16": 0.002}}  # so slow that cutting work pays


def emitted(kind: str, gpus: int = 2, **fix: Any) -> tuple[str, Plan]:
    """What the planner answers for a model of own_models.py."""
    workload = {"seq_len": LENGTH, "global_batch": SEQUENCES, "precision": "bf16"}
    return kind, planner.plan(f"{own_models.__file__}:{kind}", SLOW, gpus, workload, fix)


def all_cut(kind: str, gpus: int = 2, **keys: Any) -> tuple[str, Plan]:
    """A plan that cuts everything that can be."""
    lines = module_splits(graph_of(kind), sequence_parallel=keys.get("sp", False))
    layers = 4 if keys.get("pp", 1) > 1 else 2
    return kind, own_plan({"tp": 2, "schedule": "gpipe"} | keys, gpus=gpus, modules=lines, layers=layers)


def staged(kind: str, plan: Plan, *spans: Span) -> tuple[str, Plan]:
    """The plan with other layers in its stages."""
    return kind, replace(plan, stages=tuple(Stage(layers=(span,)) for span in spans)).sealed()


@functools.cache
def graph_of(kind: str) -> Graph:
    return planner.trace(f"{own_models.__file__}:{kind}")


def check(gpus: int, cases: list[tuple[str, Plan]]) -> None:
    for wrong in run_world(gpus, run_cases, cases):
        assert not wrong, "\n".join(wrong)


def test_tensor_parallel() -> None:
    """Fused and grouped heads, heads that stand in the code alone, rotary positions, gates; with parts of the
    sequence between, blocks that run again, several microbatches."""
    cases = [emitted("gpt", tp=2), emitted("llama", tp=2, sp=False)]
    cases += [all_cut("gpt", recompute="full"), all_cut("gpt", sp=True, microbatch=4)]
    cases += [all_cut("llama", microbatch=4), all_cut("llama", sp=True, recompute="full")]
    cases += [emitted("pair", tp=2, sp=True), all_cut("literal")]
    cases += [all_cut("perceptrons"), all_cut("perceptrons", sp=True)]
    lines = {"h.*.attn.query": COLUMN, "h.*.attn.value": COLUMN, "h.*.attn.out": ROW}
    cases += [("shared_shift", own_plan({"tp": 2}, modules=lines))]
    cases += [all_cut("paired"), emitted("encoder", tp=2)]
    assert {line.split for line in cases[-1][1].modules.values()} >= {"column", "row"}
    check(2, cases)


def test_attention_that_is_one_module_is_never_cut() -> None:
    """Nor does it run on a part of the sequence: plan and estimate refuse that, and a plan is without it."""
    _, plan = emitted("encoder", tp=2)
    assert {line.split for path, line in plan.modules.items() if "self_attn" in path} == {"replicate"}
    for refused in (
        lambda: emitted("encoder", tp=2, sp=True),
        lambda: planner.estimate(f"{own_models.__file__}:encoder", SLOW, 2, strategy={"tp": 2, "sp": True}),
    ):
        with pytest.raises(PlannerError, match=r"layers\.0\.self_attn, whose products are not modules"):
            refused()


def test_gradients_are_summed_once_in_half_precision() -> None:
    """What `.float()` gives of a weight is the weight itself in fp32, and another tensor in bf16."""
    lines = dict.fromkeys((f"layers.*.attention.{name}" for name in ("wq", "wk", "wv")), COLUMN)
    lines["layers.*.attention.wo"] = ROW
    for found in run_world(2, slopes, "in_single", own_plan({"tp": 2}, precision="bf16", modules=lines)):
        assert "layers.0.attention.q_norm.weight" in found
        assert found == {path: pytest.approx(1.0, abs=0.2) for path in found}


def test_a_step_sends_what_the_plan_says() -> None:
    kind, plan = emitted("gpt", tp=2, sp=False)
    wanted = sorted((x.phase, x.kind, x.count, x.bytes) for x in plan.collectives if x.axis == "tp")
    assert len(wanted) == 3
    for found in run_world(2, counted_step, kind, plan):
        assert found == wanted


def test_pipeline() -> None:
    """A table at both ends, angles beside the hidden state, microbatches of several sequences."""
    cases = [emitted("gpt", pp=2, vpp=1), emitted("llama", pp=2, schedule="gpipe", microbatch=2)]
    cases += [all_cut("llama", tp=1, pp=2, schedule="1f1b", recompute="full", microbatch=2)]
    _, plan = all_cut("pair", tp=1, pp=2, microbatch=2)
    cases += [staged("pair", plan, Span(0, 3), NOTHING), staged("pair", plan, NOTHING, Span(0, 3))]
    check(2, cases)


def test_four_ranks() -> None:
    """Cut layers in stages, cut layers with sharded state, stages with sharded state."""
    cases = [all_cut("gpt", 4, pp=2, microbatch=2), all_cut("llama", 4, pp=2, sp=True, schedule="1f1b")]
    cases += [all_cut("gpt", 4, zero=3), all_cut("llama", 4, sp=True, zero=3, recompute="full")]
    cases += [staged(*all_cut("pair", 4, tp=1, pp=2, dp=2, zero=1, microbatch=2), Span(0, 3), NOTHING)]
    cases += [all_cut("literal", 4, sp=True, zero=1), emitted("gpt", 4, tp=1, pp=2, zero=3, vpp=1, microbatch=1)]
    check(4, cases)


def test_fewer_heads_of_keys_than_ranks() -> None:
    """Ranks hold copies; heads are expanded and joined, repeated, or read by groups of queries."""
    lines = {f"h.*.attn.{name}": COLUMN for name in ("query", "both")} | {"h.*.attn.out": ROW}
    cases = [("paired_groups", own_plan({"tp": 4}, gpus=4, modules=lines))]
    cases += [emitted("one_head", 4, tp=4), all_cut("one_head", 4, tp=2, dp=2)]
    cases += [emitted("llama", 4, tp=4), all_cut("llama", 4, tp=4, sp=True, microbatch=4, recompute="full")]
    check(4, cases)


def test_what_parts_cannot_do_is_refused() -> None:
    """Before any weight is cut, with the line of the module's code."""
    table = ModuleSplit(split="vocab")
    cases = [
        ("rolling", own_plan({"tp": 2}, modules={"h.*.attn.up": COLUMN, "h.*.attn.down": ROW})),
        ("rounding", own_plan({"tp": 2}, modules={"h.*.attn.up": COLUMN, "h.*.attn.down": ROW})),
        ("borrowing", own_plan({"tp": 2}, modules={"wte": table})),
        ("three_heads", own_plan({"tp": 2}, modules={"h.*.attn.c_attn": COLUMN, "h.*.attn.c_proj": ROW})),
        ("paired_thirds", own_plan({"tp": 2}, modules={"h.*.attn.both": COLUMN, "h.*.attn.out": ROW})),
    ]
    stages = own_plan({"pp": 2, "schedule": "gpipe"}, layers=4)
    cases += [("backward", stages), ("around", stages), ("unlearning", stages)]
    cases += [("perceptrons", own_plan({"pp": 2}, layers=6))]
    rule = "between the splits of a module of one's own runs only what each rank can do with its part: "
    wanted = [
        rule + "roll: not known to be the same on a part of a tensor (own_models.py:",
        rule + "Straight.apply: an autograd function of one's own is given a part (own_models.py:",
        rule + "wte.weight, of which each rank has a part, is read outside of its module (own_models.py:",
        rule + "3 heads are no multiple of tp 2 (own_models.py:",
        rule + "3 heads of each of the 2 that one layer gives are no multiple of tp 2 (own_models.py:",
        "in a pipeline the layers run once each, in the order of their list: 3, 2, 1, 0",
        "in a pipeline a value from in front of the layers is read behind them: ",
        "in a pipeline a weight of both ends takes gradients at both: wte.weight",
        "the 6 layers of the plan are the members of one list of the module: blocks of 4",
    ]
    for found in run_world(2, cut_refusals, cases):
        assert [text[: len(start)] for text, start in zip(found, wanted, strict=True)] == wanted


def test_data_parallel() -> None:
    """Copies and shards, several microbatches, blocks that run again, ties and a buffer."""
    cases = [("mixers", own_plan({"zero": zero}, modules=MIXERS)) for zero in (0, 1, 2, 3)]
    cases += [("perceptron", own_plan({"zero": zero})) for zero in (0, 3)]
    cases += [("mixers", own_plan({"zero": 3, "microbatch": 2}, recompute={"layers.*": "full"}))]
    for wrong in run_world(2, run_cases, cases):
        assert not wrong, "\n".join(wrong)


def test_copies_of_shards() -> None:
    cases = [("mixers", own_plan({"zero": 3, "dp_replicate": 2}, gpus=4))]
    for wrong in run_world(4, run_cases, cases):
        assert not wrong, "\n".join(wrong)


def test_refused() -> None:
    plans = [
        own_plan({"cp": 2}),
        own_plan({"tp": 2}),
        own_plan({"pp": 2, "vpp": 2, "schedule": "interleaved"}, layers=4),
        own_plan({"zero": 1}, modules={"layers.0-5.mlp": ModuleSplit(split="replicate")}),
        own_plan({"zero": 1}, recompute={"layers.2": "selective"}),
    ]
    for found in run_world(2, refusals, plans):
        assert found == [
            "a module of one's own runs with dp, tp and pp, in the schedules gpipe and 1f1b: cp 2",
            "to cut a module of one's own takes an example of what it is called with: none",
            "a module of one's own runs with dp, tp and pp, in the schedules gpipe and 1f1b: vpp 2, "
            "schedule interleaved",
            "each line of the plan names a module of the model: layers.0-5.mlp",
            "of a module of one's own a block is kept, or runs again as a whole: layers.2: selective",
            "each tensor of a batch has global_batch/dp = 4 rows: tokens [8, 12]",
            "without a loss function the module returns its loss, one number: Tensor [1, 12, 50]",
        ]
