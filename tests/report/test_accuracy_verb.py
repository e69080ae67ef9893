"""`validate` from file to answer, with an estimator whose answers are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import planner
from planner import api, cli
from planner.errors import PlannerError
from planner.spec.estimate import Estimate
from tests.report.made_up_runs import made_up_estimate

HEADER = "id,model,gpu,gpus,seq_len,micro_batch,global_batch,tp,derived_step_time_s,mem_gb_per_gpu"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four runs: two layouts of one task, one that no estimate is made for, one of an unknown GPU."""

    def estimate(*, strategy: dict[str, Any], hardware: Any, **_: Any) -> Estimate:
        if hardware == "dgx-h200":
            raise PlannerError("made up", value="h200", remedy="none", key="hardware")
        return made_up_estimate(2.0 / strategy["tp"] ** 0.5)

    monkeypatch.setattr(api, "estimate", estimate, raising=False)
    path = tmp_path / "runs.csv"
    rows = ("a,llama3.1-8b,H100-SXM,8,1024,1,32,1,2.0,12", "b,llama3.1-8b,H100-SXM,8,1024,1,32,4,1.25,",
            "c,llama3.1-8b,H200,8,1024,1,32,1,1.0,", "d,llama3.1-8b,TPU,8,1024,1,32,1,1.0,")  # fmt: skip
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["tp-plan", "validate", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_in_python(table: Path, tmp_path: Path) -> None:
    found = planner.validate(table, output=tmp_path / "report")
    (source,) = found.sources
    assert source.time is not None
    assert source.time.mape == pytest.approx((0.0 + 0.2) / 2)
    assert source.regret is not None
    assert source.regret.best_picked == 1
    assert source.memory is not None
    assert source.memory.mape == pytest.approx(0.0), "12 GB on the device"
    assert (source.runs, source.excluded, source.not_predicted) == (4, 1, 1)
    assert "tp-plan validate runs.csv -o FOLDER" in (tmp_path / "report" / "accuracy.md").read_text()
    assert planner.validate([table, table]).sources[0].runs == 8


def test_on_the_command_line(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(table)) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Step time is 10.0 % off on average over 1 source (2 runs)")
    assert "made up (hardware: h200)" in shown.out
    assert "no profile for the GPU TPU" in shown.out
    assert shown.err == ""


def test_errors_of_left_out_sources_are_shown(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = tmp_path / "left_out.json"
    errors.write_text('{"runs": 0.123}')
    assert run(monkeypatch, str(table), "--left-out", str(errors), "-o", str(tmp_path / "report")) == 0
    assert "12.3 %" in capsys.readouterr().out
    page = (tmp_path / "report" / "accuracy.md").read_text()
    assert "| runs | 2 | 10.0 % | 12.3 % |" in page
    assert "tp-plan validate runs.csv --left-out left_out.json -o FOLDER" in page
    errors.write_text('{"else": 0.123}')
    assert run(monkeypatch, str(table), "--left-out", str(errors)) == 2
    assert "one of runs" in capsys.readouterr().err


def test_json_has_every_row_where_asked(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(table), "--json", "--rows") == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in data["rows"]] == ["a", "b", "c", "d"]
    assert data["not_predicted"] == [{"source": "runs", "reason": "made up (hardware: h200)", "rows": 1}]


def test_nothing_to_judge_is_a_no(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table.write_text(HEADER + "\nd,llama3.1-8b,TPU,8,1024,1,32,1,1.0,\n")
    assert run(monkeypatch, str(table)) == 1
    assert capsys.readouterr().out.startswith("Nothing could be judged")


@pytest.mark.parametrize("arguments", [(), ("missing.csv",), ("runs.csv", "-o", "--json")])
def test_bad_input(
    arguments: tuple[str, ...], table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(table.parent)
    assert run(monkeypatch, *arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_torn_table_is_told_with_line_and_remedy(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table.write_text(table.read_text()[:-10])
    assert run(monkeypatch, str(table), "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["where"] == f"{table}:5"
    assert error["remedy"]
