"""The published measurements that lie beside a checkout: how many rows of each source are judged."""

from __future__ import annotations

import pytest

from planner.spec.runs import Run, RunTable, read_runs
from tests.measured_rows import DATA

FILES = ("training_runs.csv", "megatron_a100_multi_node.csv", "megatron_a100_single_node.csv",
         "memory_megatron.csv")  # fmt: skip

# source: rows, and how many of them are judged at least
JUDGED = {
    "nvidia-nemo-bridge-moe": (139, 130), "nvidia-nemo-bridge-dense": (231, 155), "nvidia-dgxc": (240, 230),
    "nemotron340-paper": (3, 3), "bigscience": (132, 98), "torchtitan": (54, 32), "bigscience-v100": (46, 0),
    "amp": (90, 47), "alpa": (1, 1), "megatron-ci": (6, 6), "megatron_a100_multi_node": (47, 47),
    "megatron_a100_single_node": (369, 369), "megatron-memory-gpt": (255, 249), "megatron-memory-moe": (75, 64),
    "megatron-memory-bert": (13, 13),
}  # fmt: skip


@pytest.fixture(scope="module")
def table() -> RunTable:
    """Every published run."""
    paths = [DATA / name for name in FILES]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        pytest.skip(f"{', '.join(missing)}: no such file; the published runs do not lie there")
    return read_runs(paths)


@pytest.mark.parametrize("source", JUDGED)
def test_as_many_rows_are_judged_as_the_columns_allow(source: str, table: RunTable) -> None:
    runs = [run for run in table.runs if run.source == source]
    rows, judged = JUDGED[source]
    assert len(runs) == rows
    assert sum(run.judged for run in runs) >= judged


def test_every_row_is_judged_or_says_why_not(table: RunTable) -> None:
    assert len(table.runs) == 1737
    for run in table.runs:
        if run.judged:
            assert run.hardware
            assert run.gpus
            assert run.strategy
            assert run.step_seconds or run.memory
    assert sum(table.excluded_by_reason().values()) == len(table.runs) - len(table.judged)


def found(table: RunTable, name: str) -> Run:
    return next(run for run in table.runs if run.id == name)


@pytest.mark.parametrize("name", ["T0647", "T0480", "T0407", "T0444", "T0410", "T1294", "T1302"])
def test_doubted_rows_are_left_out(name: str, table: RunTable) -> None:
    assert found(table, name).excluded.startswith("doubted: ")


@pytest.mark.parametrize("name", ["T1249", "T1242", "T1123", "T1153"])
def test_doubted_memory_is_left_out_and_time_kept(name: str, table: RunTable) -> None:
    run = found(table, name)
    assert run.judged
    assert run.memory is None


def test_rows_read_as_their_notes_say(table: RunTable) -> None:
    bloom = found(table, "T1333")
    assert (bloom.strategy["tp"], bloom.strategy["pp"], bloom.strategy["zero"]) == (4, 12, 1)
    assert bloom.model["attention"] == "unfused"
    asynchronous, vanilla = found(table, "T1112"), found(table, "T1111")
    assert (asynchronous.strategy["overlap"]["tp"], vanilla.strategy["overlap"]["tp"]) == (True, False)
    eager, compiled = found(table, "T1093"), found(table, "T1094")
    assert (eager.workload["stack"], compiled.workload["stack"]) == ("eager", "compiled")
    assert (eager.memory.counts, round(eager.memory.bytes / 1024**3, 1)) == ("reserved", 82.4)  # type: ignore[union-attr]
    assert found(table, "T0619").software == "XLA"
    assert "row" in found(table, "T1115").excluded
