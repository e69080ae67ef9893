"""The pages and pictures of a validation: whole, small, escaped, and the same twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.report.accuracy import Validation, judge
from planner.report.accuracy_notes import NOTES
from planner.report.accuracy_pages import (
    evidence,
    notes,
    prepared,
    report_html,
    report_markdown,
    verdict,
    write_report,
)
from planner.report.accuracy_plots import draw_memory, draw_times, pictures
from planner.report.accuracy_sources import source_rows
from planner.report.accuracy_terminal import show_validation, watched
from planner.spec.runs_predicted import Prediction
from tests.report.made_up_runs import made_up_prediction, made_up_run

COMMAND = "tp-plan validate RUNS.csv -o reports"


@pytest.fixture
def validation() -> Validation:
    """Two sources, one of them with an unfriendly name, doubtful rows, memory, exclusions."""
    rows = [
        made_up_prediction(made_up_run(str(n), seconds=1.0 + n, memory=(10e9, "device"), tp=2 ** (n % 3)), 1.1 + n)
        for n in range(12)
    ]
    rows += [made_up_prediction(made_up_run("x", source="<b>them|us</b>", trust="C"), 1.2)]
    rows += [made_up_prediction(made_up_run("y", source="<b>them|us</b>"), 0.9)]
    rows += [Prediction(run=made_up_run("z", excluded="a|b <i>")), Prediction(run=made_up_run("w"), reason="no")]
    return judge(["/somewhere/runs.csv"], rows)


def test_the_verdict(validation: Validation) -> None:
    found = verdict(validation)
    of_enough = r"over 1 source \(12 runs; 1 source of fewer than 10 left out of the mean\);"
    assert re.match(rf"Step time is [\d.]+ % off on average {of_enough}", found)
    assert re.search(r"; peak memory [\d.]+ % over 1 source \(12 peaks\)$", found)
    assert verdict(judge([], [])) == "Nothing could be judged"


def test_small_sources_are_averaged_where_there_are_no_others() -> None:
    rows = [made_up_prediction(made_up_run(source=source), 1.2) for source in ("a", "b")]
    assert verdict(judge([], rows)) == "Step time is 20.0 % off on average over 2 sources (2 runs)"


def test_the_evidence_says_what_the_verdict_rests_on() -> None:
    rows = [
        made_up_prediction(made_up_run(source="a", memory=(10e9, "device")), seconds) for seconds in (1.05, 1.3)
    ]
    rows += [made_up_prediction(made_up_run(source="b", memory=(1e9, "device")), 1.1)]
    assert evidence(judge([], rows, {"a": 0.3, "elsewhere": 9.0})) == [
        "Predicted with constants fitted without it, a source's steps are 30.0 % off on average over 1 source, "
        "with the shipped constants 17.5 % over the same",
        "67 % of 3 measured steps lie inside their interval, which claims 80 %",
        "100 % of 2 measured peaks lie under the upper end of theirs",
        "1 peak under 2 GB not judged: there the driver and the allocator's blocks count for more than the model",
    ]
    assert evidence(judge([], [])) == []


def test_notes_are_of_sources_at_hand() -> None:
    (known, *_) = NOTES
    found = judge([], [made_up_prediction(made_up_run(source=name)) for name in ("ours", known)])
    assert notes(found) == [(known, NOTES[known])]
    assert f"- **{known}**: {NOTES[known]}" in report_markdown(found, command=COMMAND)
    assert f"<b>{known}</b>" in report_html(found, {})


def test_markdown_has_every_table_and_no_local_path(validation: Validation) -> None:
    text = report_markdown(validation, command=COMMAND, images=("step-time.png", "memory.png"))
    for title in (
        "Step time",
        "Step time of doubtful rows (trust C)",
        "Peak memory",
        "Not judged",
        "Not predicted",
    ):
        assert f"## {title}\n" in text
    assert "/somewhere" not in text
    assert "| ours | a\\|b &lt;i> | 1 |" in text
    assert COMMAND in text
    columns = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| ours | 12")}
    assert len(columns) == 2, "time and memory"


def test_sources_are_described_by_what_they_hold(validation: Validation) -> None:
    assert source_rows(validation) == [
        ("ours", "12", "dgx-h100", "8", "m", "bf16", "s"),
        ("<b>them|us</b>", "2", "dgx-h100", "8", "m", "bf16", "s"),
    ]
    models = [made_up_run(model=name, software=f"NeMo 25.0{number}") for number, name in enumerate("abbcde")]
    ((*_, names, _, software),) = source_rows(judge([], list(map(made_up_prediction, models))))
    assert (names, software) == ("b, a, c and 2 more", "NeMo")


def test_html_stands_alone_is_small_and_escapes(validation: Validation) -> None:
    page = report_html(validation, pictures(validation))
    assert len(page) < 2_000_000
    assert page.count("<img") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "<b>them" not in page
    assert "&lt;b&gt;them|us&lt;/b&gt;" in page


def test_pictures_are_png_the_same_twice_and_only_of_what_there_is(validation: Validation) -> None:
    drawn = pictures(validation)
    assert list(drawn) == ["step-time.png", "residuals.png", "memory.png"]
    assert all(picture.startswith(b"\x89PNG") for picture in drawn.values())
    assert pictures(validation) == drawn
    assert draw_times(judge([], [])) is None
    assert draw_memory(judge([], [made_up_prediction(made_up_run())])) is None


def test_a_single_row_is_drawn() -> None:
    one = judge([], [made_up_prediction(made_up_run(memory=(1e9, "allocated")))])
    assert len(pictures(one)) == 3


def test_the_report_is_written_whole(validation: Validation, tmp_path: Path) -> None:
    written = write_report(validation, tmp_path, command=COMMAND)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    page = (tmp_path / "accuracy.md").read_text()
    for name in re.findall(r"\]\(([\w-]+\.png)\)", page):
        assert (tmp_path / name).is_file()


def test_the_folder_is_made_before_anything_is_estimated(tmp_path: Path) -> None:
    assert prepared(tmp_path / "missing" / "deeper").is_dir()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", Path("nul\0")):
        with pytest.raises(PlannerError, match="needs a folder that can be written"):
            prepared(wrong)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_shows_every_source(
    width: int, validation: Validation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show_validation(validation, rows=True)
    out = capsys.readouterr().out
    for word in (
        "ours",
        "<b>them|us</b>",
        "trust C",
        "1 row not judged",
        "1 row not predicted",
        "a|b <i>",
        "MAPE",
    ):
        assert word in out
    assert max(map(len, out.splitlines())) <= 120


def test_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [made_up_run("a"), made_up_run("b")]
    assert list(watched(runs, quiet=False)) == runs
    assert capsys.readouterr().err == ""
