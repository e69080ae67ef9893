"""`tp-plan run` as a user meets it: it trains, tells, keeps, goes on elsewhere, and names who ended it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import planner
from planner.api.measuring import compare_run
from planner.errors import PlannerError
from planner.spec.measured import load_measured
from tests.execute import own_models
from tests.execute.training import plan_for
from tests.tiny import tiny_spec

SPEC = tiny_spec("llama", layers=2, vocab=99)

# Python runs a module of this name when it starts: here in the one rank that shall fail
_BEFORE = """
import os
if os.environ.get("RANK") == "1":
    import signal, time
    from planner.models.block import Block
    forward, calls = Block.forward, []
    def failing(self, *args):
        calls.append(self)
        if len(calls) == 6:
            {action}
        return forward(self, *args)
    Block.forward = failing
"""


def started(folder: Path, *arguments: str, plan: str = "plan.yaml", action: str = "") -> subprocess.Popen[str]:
    """tp-plan run on a plan of a folder, with fp64 weights."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if action:
        (folder / "sitecustomize.py").write_text(_BEFORE.format(action=action))
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "planner", "run", str(folder / plan), *arguments, "--dtype", "fp64"]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def save_plan(path: Path, **keys: Any) -> None:
    plan_for(SPEC, 4, gpus=2, **keys).save(path)


def test_a_killed_run_goes_on_under_another_plan(tmp_path: Path) -> None:
    save_plan(tmp_path / "plan.yaml", tp=2, sp=True, microbatch=4)  # two calls of a block in each step
    code, out, told = ended(started(tmp_path, "--steps", "6", "--log", str(tmp_path / "whole.jsonl")))
    assert code == 0, told
    assert "predicted" in out
    assert "gloo" in told
    whole = losses(tmp_path / "whole.jsonl")
    measured = load_measured(tmp_path / "measured.json")
    assert len(measured.each_seconds) == len(whole) == 6
    assert [entry.rank for entry in measured.memory] == [0, 1]
    assert (measured.first_loss, measured.last_loss) == (whole[0], whole[-1])

    log, folder = tmp_path / "log.jsonl", tmp_path / "checkpoints"
    flags = ("--steps", "6", "--log", str(log), "--checkpoint", str(folder), "--every", "1", "--keep", "9")
    code, _, told = ended(started(tmp_path, *flags, "--resume", action="os.kill(os.getpid(), signal.SIGKILL)"))
    assert code == 1
    assert "rank 1 (stage 0)" in told
    assert "signal 9" in told
    assert "no checkpoint yet: starting at step 1" in told
    assert "blocks." in told
    assert "Traceback" not in told
    done = int((folder / "latest").read_text().split("-")[1])
    assert done in (1, 2)  # it died in the third step, perhaps before the second was written

    save_plan(tmp_path / "pipeline.yaml", pp=2)
    (tmp_path / "sitecustomize.py").unlink()
    code, _, told = ended(started(tmp_path, *flags, "--resume", plan="pipeline.yaml"))
    assert code == 0, told
    assert f"resumed after step {done}" in told
    assert losses(log) == pytest.approx(whole, rel=1e-9, abs=0)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("raise ValueError('boom')", ["rank 1 (stage 1), step 3, forward, blocks.1", "ValueError: boom"]),
        ("raise MemoryError('out of memory')", ["ran out of memory", "rank 1 (stage 1)", "blocks.1"]),
        ("time.sleep(1000)", ["rank 1 (stage 1)", "sitecustomize.py"]),
    ],
    ids=["raises", "memory", "hangs"],
)
def test_a_failing_rank_is_named(tmp_path: Path, action: str, said: list[str]) -> None:
    save_plan(tmp_path / "plan.yaml", pp=2, microbatch=2)
    code, out, told = ended(started(tmp_path, "--steps", "9", "--timeout", "20", action=action))
    assert (code, out) == (1, ""), told
    for words in said:
        assert words in told, told
    assert "Traceback" not in told


