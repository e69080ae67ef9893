"""The validation as pages: Markdown for the reports, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from planner.errors import PlannerError
from planner.report.accuracy import (
    FEWEST_TO_AVERAGE,
    LEAST_MEMORY_BYTES,
    Errors,
    SourceAccuracy,
    Validation,
)
from planner.report.accuracy_notes import NOTES
from planner.report.accuracy_plots import pictures
from planner.report.accuracy_sources import SOURCE_COLUMNS, source_rows
from planner.spec.files import write_bytes, write_text
from planner.units import GB

COLUMNS = ("source", ">rows", ">MAPE", ">left out", ">noise", ">bias", ">median", ">p90", ">rank", ">regret",
           ">worst", ">in interval")  # fmt: skip
MEMORY_COLUMNS = ("source", ">rows", ">MAPE", ">bias", ">median", ">p90", ">under upper end")

_CAPTIONS = {
    "step-time.png": "Predicted against measured step time; the band is ±10 %, hollow marks are rows of trust C.",
    "residuals.png": "Errors by source, and by the share of exposed communication in the predicted step.",
    "memory.png": "Predicted against measured peak memory, as each source counts it; left of the line not judged.",
}
_LEGEND = """\
An error is predicted/measured − 1. MAPE is the mean of its size, bias its mean (above 0: predicted too slow), p90
the size that nine rows of ten stay under. *Left out* is the MAPE with constants fitted anew without that source;
where the shipped constants lie away from that fit, it can be the smaller one. *Noise* is how far repeats of one
configuration lie from their mean (and how many rows are such repeats): no model can be closer. *Rank* is
Spearman's correlation. *Regret* is how much slower the layout that we would pick is than the fastest measured one,
averaged over groups of runs that differ in their layout only (and how many groups); *worst* is that of the worst
group. *In interval* is the share of rows inside the predicted interval."""
_MEMORY_LEGEND = """\
Peaks are compared with what a source counts: bytes allocated by tensors, reserved by the allocator, or used on the
device. *Under upper end* is the share of peaks below the upper end of the predicted interval, which is what
decides whether a layout fits."""
STEP_TIME, PEAK_MEMORY = "Step time", "Peak memory"
_LEGENDS = {STEP_TIME: _LEGEND, PEAK_MEMORY: _MEMORY_LEGEND}
_STYLE = """\
:root{color-scheme:light dark;--line:#8885}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem}
.scroll{overflow-x:auto}th,td{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:left}
.number{text-align:right}img{max-width:100%;background:#fff;border-radius:4px}figure{margin:1.5rem 0}
figcaption,p.legend{font-size:.85rem;opacity:.85}"""


def time_row(source: SourceAccuracy) -> tuple[str, ...]:
    """The cells of a source under `COLUMNS`."""
    rows, mape, *spread = _error_cells(source.time)
    return (
        source.source,
        rows,
        mape,
        "–" if source.left_out is None else _percent(source.left_out),
        f"{_percent(source.noise.mean)} ({source.noise.rows})" if source.noise else "–",
        *spread,
        "–" if source.rank_correlation is None else f"{source.rank_correlation:.3f}",
        f"{_percent(source.regret.mean)} ({source.regret.groups})" if source.regret else "–",
        _percent(source.regret.worst) if source.regret else "–",
        _whole_percent(source.inside.share) if source.inside else "–",
    )


def memory_row(source: SourceAccuracy) -> tuple[str, ...]:
    """The cells of a source under `MEMORY_COLUMNS`."""
    below = _whole_percent(source.memory_below.share) if source.memory_below else "–"
    return (source.source, *_error_cells(source.memory), below)


def verdict(validation: Validation) -> str:
    """The answer in a line."""
    parts = []
    if validation.macro_mape is not None:
        means, every = validation.averaged, [source for source in validation.sources if source.time]
        over = _over([source.time for source in means if source.time], "run", len(every) - len(means))
        parts.append(f"step time is {_percent(validation.macro_mape)} off on average over {over}")
    if validation.macro_memory_mape is not None:
        means, every = validation.memory_averaged, [source for source in validation.sources if source.memory]
        over = _over([source.memory for source in means if source.memory], "peak", len(every) - len(means))
        parts.append(f"peak memory {_percent(validation.macro_memory_mape)} over {over}")
    return "; ".join(parts).capitalize() or "Nothing could be judged"


def evidence(validation: Validation) -> list[str]:
    """How far the verdict can be trusted: unseen sources, intervals, what is not counted."""
    lines = []
    if validation.macro_left_out is not None and validation.macro_beside_left_out is not None:
        number = sum(source.left_out is not None for source in validation.sources if source.time)
        lines.append(
            f"Predicted with constants fitted without it, a source's steps are "
            f"{_percent(validation.macro_left_out)} off on average over {counted(number, 'source')}, with the "
            f"shipped constants {_percent(validation.macro_beside_left_out)} over the same"
        )
    if validation.inside:
        inside, rows = _whole_percent(validation.inside.share), counted(validation.inside.rows, "measured step")
        claim = "" if validation.confidence is None else _whole_percent(validation.confidence)
        lines.append(
            f"{inside} of {rows} lie inside their interval" + (f", which claims {claim}" if claim else "")
        )
    if validation.memory_below:
        below, rows = validation.memory_below, counted(validation.memory_below.rows, "measured peak")
        lines.append(f"{_whole_percent(below.share)} of {rows} lie under the upper end of theirs")
    if validation.memory_small:
        lines.append(
            f"{counted(validation.memory_small, 'peak')} under {LEAST_MEMORY_BYTES / GB:.0f} GB not judged: "
            "there the driver and the allocator's blocks count for more than the model"
        )
    return lines


def notes(validation: Validation) -> list[tuple[str, str]]:
    """What is known of the sources at hand."""
    return [(source.source, NOTES[source.source]) for source in validation.sources if source.source in NOTES]


def counted(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _over(errors: Sequence[Errors], what: str, left: int) -> str:
    few = f"; {counted(left, 'source')} of fewer than {FEWEST_TO_AVERAGE} left out of the mean" if left else ""
    return f"{counted(len(errors), 'source')} ({counted(sum(each.rows for each in errors), what)}{few})"


def tables(validation: Validation) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Every table that has rows: title, columns, rows."""
    found = [
        (STEP_TIME, COLUMNS, [time_row(s) for s in validation.sources if s.time]),
        ("Step time of doubtful rows (trust C)", COLUMNS, [time_row(s) for s in validation.doubtful if s.time]),
        (PEAK_MEMORY, MEMORY_COLUMNS, [memory_row(s) for s in validation.sources if s.memory]),
        ("What was measured", SOURCE_COLUMNS, source_rows(validation)),
        ("Not judged", ("source", "reason", ">rows"), _reasons(validation.excluded_by_reason())),
        ("Not predicted", ("source", "reason", ">rows"), _reasons(validation.not_predicted_by_reason())),
    ]
    return [(title, columns, rows) for title, columns, rows in found if rows]


def report_markdown(validation: Validation, *, command: str, images: Sequence[str] = ()) -> str:
    """The page of the reports: tables, what was left out and why, how to make it again."""
    lines = ["# How accurate the estimates are", "", f"**{verdict(validation)}.**", ""]
    lines += [*(f"- {line}." for line in evidence(validation)), ""]
    for title, columns, rows in tables(validation):
        lines += [f"## {title}", "", *([_LEGENDS[title], ""] if title in _LEGENDS else [])]
        lines += [_markdown_table(columns, rows), ""]
        if title == STEP_TIME:
            lines += [*(f"- **{name}**: {_escaped(text)}" for name, text in notes(validation)), ""]
        lines += [f"![{_CAPTIONS[name]}]({name})\n" for name in images if _belongs(name, title)]
    lines += ["## How to make this page again", "", "```text", command, "```", ""]
    lines += ["Files read: " + ", ".join(f"`{Path(file).name}`" for file in validation.files) + ".", ""]
    return "\n".join(lines)


def report_html(validation: Validation, images: Mapping[str, bytes]) -> str:
    """The same as one file: images inlined, no script, nothing fetched."""
    body = [f"<h1>How accurate the estimates are</h1><p><strong>{html.escape(verdict(validation))}.</strong></p>"]
    body.append(_html_list([html.escape(line) + "." for line in evidence(validation)]))
    for title, columns, rows in tables(validation):
        body.append(f"<h2>{html.escape(title)}</h2>")
        if title in _LEGENDS:
            body.append(f"<p class=legend>{html.escape(_LEGENDS[title]).replace('*', '')}</p>")
        body.append(_html_table(columns, rows))
        if title == STEP_TIME:
            known = notes(validation)
            body.append(_html_list([f"<b>{html.escape(name)}</b>: {html.escape(text)}" for name, text in known]))
        body += [_html_figure(name, picture) for name, picture in images.items() if _belongs(name, title)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}<title>Accuracy of tp-plan</title></head><body>' + (
        "\n".join(body) + "</body></html>\n"
    )


def _html_list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>" if items else ""


def _html_figure(name: str, picture: bytes) -> str:
    caption = html.escape(_CAPTIONS[name])
    inlined = base64.b64encode(picture).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{inlined}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def prepared(folder: Path) -> Path:
    """The folder of a report, made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise PlannerError(
            "the report needs a folder that can be written",
            value=f"{folder}: {getattr(error, 'strerror', None) or error}",
            remedy="give another folder, or mend its permissions",
            key="output",
        ) from None
    return folder


def write_report(validation: Validation, folder: Path, *, command: str) -> list[Path]:
    """`accuracy.md`, `accuracy.html` and the pictures, each whole or not at all."""
    images = pictures(validation)
    for name, picture in images.items():
        write_bytes(folder / name, picture)
    write_text(folder / "accuracy.md", report_markdown(validation, command=command, images=tuple(images)))
    write_text(folder / "accuracy.html", report_html(validation, images))
    return [folder / name for name in ("accuracy.md", "accuracy.html", *images)]


def _error_cells(errors: Errors | None) -> tuple[str, ...]:
    if errors is None:
        return ("0", "–", "–", "–", "–")
    return (str(errors.rows), _percent(errors.mape), f"{100 * errors.bias:+.1f} %", _percent(errors.median),
            _percent(errors.p90))  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _reasons(counts: Mapping[tuple[str, str], int]) -> list[tuple[str, ...]]:
    return [(source, reason, str(rows)) for (source, reason), rows in counts.items()]


def _belongs(image: str, title: str) -> bool:
    return title == (PEAK_MEMORY if image == "memory.png" else STEP_TIME)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "| " + " | ".join(column.lstrip(">") for column in columns) + " |"
    rule = "|" + "|".join("---:" if column.startswith(">") else "---" for column in columns) + "|"
    body = ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    return "\n".join([head, rule, *body])


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(tag: str, column: str, text: str) -> str:
        mark = ' class="number"' if column.startswith(">") else ""
        return f"<{tag}{mark}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", column, column.lstrip(">")) for column in columns)
    body = "".join(
        "<tr>" + "".join(cell("td", column, text) for column, text in zip(columns, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
