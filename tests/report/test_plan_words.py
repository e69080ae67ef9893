"""The words of a plan, one by one."""

from __future__ import annotations

from planner.report.plan_words import (
    interval_text,
    layers_text,
    proof_text,
    ratio_text,
    recompute_by_stage,
    recompute_text,
    split_text,
)
from planner.spec.estimate import Interval
from planner.spec.plan import ModuleSplit
from tests.report.plans import made_up_plan, proof


def test_intervals_are_even_or_not() -> None:
    assert interval_text(Interval(low=1.8, high=2.2), 2.0) == "±10 %"
    assert interval_text(Interval(low=1.9, high=2.5), 2.0) == "−5 to +25 %"
    assert interval_text(Interval(low=0.0, high=0.0), 0.0) == "±0 %"


def test_ratios() -> None:
    assert [ratio_text(ratio) for ratio in (1.0, 1.184, 9.99, 9.996, 1234.5)] == [
        "1.00x", "1.18x", "9.99x", "10x", "1,234x",
    ]  # fmt: skip


def test_proofs() -> None:
    assert proof_text(made_up_plan()) == "given, not searched"
    assert proof_text(made_up_plan(certificate=proof())) == "proven optimal"
    assert proof_text(made_up_plan(certificate=proof(2.0, bound=1.95))) == "gap at most 2.5 %"


def test_layers_of_all_virtual_stages() -> None:
    assert layers_text(made_up_plan()) == "8"
    assert layers_text(made_up_plan(strategy={"pp": 2, "vpp": 2})) == "2 × 4"


def test_recompute_by_pattern_and_by_stage() -> None:
    plan = made_up_plan(strategy={"pp": 4}, recompute={"blocks.0-7": "selective", "blocks.1": "full"})
    assert recompute_text(plan) == "selective: blocks.0-7; full: blocks.1"
    assert recompute_by_stage(plan) == [
        ("stage 0", "1 of 2 layers full, 1 selective"), ("stages 1-3", "all 2 layers selective"),
    ]  # fmt: skip
    partly = made_up_plan(strategy={"pp": 4}, recompute={"blocks.0-2": "full"})
    assert recompute_by_stage(partly) == [
        ("stage 0", "all 2 layers full"), ("stage 1", "1 of 2 layers full"), ("stages 2-3", "none"),
    ]  # fmt: skip
    single = made_up_plan(strategy={"pp": 8}, recompute={"blocks.7": "full"})
    assert recompute_by_stage(single) == [("stages 0-6", "none"), ("stage 7", "its layer full")]


def test_blocks_that_are_not_numbered_as_layers_are_not_counted() -> None:
    both = {"encoder.blocks.0-3": "full", "decoder.blocks.0-3": "full"}
    assert recompute_by_stage(made_up_plan(recompute=both)) == []
    assert recompute_by_stage(made_up_plan(recompute={"body": "full"})) == []
    assert recompute_by_stage(made_up_plan()) == []


def test_splits() -> None:
    assert split_text(ModuleSplit(split="row", input="features")) == "row, features → replicate"
    assert split_text(None) == "–"
