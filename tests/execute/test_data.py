"""Data of a run: the same for every layout, once each an epoch, and refused where it cannot be the model's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from planner.errors import PlannerError
from planner.execute.data import TrainingData, open_data
from planner.execute.order import shuffled
from planner.spec.training_run import TrainingRun


def opened(data: str | Path, *, vocab: int = 100, length: int = 4, **flags: object) -> TrainingData:
    return open_data(TrainingRun.from_flags({"data": str(data), **flags}), vocab=vocab, length=length)


def refusal(data: str | Path, **flags: object) -> str:
    with pytest.raises(PlannerError) as caught:
        opened(data, **flags)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """41 tokens, 0 … 40: ten windows of four, each with the token after it."""
    path = tmp_path / "tokens.bin"
    np.arange(41, dtype="<u2").tofile(path)
    return path


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000, 4097])
def test_a_shuffle_is_a_permutation(count: int) -> None:
    places = np.arange(count, dtype=np.uint64)
    one, other = shuffled(places, count, 1), shuffled(places, count, 2)
    assert sorted(one.tolist()) == list(range(count))
    if count > 9:
        assert one.tolist() != other.tolist() != list(range(count))


def test_an_epoch_reads_every_window_once_and_the_next_in_another_order(tokens: Path) -> None:
    data = opened(tokens, seed=5)
    read, labels = data.batch(0, 10)
    assert sorted(read[:, 0].tolist()) == list(range(0, 40, 4))
    assert torch.equal(labels, read + 1)
    again, _ = data.batch(10, 10)
    assert sorted(again[:, 0].tolist()) == list(range(0, 40, 4))
    assert not torch.equal(again, read)


@pytest.mark.parametrize("kind", ["file", "synthetic"])
def test_ranks_read_parts_of_one_batch(tokens: Path, kind: str) -> None:
    data = opened(tokens if kind == "file" else "synthetic", seed=2)
    whole, _ = data.batch(8, 8)
    parts = [data.batch(8 + 2 * rank, 2)[0] for rank in range(4)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(opened(tokens if kind == "file" else "synthetic", seed=3).batch(8, 8)[0], whole)


def test_width_follows_from_the_vocabulary_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.array([1, 2, 3, 4, 70_000], dtype="<u4").tofile(path)
    assert opened(path, vocab=100_000).batch(0, 1)[1].tolist() == [[2, 3, 4, 70_000]]
    assert "70000 at token 4" in refusal(path, data_dtype="uint32")
    assert len(opened(path, data_dtype="uint16", vocab=70_000).source or ()) == 10
    np.arange(1, 9, dtype="<u4").tofile(path)
    assert "read as uint16, every second token is 0" in refusal(path)
    assert len(opened(path, data_dtype="uint16").source or ()) == 16


def test_what_cannot_be_read_is_refused(tmp_path: Path, tokens: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"\0" * 13)
    (tmp_path / "empty.bin").touch()
    (tmp_path / "folder").mkdir()
    assert "multiple of 2 bytes" in refusal(tmp_path / "odd.bin")
    assert "0 tokens" in refusal(tmp_path / "empty.bin")
    assert "at least one sequence of 64" in refusal(tokens, length=64)
    assert "40 at token 40" in refusal(tokens, vocab=32)
    assert "the data exists" in refusal(tmp_path / "nothing")
    assert "save_to_disk" in refusal(tmp_path / "folder")


def test_a_dataset_folder_is_one_run_of_tokens(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    column = arrow.array([[0, 1, 2], [3], [], [4, 5, 6, 7, 8]], arrow.list_(arrow.int32()))
    table = arrow.table({"input_ids": column})
    for number in range(2):
        with arrow.ipc.new_stream(str(tmp_path / f"{number}.arrow"), table.schema) as writer:
            writer.write_table(table)
    files = [{"filename": "0.arrow"}, {"filename": "1.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    data = opened(tmp_path, length=8)
    assert data.windows == 2
    rows = sorted(data.batch(0, 2)[0].tolist())
    assert rows == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 0, 1, 2, 3, 4, 5, 6]]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files, "_indices_files": [{}]}))
    assert "flatten_indices" in refusal(tmp_path, length=8)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ([[1, None, 2]], "some tokens are null"),
        ([[0.5]], "one of list<"),
        ([["a"]], "one of list<"),
        ([1], "int64"),
    ],
)
def test_a_dataset_without_lists_of_whole_numbers_is_refused(
    tmp_path: Path, lists: list[object], said: str
) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"input_ids": arrow.array(lists)})
    with arrow.ipc.new_stream(str(tmp_path / "0.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "0.arrow"}]}))
    assert said in refusal(tmp_path)
