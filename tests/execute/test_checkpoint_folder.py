"""The folder of checkpoints: room, leftovers, other runs, and a log that goes on with its run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.execute.checkpoint_folder import (
    Facts,
    claim,
    latest,
    require_resumable,
    require_room,
    require_whole,
)
from planner.execute.metrics import Log, StepMetrics
from planner.spec.codec import encode

FACTS = Facts(
    model="m",
    layout="l",
    optimizer="adamw",
    step=7,
    sequences=56,
    seed=1,
    files={"__0_0.distcp": 5, ".metadata": 3},
    sums={".metadata": zlib.crc32(b"111")},
)


def keep(folder: Path, facts: Facts) -> Path:
    path = folder / f"step-{facts.step:08d}"
    path.mkdir(parents=True)
    for name, size in facts.files.items():
        (path / name).write_bytes(b"1" * size)
    (path / "run.json").write_text(json.dumps(encode(facts)))
    (folder / "latest").write_text(f"{path.name}\n")
    return path


def test_what_was_cut_short_goes_and_the_whole_one_stays(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    keep(tmp_path, FACTS)
    (tmp_path / "step-00000008.part").mkdir()
    require_room(tmp_path, 1.0, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000007"]
    assert latest(tmp_path) == FACTS


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("step-00000007/__0_0.distcp", "123", "__0_0.distcp: 3 of 5 bytes"),
        ("step-00000007/.metadata", None, ".metadata: No such file"),
        ("step-00000007/.metadata", "101", ".metadata: not what was written"),
        ("step-00000007/run.json", None, "run.json: No such file"),
        ("step-00000007/run.json", '{"version": 1, "mo', "run.json is no JSON"),
        ("step-00000007/run.json", "{}", "run.json: the key model is required"),
        ("latest", "step-00000009", "step-00000009/run.json: No such file"),
        ("latest", "", "run.json: "),
        ("latest", "\udcff", "run.json: No such file"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_whole_one_before_named(
    tmp_path: Path, file: str, content: str | None, said: str
) -> None:
    keep(tmp_path, dataclasses.replace(FACTS, step=3))
    keep(tmp_path, dataclasses.replace(FACTS, step=5, files={"gone": 1}, sums={}))
    (tmp_path / "step-00000005" / "gone").unlink()
    keep(tmp_path, FACTS)
    require_whole(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content, errors="surrogateescape")
    with pytest.raises(PlannerError, match="goes on from is whole") as caught:
        require_whole(tmp_path)
    assert said in str(caught.value)
    whole = "step-00000007" if file == "latest" else "step-00000003"
    assert caught.value.remedy == f"write {whole} into {tmp_path / 'latest'}"
    assert caught.value.exit_code == 2


def test_a_run_killed_before_it_named_its_first_checkpoint_goes_on_from_it(tmp_path: Path) -> None:
    keep(tmp_path, FACTS)
    (tmp_path / "latest").unlink()
    assert latest(tmp_path) == FACTS
    with pytest.raises(PlannerError, match="another run"):
        require_room(tmp_path, 1.0, resume=False)


def test_a_folder_is_one_run_s_at_a_time(tmp_path: Path) -> None:
    with claim(tmp_path / "kept"):
        with pytest.raises(PlannerError, match="one run at a time") as caught:
            claim(tmp_path / "kept")
        assert f"process {os.getpid()} on" in str(caught.value)
    claim(tmp_path / "kept").close()
    (tmp_path / "file").touch()
    with pytest.raises(PlannerError, match="checkpoints can be written"):
        claim(tmp_path / "file" / "kept")


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
