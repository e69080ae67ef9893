"""`tp-plan sweep` and `explain` of a plan: solved again at every point, and around it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import planner
from tests.test_cli_plan import SHORT, Run, model, run

__all__ = ["model", "run"]  # fixtures

WORK = {"seq_len": int(SHORT[1]), "global_batch": int(SHORT[3])}
BESIDE = ("--hardware", "dgx-h100", "--gpus", "2", *SHORT, "--fix", "zero=1,cp=1")


@pytest.fixture
def plan(model: str) -> str:
    """The best plan of the small model on two GPUs, a few keys held."""
    planner.plan(model, "dgx-h100", 2, WORK, "zero=1,cp=1").save("plan.yaml")
    return "plan.yaml"


def test_a_plan_at_every_point(plan: str, run: Run) -> None:
    code, out, err = run("sweep", plan, "--vary", "global_batch=16,32", "-o", "sweep.png", "--json")
    assert (code, err) == (0, "wrote sweep.png\n")
    assert Path("sweep.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads(out)["points"]
    alone = [
        planner.plan("small.yaml", "dgx-h100", 2, WORK | {"global_batch": batch}, "zero=1,cp=1")
        for batch in (16, 32)
    ]
    assert [point["step_seconds"] for point in points] == [one.estimate.step_seconds for one in alone]


def test_a_model_says_the_same_as_its_plan(plan: str, run: Run) -> None:
    told = run("sweep", plan, "--vary", "max_memory=0.5x,1x")
    assert told[0] == 0
    assert "max_memory" in told[1]
    assert run("sweep", "small.yaml", *BESIDE, "--vary", "max_memory=0.5x,1x") == told


def test_speed_against_memory(plan: str, run: Run) -> None:
    code, out, _ = run("sweep", plan, "--pareto", "--json")
    points = json.loads(out)["points"]
    assert code == 0
    memory = [point["memory_high_bytes"] for point in points]
    assert memory == sorted(memory, reverse=True)
    assert points[0]["step_seconds"] == planner.load_plan(plan).estimate.step_seconds
    assert min(point["step_seconds"] for point in points) == points[0]["step_seconds"]


def test_nowhere_anything_fits(plan: str, run: Run) -> None:
    code, out, _ = run("sweep", plan, "--vary", "max_memory=0.001,0.002")
    assert code == 1
    assert "Nothing fits" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan.yaml"], "--vary names a parameter"),
        (["plan.yaml", "--vary", "gpus=1", "--pareto"], "give one"),
        (["plan.yaml", "--vary", "gpus"], "key=A:B"),
        (["plan.yaml", "--vary", "seq_lem=1,2"], "did you mean seq_len?"),
        (["plan.yaml", "--vary", "gpus=1", "--gpus", "2"], "a plan says itself"),
        (["plan.yaml", "--vary", "gpus=1", "--fix", "tp=2"], "a plan says itself"),
        (["small.yaml", "--vary", "gpus=1"], "hardware is needed"),
        (["small.yaml", "--vary", "seq_len=1", "--hardware", "dgx-h100", "--gpus", "1..2"], "gpus=1:2"),
        (["plan.yaml", "--vary", "gpus=1", "-o", "out.html"], ".png"),
        (["plan.yaml", "--vary", "gpus=1", "-o", "/nowhere/out.png"], "cannot be written"),
        (["nothing.yaml", "--vary", "gpus=1"], "hardware is needed"),
    ],
)
def test_bad_input(plan: str, run: Run, words: list[str], said: str) -> None:
    code, out, err = run("sweep", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "fix: " in err


def test_explaining_a_plan(plan: str, run: Run) -> None:
    code, out, err = run("explain", plan, "--time-limit", "5")
    assert (code, err) == (0, "")
    assert out.startswith("Best: ")
    assert "what lost" in out
    told = json.loads(run("explain", plan, "--time-limit", "5", "--json")[1])
    assert told["plan"]["model"] == "small.yaml"
    assert told["edited"] is False
    kinds = {finding["kind"] for finding in told["findings"]}
    assert "runner_up" in kinds
    released = [
        finding for finding in told["findings"] if finding["kind"] == "easing" and "zero" in finding["text"]
    ]
    assert released or "untried" in kinds  # the wishes are those of the plan's command


def test_explaining_an_edited_plan(plan: str, run: Run) -> None:
    text = Path(plan).read_text()
    assert text.count("zero: 1") >= 1
    Path(plan).write_text(text.replace("zero: 1", "zero: 3", 1))
    code, out, err = run("explain", plan, "--time-limit", "0")
    assert code == 0
    assert err == "plan.yaml was edited since it was made: estimated again\n"
    assert out.startswith(("Given: ", "Edited: "))


def test_no_time_limit_below_zero(plan: str, run: Run) -> None:
    for limit in ("-1", "nan"):
        code, _, err = run("explain", plan, "--time-limit", limit)
        assert code == 2
        assert "time_limit" in err
