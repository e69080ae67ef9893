"""`tp-plan compare`: plan files side by side, edited ones estimated again, illegal ones refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import planner
from tests.spec.test_measured import RUN
from tests.test_cli_plan import SHORT, Run, model, run
from tests.test_cli_verify import save_plan
from tests.tiny import tiny_spec

__all__ = ["model", "run"]  # fixtures


@pytest.fixture
def plans(model: str) -> list[str]:
    """Two plans of one model: the best, and the best pipeline of two stages."""
    work = {"seq_len": int(SHORT[1]), "global_batch": int(SHORT[3])}
    for name, fix in (("best", {}), ("two", {"pp": 2, "tp": 2, "zero": 1, "schedule": "1f1b"})):
        planner.plan(model, "dgx-h100", 4, work, fix).save(f"{name}.yaml")
    return ["best.yaml", "two.yaml"]


def test_side_by_side(plans: list[str], run: Run) -> None:
    code, out, err = run("compare", *plans)
    assert (code, err) == (0, "")
    assert out.startswith("best.yaml is ")
    assert "proven optimal" in out
    assert max(map(len, out.splitlines())) <= 120


def test_json(plans: list[str], run: Run) -> None:
    told = json.loads(run("compare", *plans, "--json")[1])
    assert [plan["name"] for plan in told["plans"]] == plans
    assert told["best"] == "best.yaml"
    steps = [plan["estimate"]["step_seconds"] for plan in told["plans"]]
    assert steps == [planner.load_plan(path).estimate.step_seconds for path in plans]


@pytest.mark.parametrize(("name", "start"), [("out.html", b"<!doctype html"), ("out.png", b"\x89PNG")])
def test_a_page_or_a_picture(plans: list[str], run: Run, name: str, start: bytes) -> None:
    code, _, err = run("compare", *plans, "-o", name)
    assert (code, err) == (0, f"wrote {name}\n")
    content = Path(name).read_bytes()
    assert content[: len(start)].lower() == start.lower()
    if name.endswith(".html"):
        text = content.decode()
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text
        assert "best.yaml" in text


def test_an_edited_plan_is_estimated_again(plans: list[str], run: Run) -> None:
    """A layer moved over the border takes its weights along."""
    text = Path("two.yaml").read_text()
    before = [stage.weights_bytes for stage in planner.load_plan("two.yaml").estimate.memory_per_stage]
    moved = text.replace("layers: [0-2]", "layers: [0-1]").replace("layers: [3]", "layers: [2-3]")
    assert moved != text
    Path("two.yaml").write_text(moved)
    code, out, err = run("compare", *plans, "--json")
    assert code == 0
    assert err == "two.yaml was edited since it was made: estimated again\n"
    after = [stage["weights_bytes"] for stage in json.loads(out)["plans"][1]["estimate"]["memory_per_stage"]]
    assert sum(after) == sum(before)
    assert after[0] < before[0]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("tp: 2, pp: 2", "tp: 3, pp: 2", "gpus"),
        ("[0-2]", "[1-2]", "stages"),
        ("split: vocab", "split: vocap", "modules"),
    ],
)
def test_an_illegal_edit_is_refused_with_file_and_line(
    plans: list[str], run: Run, old: str, new: str, key: str
) -> None:
    text = Path("two.yaml").read_text()
    assert old in text, text
    line = text[: text.index(old)].count("\n") + 1
    Path("two.yaml").write_text(text.replace(old, new, 1))
    code, out, err = run("compare", *plans, "-o", "out.html")
    assert (code, out) == (2, "")
    assert key in err
    assert "two.yaml:" in err
    if key != "gpus":
        assert f"two.yaml:{line})" in err
    assert not Path("out.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["best.yaml", "-o", "out.pdf"], ".html or .png"),
        (["best.yaml", "-o", "/nowhere/out.html"], "cannot be written"),
        (["nothing.yaml"], "cannot be read"),
        (["small.yaml"], "plans of version 1"),
        ([], "Missing argument"),
    ],
)
def test_bad_input(plans: list[str], run: Run, words: list[str], said: str) -> None:
    code, out, err = run("compare", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "fix: " in err


def test_a_run_refines_the_profile_of_the_plan_beside_it(model: str, run: Run) -> None:
    Path("best.json").write_text("no plan")
    Path("a-torn-one.yaml").write_text("version: 1\nmodel: small.yaml\ngpus: {")
    save_plan("two.yaml", tiny_spec("llama", layers=4, max_positions=512), model, {"tp": 2, "microbatch": 4})
    plan = planner.load_plan("two.yaml")
    step = 100.0 * plan.estimate.step_seconds
    measured = dataclasses.replace(
        RUN, layout=plan.layout_digest, workload=plan.workload, each_seconds=(step,), settling_steps=0
    )
    measured.save("measured.json")
    code, out, err = run("profile", "--from", "measured.json", "-o", "mine.yaml")
    assert (code, out) == (0, ""), err
    slower = json.loads(run("compare", "two.yaml", "measured.json", "--json")[1])["ratio"] - 1
    assert f"the error of a step goes from {100 * slower:.1f} % to " in err
    assert "the steps differ by more than launch costs" in err
    assert planner.load_hardware("mine.yaml").software["eager"].kernel_us > 0
    code, out, err = run("profile", "--from", "measured.json", "--quick", "--nproc", "2")
    assert (code, out) == (2, "")
    assert "leave --nproc, --quick out" in err
