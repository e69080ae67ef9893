"""The folder of checkpoints: room, leftovers, other runs, and a log that goes on with its run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.execute.checkpoint_folder import Facts, latest, require_resumable, require_room
from planner.execute.metrics import Log, StepMetrics
from planner.spec.codec import encode

FACTS = Facts(model="m", layout="l", optimizer="adamw", step=7, sequences=56, seed=1)


def keep(folder: Path, facts: Facts) -> None:
    (folder / "step-00000007").mkdir(parents=True)
    (folder / "step-00000007" / "run.json").write_text(json.dumps(encode(facts)))
    (folder / "latest").write_text("step-00000007\n")


def test_what_was_cut_short_goes_and_the_whole_one_stays(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    keep(tmp_path, FACTS)
    (tmp_path / "step-00000008.part").mkdir()
    require_room(tmp_path, 1.0, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000007"]
    assert latest(tmp_path) == FACTS


def test_a_folder_that_will_not_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(tmp_path / "other", FACTS)
    with pytest.raises(PlannerError, match="another run"):
        require_room(tmp_path / "other", 1.0, resume=False)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PlannerError, match=r"a checkpoint takes 1.95 KiB"):
        require_room(tmp_path / "new", 2000.0, resume=False)


@pytest.mark.parametrize(("key", "value"), [("model", "n"), ("optimizer", "sgd"), ("seed", 2)])
def test_a_run_goes_on_as_it_began(key: str, value: object) -> None:
    given = {"model": "m", "optimizer": "adamw", "seed": 1}
    require_resumable(FACTS, **given)
    with pytest.raises(PlannerError, match=f"goes on with the {key}"):
        require_resumable(FACTS, **given | {key: value})


def test_the_log_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    def write(first: int, steps: range) -> None:
        log = Log(tmp_path / "log.jsonl", first)
        for step in steps:
            log.step(StepMetrics(step=step, loss=1.0 * first, learning_rate=1.0, gradient_norm=None, seconds=1.0,
                                 tokens_per_second=1.0, mfu=None, predicted_seconds=None, allocated_bytes=1.0,
                                 reserved_bytes=1.0))  # fmt: skip

    write(0, range(1, 6))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by the kill
    write(3, range(4, 8))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert [line["loss"] for line in lines] == [0.0] * 3 + [3.0] * 4
    write(0, range(1, 3))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
