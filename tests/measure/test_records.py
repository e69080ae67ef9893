"""Records outlive the run that wrote them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from planner.errors import PlannerError
from planner.measure.records import Measurement, Record, RecordFolder, combine, deviation

SETTING = {"device": "cpu", "world": 2}


def record(key: str, seconds: float, round_: int = 0, spread: float = 0.01) -> Record:
    return Record(
        key=key, round_=round_, seconds=seconds, spread=spread, samples=5, by_rank=(seconds, 2 * seconds)
    )


def test_the_next_run_finds_what_the_last_one_wrote(tmp_path: Path) -> None:
    folder = RecordFolder.beside(tmp_path / "mine.yaml")
    assert folder.open_for(SETTING) == []
    folder.append(record("a", 1.0))
    folder.append(record("b", 2.0))
    again = RecordFolder.beside(tmp_path / "mine.yaml")
    assert again.open_for(SETTING) == [record("a", 1.0), record("b", 2.0)]


def test_a_line_that_was_cut_short_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    folder = RecordFolder.beside(tmp_path / "mine.yaml")
    folder.open_for(SETTING)
    folder.append(record("a", 1.0))
    with (folder.folder / "records.jsonl").open("a") as file:
        file.write('{"key": "b", "round_": 0, "sec')
    assert folder.open_for(SETTING) == [record("a", 1.0)]
    folder.append(record("c", 3.0))
    assert [item.key for item in folder.read()] == ["a", "c"]


def test_records_of_another_setting_are_not_used(tmp_path: Path) -> None:
    folder = RecordFolder.beside(tmp_path / "mine.yaml")
    folder.open_for(SETTING)
    folder.append(record("a", 1.0))
    assert folder.open_for(SETTING | {"world": 4}) == []
    assert folder.read() == []


def test_rounds_combine_to_the_middle_one() -> None:
    found = combine({"a": [record("a", 1.1), record("a", 9.0, 1), record("a", 1.0, 2)]})["a"]
    assert (found.seconds, found.by_rank) == (1.1, (1.1, 2.2))


def test_a_lone_case_has_the_spread_of_its_own_rounds() -> None:
    """Logarithms 0 and ln 2 have a standard deviation of ln 2 / √2; the median of such is 0.69 of the true one."""
    found = combine({"a": [record("a", 1.0), record("a", 2.0, 1)]})["a"]
    own = math.log(2.0) / math.sqrt(2.0)
    assert deviation([1.0, 2.0]) == pytest.approx(own)
    assert found.spread == pytest.approx(math.sqrt((4 * (own / (7 / 9) ** 1.5) ** 2 + own**2) / 5))


def test_a_case_that_was_lucky_borrows_from_its_kind() -> None:
    noisy = {f"gemm {index}": [record("x", 1.0), record("x", 1.3, 1), record("x", 1.1, 2)] for index in range(4)}
    lucky = {"gemm lucky": [record("x", 1.0)] * 3, "memory copy": [record("x", 1.0)] * 3}
    once = {"gemm once": [record("x", 1.0)], "launch once": [record("x", 1.0, spread=0.07)]}
    found = combine(noisy | lucky | once)
    assert 0.7 * found["gemm 0"].spread < found["gemm lucky"].spread < found["gemm 0"].spread
    assert found["gemm once"].spread > 0.1
    assert found["memory copy"].spread == 0.0
    assert found["launch once"].spread == pytest.approx(0.07)  # the spread of its samples, where nothing else is


@pytest.mark.parametrize("rounds", [4, 5])
@pytest.mark.parametrize(
    ("noise", "later", "share"), [("even", 1.0, 0.9), ("bursts", 1.0, 0.9), ("busy", 1.0, 0.9), ("busy", 1.5, 0.8)]
)
def test_a_second_run_lies_within_twice_the_spread(noise: str, later: float, share: float, rounds: int) -> None:
    """Of made-up machines: even noise; one round in eight half as slow again; others at work, or more so later."""
    random = np.random.default_rng(1)
    names = [f"{kind} {index}" for kind in ("gemm", "attention", "memory", "all_reduce") for index in range(25)]
    true = {name: 10.0 ** random.uniform(-6, -1) for name in names}
    level = {"gemm": 0.03, "attention": 0.1, "memory": 0.2, "all_reduce": 0.05}

    def run(busier: float) -> dict[str, Measurement]:
        records = {}
        for name in names:
            own = level[name.split()[0]] * random.uniform(0.7, 1.4)
            even = own * random.standard_normal(rounds)
            logs = own * busier * random.exponential(size=rounds) if noise == "busy" else even
            if noise == "bursts":
                logs += np.log(1.5) * (random.random(rounds) < 0.125)
            records[name] = [record(name, true[name] * math.exp(log), index) for index, log in enumerate(logs)]
        return combine(records)

    held, held_by_kind, spreads = [], [], []
    for _ in range(10):
        first, second = run(1.0), run(later)
        for kind, one in level.items():
            of_kind = [name for name in names if name.startswith(kind)]
            typical = float(np.median([first[name].spread for name in of_kind]))
            spreads.append(typical / one)
            for name in of_kind:
                apart = abs(second[name].seconds / first[name].seconds - 1.0)
                held.append(apart <= 2 * first[name].spread)
                held_by_kind.append(apart <= 2 * typical)
    assert np.mean(held) >= share
    assert np.mean(held_by_kind) >= share
    if noise != "bursts":
        assert 0.6 < np.mean(spreads) < 1.3  # and it is not simply large


def test_a_refusal_is_no_measurement(tmp_path: Path) -> None:
    folder = RecordFolder.beside(tmp_path / "mine.yaml")
    folder.open_for(SETTING)
    folder.append(Record(key="fp8", round_=0, seconds=0, spread=0, samples=0, refusal="too old a device"))
    assert folder.measurements() == {}
    assert folder.refusals() == {"fp8": "too old a device"}


@pytest.mark.parametrize("output", ["missing/mine.yaml", "file/mine.yaml", "."])
def test_what_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlannerError, match=r"cannot be written|is a file"):
        RecordFolder.beside(tmp_path / output)
