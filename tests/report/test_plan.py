"""A plan on the screen: the verdict and its proof first, splits and recompute told, and why nothing else won."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import planner
from planner.report.plan import explain_plan, show_plan
from planner.spec.findings import Finding
from planner.spec.plan import ModuleSplit, Plan, RunnerUp
from planner.spec.strategy import Strategy
from planner.units import GIB
from tests.report.plans import MODULES, made_up_plan, proof
from tests.report.test_estimate import Screen

PROFILE = planner.load_hardware("dgx-h100")
RUNNERS = (
    RunnerUp(strategy=Strategy(tp=8), objective=2.6, memory_bytes=50 * GIB, reason="its tp crosses nodes"),
    RunnerUp(strategy=Strategy(tp=2, pp=4), objective=2.36, memory_bytes=30 * GIB, reason="a longer bubble"),
)
PLAN = made_up_plan(
    {"matmul": 1.5, "tp": 0.5}, strategy={"tp": 4, "pp": 2, "sp": True}, modules=MODULES, certificate=proof(),
    runners_up=RUNNERS, recompute={"blocks.0-7": "selective", "blocks.0-1": "full"},
)  # fmt: skip
FOUND = (
    Finding(kind="binding", text="memory of stage 0", before=76 * GIB, after=80 * GIB, unit="bytes"),
    Finding(kind="easing", text="4 GiB more memory", before=2.0, after=1.88, strategy=Strategy(tp=2, pp=4)),
    Finding(kind="easing", text="microbatches of 2", before=2.0, after=2.0),
    Finding(kind="flip", text="inter-node bandwidth × 2.1", key="inter_node_bandwidth", before=1.9, after=1.8,
            strategy=Strategy(tp=8)),
)  # fmt: skip


def screen(monkeypatch: pytest.MonkeyPatch, show: Callable[[], None], width: int = 100) -> str:
    stream = Screen()
    with monkeypatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys, "stdout", stream)
        show()
    return stream.getvalue()


def shown(plan: Plan, monkeypatch: pytest.MonkeyPatch, width: int = 100, **more: Any) -> str:
    return screen(monkeypatch, lambda: show_plan(plan, PROFILE, **more), width)


def explained(plan: Plan, monkeypatch: pytest.MonkeyPatch, *findings: Finding, width: int = 100) -> str:
    return screen(monkeypatch, lambda: explain_plan(plan, findings), width)


def test_the_verdict_and_the_proof_stand_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(PLAN, monkeypatch, 120).splitlines()
    assert lines[0] == (
        "Best: tp4 pp2 sp, 1f1b, microbatch 1      2.00 s/step ±10 %   500 tokens/s/GPU   MFU 40.0 %"
    )
    assert " ".join(line.strip() for line in lines[1:3]) == (
        "1.18x faster than tp2 pp4; proven optimal over 214 layouts (61 illegal: 58 memory, 3 divisibility; 120 "
        "bounded away, 33 solved) by HiGHS"
    )
    narrow = shown(PLAN, monkeypatch, 60).splitlines()
    assert narrow[:2] == [
        "Best: tp4 pp2 sp, 1f1b, microbatch 1",
        "  2.00 s/step ±10 %   500 tokens/s/GPU   MFU 40.0 %",
    ]


def test_a_gap_is_not_called_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(replace(PLAN, certificate=proof(2.0, bound=1.9, solved=20)), monkeypatch, 120)
    assert text.startswith("Best found: ")
    assert "at most 5 % from the best over 214 layouts" in text
    assert "13 not looked at" in text
    assert "proven" not in text


def test_plans_that_were_given_or_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    given = shown(replace(PLAN, certificate=None), monkeypatch)
    assert given.startswith("Given: ")
    assert "nothing proves it the best" in given
    edited = shown(replace(PLAN, recompute={}), monkeypatch)
    assert edited.startswith("Edited: ")
    assert "figures are those from before" in edited


def test_a_plan_that_does_not_fit_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(made_up_plan(gib=100.0), monkeypatch)
    assert text.startswith("Does not fit: ")
    assert "takes up to 110.0 GiB of a GPU, 30.0 GiB too much" in text


@pytest.mark.parametrize(
    ("minimize", "word", "better"),
    [("gpus", "Fewest GPUs", "fewer GPUs"), ("cost_per_token", "Cheapest", "cheaper")],
)
def test_other_objectives_have_their_words(
    minimize: Any, word: str, better: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(replace(PLAN, certificate=proof(2.0, minimize=minimize)), monkeypatch)
    assert text.startswith(f"{word}: ")
    assert f"1.18x {better} than tp2 pp4" in text


def test_the_runner_up_may_be_as_good_or_bear_the_same_label(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = RunnerUp(strategy=replace(PLAN.strategy, microbatch=2), objective=2.001, memory_bytes=1.0, reason="x")
    text = shown(replace(PLAN, runners_up=(twin,)), monkeypatch)
    assert "as good as the same with --microbatch 2 within 0.5 %" in text


def test_time_and_memory_are_those_of_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(PLAN, monkeypatch).splitlines()
    row = next(line.split() for line in lines if line.startswith("matrix products"))
    assert (row[2], row[4], row[-1]) == ("1.500", "75", PROFILE.gemm_for("bf16").source)
    assert any(line.split()[:3] == ["stage", "0", "40.0"] for line in lines)
    assert any(line.split()[:3] == ["stage", "1", "20.0"] for line in lines)


def test_layers_and_recompute_where_stages_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(PLAN, monkeypatch)
    assert "\nLayers by stage: 2 × 4\n" in text
    assert "\nRecompute: stage 0: 2 of 4 layers full, 2 selective; stage 1: all 4 layers selective\n" in text
    alike = shown(made_up_plan(strategy={"pp": 2}, recompute={"blocks.0-7": "full"}), monkeypatch)
    assert "\nRecompute: all 4 layers full on each stage\n" in alike
    assert "\nRecompute: none\n" in shown(made_up_plan(), monkeypatch)


def test_every_pattern_of_modules_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.split() for line in shown(PLAN, monkeypatch).splitlines()]
    for pattern, cut in MODULES.items():
        assert [pattern, cut.split, cut.input, cut.output] in lines
    many = {f"part{number}": ModuleSplit(split="row") for number in range(30)}
    text = shown(made_up_plan(strategy={"tp": 2}, modules=many), monkeypatch, path="my plan.yaml")
    assert "and 6 patterns more in my plan.yaml" in text
    assert "tp-plan explain 'my plan.yaml'" in text
    assert "modules" not in shown(made_up_plan(modules=MODULES), monkeypatch), "tp 1 cuts nothing"


def test_what_to_do_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(PLAN, monkeypatch).endswith(
        "\nNext: tp-plan explain plan.yaml\n      tp-plan compare plan.yaml OTHER.yaml -o compare.html\n"
    )
    assert explained(PLAN, monkeypatch, *FOUND).endswith(
        "\nNext: tp-plan sweep plan.yaml --vary inter_node_bandwidth=0.25x:4x\n"
    )


def test_what_lost_and_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = explained(PLAN, monkeypatch).splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("what lost"))
    rows = [" ".join(line.split()) for line in lines[head + 2 : head + 4]]
    assert rows == [
        "tp2 pp4 2.36 s/step 18.0 % 30.0 a longer bubble",
        "tp8 2.60 s/step 30.0 % 50.0 its tp crosses nodes",
    ]
    found = Finding(kind="runner_up", text="solved again", before=2.0, after=2.2, strategy=Strategy(dp=8))
    text = explained(PLAN, monkeypatch, found)
    assert "solved again" in text
    assert "a longer bubble" not in text, "findings say more than the file"


def test_limits_easing_and_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    text = explained(PLAN, monkeypatch, *FOUND)
    assert "\nWhat binds\n- memory of stage 0: 76.0 GiB of 80.0 GiB\n" in text
    assert "\nWhat easing buys\n- 4 GiB more memory: 6.0 % saved, tp2 pp4, 1.88 s/step\n" in text
    assert "\n- microbatches of 2: nothing saved\n" in text
    flip = (
        "\nWhat flips the choice\n- inter-node bandwidth × 2.1: then tp8, 1.80 s/step, and this plan 1.90 s/step\n"
    )
    assert flip in text


def test_amounts_follow_what_is_minimised(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = Finding(kind="easing", text="a minute more", before=64.0, after=32.0)
    text = explained(replace(PLAN, certificate=proof(64.0, minimize="gpus")), monkeypatch, fewer)
    assert "a minute more: 50.0 % saved, 32 GPUs" in text
    cheap = Finding(kind="easing", text="spot prices", before=4e-6, after=1e-6)
    text = explained(replace(PLAN, certificate=proof(4e-6, minimize="cost_per_token")), monkeypatch, cheap)
    assert "spot prices: 75.0 % saved, 1 a million tokens" in text


def test_nothing_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    text = explained(made_up_plan(), monkeypatch)
    assert "Nothing was searched around this plan" in text
    assert "What" not in text


EXTREMES = {
    "plain": made_up_plan(),
    "long names": made_up_plan(model="x" * 200, strategy={"tp": 2}, modules={"y" * 30: ModuleSplit(split="row")}),
    "64 stages": made_up_plan(strategy={"pp": 64}, gpus=64, layers=128, certificate=proof(), runners_up=RUNNERS),
    "a label of everything": made_up_plan(
        strategy={"tp": 2, "pp": 2, "cp": 2, "vpp": 2, "dp_replicate": 2, "ep": 4, "zero": 3, "sp": True}, gpus=32,
        certificate=proof(), runners_up=RUNNERS,
    ),
    "recompute by name": made_up_plan(recompute={"encoder.blocks.0-3": "full", "decoder.blocks.0-3": "selective"}),
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", EXTREMES)
def test_nothing_breaks_the_layout(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = EXTREMES[name]
    for text in (shown(plan, monkeypatch, width), explained(plan, monkeypatch, *FOUND, width=width)):
        lines = text[: text.index("\nNext: ")].splitlines()
        assert max(map(len, lines)) <= width
        assert "\x1b" not in text


def test_colour_only_where_a_person_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_plan(PLAN, PROFILE)
    explain_plan(PLAN, FOUND)
    assert "\x1b" not in capsys.readouterr().out
    stream = Screen()
    with monkeypatch.context() as patch:
        patch.delenv("NO_COLOR", raising=False)
        patch.setenv("TERM", "xterm-256color")
        patch.setattr(sys, "stdout", stream)
        show_plan(PLAN, PROFILE)
    assert "\x1b[1;32m" in stream.getvalue()