def test_sigterm_keeps_a_checkpoint_and_ends_the_run(tmp_path: Path) -> None:
    save_plan(tmp_path / "plan.yaml", zero=1)
    log = tmp_path / "log.jsonl"
    run = started(tmp_path, "--steps", "100000", "--log", str(log), "--checkpoint", str(tmp_path / "kept"))
    while not (log.is_file() and log.read_text().count("\n") > 2):
        assert run.poll() is None, ended(run)[2]
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    code, _, told = ended(run)
    assert code == 143
    assert "Traceback" not in told
    assert "torch/" not in told  # the agent logs nothing
    step = int((tmp_path / "kept" / "latest").read_text().split("-")[1])
    assert step == len(losses(log))
    assert f"go on after step {step} with --checkpoint {tmp_path / 'kept'} --resume" in told


def test_a_users_own_module_runs_while_it_is_what_was_planned(tmp_path: Path) -> None:
    file, path = tmp_path / "model.py", tmp_path / "plan.yaml"
    shutil.copy(own_models.__file__, file)
    workload = {"seq_len": 8, "global_batch": 4, "precision": "fp32"}
    planner.plan(f"{file}:llama", "dgx-h100", 2, workload, {"pp": 2, "vpp": 1}).save(path)
    code, out, told = ended(started(tmp_path, "--steps", "3", "--device", "cpu"))
    assert code == 0, told
    assert "model.py:llama on 2 ×" in told
    assert "memory of stage 1" in out
    assert compare_run(path, tmp_path / "measured.json").measured_seconds > 0
    written = file.read_text()
    for text, rule in (
        (written.replace("F.silu(gate)", "F.gelu(gate)"), "made for this model with other content"),
        (written.replace("def llama", "def alpaca"), "names a function of the file"),
    ):
        file.write_text(text)
        with pytest.raises(PlannerError, match=rule) as caught:
            planner.run(path)
        assert caught.value.exit_code == 2
    file.unlink()
    with pytest.raises(PlannerError, match="the file or folder does not exist"):
        planner.run(path)


def test_bad_input_is_told_before_any_rank_starts(tmp_path: Path) -> None:
    save_plan(tmp_path / "plan.yaml", tp=2)
    (tmp_path / "odd.bin").write_bytes(b"\0\0\0")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").touch()
    code, out, told = ended(started(tmp_path, "--nproc", "3"))
    assert (code, out) == (2, "")
    assert "the plan is for 2 ranks" in told
    assert "Traceback" not in told
    for flags, words in (
        ({"data": str(tmp_path / "none.bin")}, "the data exists"),
        ({"data": str(tmp_path / "odd.bin")}, "multiple of 2 bytes"),
        ({"checkpoint": str(tmp_path / "file" / "folder")}, "checkpoints can be written"),
        ({"log": str(tmp_path / "none" / "log.jsonl")}, "the file can be written"),
        ({"log": str(tmp_path)}, "the file can be written"),
        ({"measured": "/dev/null"}, "the file can be written"),
        ({"measured": str(tmp_path / "plan.yaml")}, "plan.yaml, which is the plan as well"),
        ({"log": str(tmp_path / "measured.json")}, "measured.json, which is the log as well"),
        ({"data": str(tmp_path / "odd.bin"), "log": str(tmp_path / "odd.bin")}, "which is the data as well"),
        ({"beta2": 1.0}, "beta2 is below 1"),
        ({"export": str(tmp_path / "full")}, "an export makes a folder of its own"),
        ({"export": str(tmp_path / "file" / "export")}, "the folder can be made"),
        ({"nproc": -1}, "-1 ranks\n  fix: start 2"),
        ({"weights": str(tmp_path)}, "config.json"),
        ({"resume": True}, "resumes from a folder"),
        ({"steps": 0}, "at least 1"),
    ):
        with pytest.raises(PlannerError) as caught:
            planner.run(tmp_path / "plan.yaml", **flags)
        assert words in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    plan = plan_for(SPEC, 4, gpus=2)
    dataclasses.replace(plan, model_spec=tiny_spec("gpt")).save(tmp_path / "plan.yaml")
    with pytest.raises(PlannerError, match="made for this model with other content"):
        planner.run(tmp_path / "plan.yaml")
