"""Measuring this machine with real processes: two ranks over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.measure.launch import under_torchrun
from planner.measure.run import MeasuredMachine, measure_machine
from planner.spec.hardware import HardwareProfile
from planner.spec.hardware_sources import load_hardware
from tests.measure.machine import FORMULAS

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MeasuredMachine]:
    """A quick measurement of fp32, taken once."""
    output = tmp_path_factory.mktemp("profile") / "mine.yaml"
    found = measure_machine(
        FORMULAS, output=output, nproc=2, device="cpu", dtypes=("fp32",), quick=True, quiet=True
    )
    assert found is not None
    return output, found


@contextmanager
def started(output: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A measurement as a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.measure.machine", str(output), "--dtype", "fp32", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lines_of(output: Path) -> list[str]:
    records = output.with_name(f"{output.name}.partial") / "records.jsonl"
    return records.read_text().splitlines() if records.exists() else []


def wait_for_records(output: Path, count: int) -> None:
    until = time.monotonic() + 60
    while len(lines_of(output)) < count:
        assert time.monotonic() < until, "no records in a minute"
        time.sleep(0.05)


def workers_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the workers that a measurement started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == process.pid:
            ranks = [item for item in environment if item.startswith(b"RANK=")]
            found.update({int(item[5:]): int(folder.name) for item in ranks})
    return found


def test_planning_reads_the_profile_and_every_number_has_a_source(written: tuple[Path, MeasuredMachine]) -> None:
    output, found = written
    profile = load_hardware(output)
    assert profile == HardwareProfile.from_dict(found.profile.to_dict()) == found.profile
    numbers = profile.numbers()
    assert len(numbers) > 25
    assert all(number.reference for number in numbers)
    by_source = {number.source for number in numbers}
    assert "measured" in by_source
    assert "datasheet" not in by_source
    assert profile.software["eager"].blocking == 1.0  # on a CPU nothing runs while the host issues
    assert set(profile.topology) == {"node"}
    assert profile.device.gpus_per_node == profile.largest_gpus == 2
    assert {table.ranks for table in profile.topology["node"].collectives.values()} == {(2,)}
    assert {"date", "cpu", "torch"} <= set(profile.environment)


def test_no_host_name_and_no_path_is_written(written: tuple[Path, MeasuredMachine]) -> None:
    text = written[0].read_text()
    assert os.uname().nodename not in text
    assert str(written[0].parent) not in text


def test_the_records_are_gone_once_the_profile_is_there(written: tuple[Path, MeasuredMachine]) -> None:
    assert [path.name for path in written[0].parent.iterdir()] == ["mine.yaml"]


def test_a_profile_is_not_slower_than_itself(written: tuple[Path, MeasuredMachine]) -> None:
    """What is expected of each case follows from the profile that was fitted to it."""
    from planner.measure.against import compare, expected

    _, found = written
    comparison = compare(found.measured, lambda case: expected(case, found.profile, FORMULAS), "itself")
    ratios = sorted(entry.ratio for entry in comparison.entries)
    assert 0.6 < ratios[len(ratios) // 2] < 1.6
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_a_run_that_is_killed_leaves_no_profile_and_is_taken_up(tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    with started(output) as process:
        wait_for_records(output, 12)
        workers = workers_of(process)
        assert sorted(workers) == [0, 1]
        process.kill()
        process.wait()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers.values()):
        assert time.monotonic() < until, "workers outlive what started them"
        time.sleep(0.05)
    assert not output.exists()
    kept = lines_of(output)
    assert len(kept) >= 12
    with started(output) as process:
        wait_for_records(output, len(kept) + 1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130
    assert "resuming" in said
    assert not output.exists()
    assert lines_of(output)[: len(kept)] == kept


def test_a_rank_that_dies_ends_the_others_and_is_named(tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    with started(output) as process:
        wait_for_records(output, 3)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1
    assert "rank 1" in said
    assert "signal 9" in said
    assert not output.exists()


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    with started(output, TP_PLAN_PROFILE_TIMEOUT_SECONDS="3") as process:
        wait_for_records(output, 3)
        stopped = workers_of(process)[1]
        os.kill(stopped, signal.SIGSTOP)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1
    assert "rank 1" in said


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="cannot be written"):
        measure_machine(FORMULAS, output=tmp_path / "missing" / "mine.yaml", device="cpu")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(PlannerError, match="dtypes") as caught:
        measure_machine(FORMULAS, device="cpu", dtypes=("bf61",))
    assert "bf16" in caught.value.remedy


def test_a_second_run_with_the_same_output_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    with started(output):
        wait_for_records(output, 1)
        with pytest.raises(PlannerError, match="one run at a time"):
            measure_machine(FORMULAS, output=output, device="cpu")


def test_torchrun_decides_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not under_torchrun()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlannerError, match="torchrun"):
        measure_machine(FORMULAS, device="cpu", nproc=2)
