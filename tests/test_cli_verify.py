"""`tp-plan verify`: text, JSON and exit codes for plans that hold, that were edited, and that cannot be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import planner
from planner.search.plans import plan_of
from planner.spec.huggingface_config import config_from_spec
from planner.spec.model import ModelSpec
from planner.spec.plan import content_digest
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload
from planner.spec.yaml_text import dump_yaml
from tests.search.arrangements import arranged
from tests.test_cli_plan import Run, model, run
from tests.tiny import tiny_spec

__all__ = ["model", "run"]  # fixtures


def save_plan(path: str, spec: ModelSpec, model: str, keys: dict[str, Any]) -> None:
    """The plan of a layout that nothing was searched for."""
    graph, profile = planner.trace(spec), planner.load_hardware("dgx-h100")
    strategy = Strategy.from_dict(keys)
    made = plan_of(
        model=model,
        hardware="dgx-h100",
        graph=graph,
        profile=profile,
        workload=TrainWorkload(seq_len=64, global_batch=8, precision="bf16"),
        arrangement=arranged(graph, keys),
        command=f"tp-plan plan {model} --hardware dgx-h100 --gpus {strategy.gpus}",
        model_digest=content_digest(spec),
        hardware_digest=content_digest(profile),
    )
    made.save(path)


@pytest.fixture
def plan(model: str) -> str:
    """Two stages of a layer, and two ranks of each that cut every weight."""
    spec = tiny_spec("llama", layers=2)
    Path(model).write_text(dump_yaml(spec.to_dict()))
    save_plan("plan.yaml", spec, model, {"tp": 2, "pp": 2, "sp": True, "microbatch": 4})
    return "plan.yaml"


def test_a_plan_holds_and_so_does_what_a_person_made_of_it(plan: str, run: Run) -> None:
    code, out, _ = run("verify", plan)
    assert code == 0, out
    assert out.startswith("The executor does what the plan says")
    assert "differs" not in out
    assert max(map(len, out.splitlines())) <= 120
    text = Path(plan).read_text()
    assert text.count("microbatch: 4") == 1
    Path(plan).write_text(text.replace("microbatch: 4", "microbatch: 2"))
    code, out, _ = run("verify", plan, "--json")
    assert code == 0, out
    told = json.loads(out)
    assert told["agrees"]
    assert told["microbatches"] == 4
    assert [stage["layers"] for stage in told["stages"]] == [[0], [1]]


def test_a_plan_that_promises_something_else(plan: str, run: Run) -> None:
    text = Path(plan).read_text()
    (line, *_) = [line for line in text.splitlines() if "axis: tp" in line and "count: " in line]
    count = line.split("count: ")[1].split(",")[0]
    Path(plan).write_text(text.replace(line, line.replace(f"count: {count},", f"count: {int(count) + 1},"), 1))
    code, out, _ = run("verify", plan)
    assert code == 1
    assert out.startswith("Differs: stage 0: tp ")
    assert f"the plan lists {int(count) + 1} of" in out.replace("\n", " ")
    assert "← differs" in out


def test_what_cannot_be_run(model: str, run: Run) -> None:
    bert = tiny_spec("bert")
    Path("bert-spec.yaml").write_text(dump_yaml(bert.to_dict()))
    save_plan("bert.yaml", bert, "bert-spec.yaml", {"dp": 2})
    code, out, err = run("verify", "bert.yaml")
    assert (code, out) == (2, "")
    assert "the executor runs decoders" in err
    assert "fix: " in err
    code, out, err = run("verify", "nothing.yaml")
    assert (code, out) == (2, "")
    assert "cannot be read" in err


def test_processes_are_counted_before_anything_runs(plan: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.execute.verify.verify_layout", lambda *_, **__: pytest.fail("a dry run"))
    for nproc in ("0", "-1"):
        code, out, err = run("verify", plan, "--numerics", "--nproc", nproc)
        assert (code, out) == (2, "")
        assert "error[nproc]: numerics take a process" in err


def test_the_module_of_the_library(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for a config.json; the plan names modules as the bundled model does, the library in its own way."""
    pytest.importorskip("transformers", minversion="5.0")
    monkeypatch.chdir(tmp_path)
    spec = tiny_spec("gpt", layers=2)
    Path("tiny-gpt2").mkdir()
    Path("tiny-gpt2/config.json").write_text(json.dumps(config_from_spec(spec, "gpt2")))
    read = planner.load_model("tiny-gpt2")
    save_plan("gpt2.yaml", read, "tiny-gpt2", {"tp": 2, "pp": 2, "sp": True})
    for flags in ((), ("--transformers",)):
        code, out, err = run("verify", "gpt2.yaml", *flags, "--json")
        assert code == 0, out + err
        told = json.loads(out)
        (message,) = [item for item in told["stages"][0]["collectives"] if item["kind"] == "p2p"]
        assert message["found_count"] == 8
        assert message["found_bytes"] == 8 * 2 * 32 * spec.hidden
    lines = Path("tiny-gpt2/config.json").read_text().replace('"gpt2"', '"bloom"')
    Path("tiny-gpt2/config.json").write_text(lines)
    code, out, err = run("verify", "gpt2.yaml", "--transformers")
    assert (code, out) == (2, "")
