"""The table of differences: what differs, what is the same, and which plan does best in a row."""

from __future__ import annotations

from dataclasses import replace

from planner.report.compare_table import Fact, common_text, facts
from planner.report.compare_verdict import side_by_side
from planner.spec.plan import ModuleSplit, Plan
from tests.report.plans import MODULES, made_up_plan, proof

FIRST = made_up_plan(
    {"matmul": 8.0, "tp": 1.0}, strategy={"tp": 4, "sp": True}, modules=MODULES, certificate=proof(9.0)
)
SECOND = made_up_plan(
    {"matmul": 8.0, "bubble": 4.0},
    gib=30.0,
    strategy={"tp": 2, "pp": 4, "recompute": "selective"},
    modules=MODULES | {"blocks.3.attention.output": ModuleSplit(split="replicate")},
    recompute={"blocks.0-7": "selective", "blocks.0-1": "full"},
)


def table(*plans: Plan) -> dict[str, Fact]:
    return {fact.name: fact for fact in facts(side_by_side(plans))}


def test_layouts_are_compared_key_by_key() -> None:
    found = table(FIRST, SECOND)
    assert found["tp"].cells == ("4", "2")
    assert found["pp"].cells == ("1", "4")
    assert found["sequence parallel"].cells == ("on", "off")
    assert found["microbatches"].cells == ("16", "32")
    assert found["layers by stage"].cells == ("8", "4 × 2")
    assert found["recompute"].cells == ("none", "selective: blocks.0-7; full: blocks.0-1")
    assert "cp" not in found, "nobody uses it"


def test_only_splits_that_differ_have_a_row() -> None:
    found = table(FIRST, SECOND)
    assert [fact.name for fact in found.values() if fact.group == "splits"] == ["blocks.3.attention.output"]
    assert found["blocks.3.attention.output"].cells == (
        "row, features → sequence", "replicate, replicate → replicate",
    )  # fmt: skip


def test_many_splits_are_folded_and_cut_short() -> None:
    many = {f"blocks.{n}.attention.query": ModuleSplit(split="replicate") for n in range(8)}
    found = table(FIRST, made_up_plan(strategy={"tp": 4}, modules=MODULES | many))
    assert [fact.name for fact in found.values() if fact.group == "splits"] == ["blocks.0-7.attention.query"]
    names = {f"part{n}.x{n}": ModuleSplit(split="row") for n in range(20)}
    found = table(FIRST, made_up_plan(strategy={"tp": 4}, modules=MODULES | names))
    assert "and 8 patterns more" in found


def test_the_best_of_a_row_fits_and_does_the_same_work() -> None:
    assert table(FIRST, SECOND)["step, s"].best == (0,)
    assert table(FIRST, SECOND)["memory, GiB"].best == (1,)
    assert table(FIRST, FIRST)["step, s"].best == ()
    huge = made_up_plan({"matmul": 1.0}, gib=100.0)
    assert table(FIRST, SECOND, huge)["step, s"].best == (0,)
    assert table(FIRST, made_up_plan({"matmul": 1.0}, model="other"))["step, s"].best == ()


def test_results_and_proof() -> None:
    found = table(FIRST, SECOND, made_up_plan(gib=100.0, certificate=proof(2.0, bound=1.9)))
    assert found["step, s"].cells == ("9.0", "12.0", "2.0")
    assert found["bubble, s"].cells == ("0.00", "4.00", "0.00")
    assert found["its interval"].cells == ("±10 %",) * 3
    assert found["fits"].cells == ("yes", "yes", "no, 30.0 GiB")
    assert found["proof"].cells == ("proven optimal", "given, not searched", "gap at most 5 %")
    assert found["candidates"].cells == ("214", "–", "214")
    assert found["fullest stage"].cells == ("–", "0", "–")


def test_what_is_the_same_is_said_once() -> None:
    found = facts(side_by_side([FIRST, SECOND]))
    assert common_text(found).startswith("model m, hardware dgx-h100, GPUs 8, seq len 1,024, global batch 32")
    assert "tp" not in common_text(found).split(", ")
    other = replace(FIRST, command="by hand")
    assert "tp 4" in common_text(facts(side_by_side([FIRST, other])))
