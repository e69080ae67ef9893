"""Plans side by side as one HTML file: nothing fetched, no script; light and dark, wide, narrow and on paper."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from planner.report.compare_charts import COLOURS, Chart, Row, Section, kind_name, sections
from planner.report.compare_table import Fact, common_text, facts
from planner.report.compare_verdict import Compared, unbroken, verdict

_WIDTH = 4000  # of a drawing in its own units
_ROW = 10  # height of a row in the same
_TALLEST_PIXELS = 400  # of a chart of many rows
_LABEL_PIXELS = 14  # that a line of words takes
_GROUPS = {"question": "Question", "layout": "Layout", "splits": "Splits", "time": "Time", "memory": "Memory",
           "proof": "Proof"}  # fmt: skip
_AGAIN = "How to make them again"
_STYLE = """\
:root{color-scheme:light dark;--page:#fff;--ink:#1b1d22;--faint:#5c626d;--line:#d4d7dd;--soft:#f4f5f7;
--good:#14713d;--bad:#b3261e;LIGHT}
@media(prefers-color-scheme:dark){:root{--page:#15171b;--ink:#e8eaee;--faint:#a2a9b5;--line:#3a3f49;--soft:#1e2127;
--good:#6cd39b;--bad:#ff8f86;DARK}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:72rem;padding:1.25rem 1rem 3rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;line-height:1.3;margin:.2rem 0 .6rem}h2{font-size:1.1rem;margin:2.2rem 0 .4rem}
h3{font-size:.95rem;margin:1.1rem 0 .2rem}p,ul{margin:.3rem 0}.faint,.kicker{color:var(--faint);font-size:.87rem}
nav a{display:inline-block;margin-right:1rem;padding:.25rem 0}a{color:inherit}
:focus-visible{outline:2px solid var(--ink);outline-offset:2px}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.15rem .9rem;font-size:.85rem}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:2px}
figure{margin:.2rem 0 .8rem}.stages{padding-top:.3rem}svg{display:block;width:100%}
.bar{display:flex;justify-content:space-between;gap:1rem;font-size:.87rem;margin-top:.45rem}
.bar span:last-child{white-space:nowrap}
.stages{display:grid;grid-template-columns:max-content minmax(0,1fr) max-content;gap:0 .6rem;font-size:.8rem;
font-variant-numeric:tabular-nums}
.stages>div>span{display:block;overflow:visible;white-space:nowrap}.stages>div:last-of-type{text-align:right}
.axis{position:relative;height:1.4em;font-size:.78rem;color:var(--faint)}
.axis span{position:absolute;top:.1em;white-space:nowrap}
.mark{stroke:var(--bad);stroke-width:2;vector-effect:non-scaling-stroke;fill:none}
rect{stroke:var(--page);stroke-width:.6;vector-effect:non-scaling-stroke}
.scroll{overflow-x:auto;max-width:100%}.pipeline .stages{min-width:38rem}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .5rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
min-width:5.5rem;max-width:17rem}
thead th{vertical-align:bottom}tbody th{font-weight:400;color:var(--faint);position:sticky;left:0;
background:var(--page);min-width:8rem;max-width:11rem;
overflow-wrap:break-word}
tr.group th{font-weight:600;color:var(--ink);padding-top:.9rem}tr.differs td{background:var(--soft)}
.best{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}
code{font-size:.85em;white-space:pre-wrap}
@media(max-width:30rem){tbody th{min-width:7rem;max-width:7.5rem}th,td{padding:.25rem .3rem}}
@media print{:root{color-scheme:light}body{max-width:none;font-size:10pt}nav{display:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.scroll{overflow:visible}.pipeline .stages{min-width:0}
figure,tr,.bar{break-inside:avoid}h2,h3{break-after:avoid}table{font-size:7.5pt}
th,td{min-width:0;padding:.15rem .3rem}tbody th{position:static}}
"""


def comparison_html(entries: Sequence[Compared]) -> str:
    """The page: the verdict, what is drawn, every difference, and how to make the plans again."""
    found = verdict(entries)
    drawn = sections(entries)
    anchors = [(part.anchor, part.title) for part in drawn]
    anchors = [("plans", "Plans"), *anchors, ("facts", _facts_title(entries)), ("again", _AGAIN)]
    body = [
        '<p class="kicker">tp-plan compare</p>',
        f"<h1>{html.escape(unbroken(found.answer))}</h1>",
        *(f"<p>{html.escape(unbroken(note))}</p>" for note in found.notes),
        "<nav>" + "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in anchors) + "</nav><main>",
        _heading("plans", "Plans") + _plans(entries, found.best),
        *(_section(part) for part in drawn),
        _heading("facts", _facts_title(entries)) + _table(entries),
        _heading("again", _AGAIN) + _commands(entries),
        "</main>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';style-src 'unsafe-inline'\">"
        f"<title>{html.escape(_title(entries))}</title><style>{_style()}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _style() -> str:
    light, dark = (";".join(f"--{kind}:{pair[side]}" for kind, pair in COLOURS.items()) for side in (0, 1))
    kinds = "".join(
        f".{kind}{{fill:var(--{kind})}}path.{kind}{{fill:none;stroke:var(--{kind})}}"
        f"i.{kind}{{background:var(--{kind})}}\n"
        for kind in COLOURS
    )
    paper = f"@media print{{:root{{--page:#fff;--ink:#000;--faint:#444;--line:#bbb;--soft:#f4f4f4;{light}}}}}"
    return _STYLE.replace("LIGHT", light).replace("DARK", dark) + kinds + paper


def _title(entries: Sequence[Compared]) -> str:
    names = [entry.short for entry in entries]
    return f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} – tp-plan"


def _facts_title(entries: Sequence[Compared]) -> str:
    return "Differences" if len(entries) > 1 else "Facts"


def _heading(anchor: str, title: str) -> str:
    return f'<h2 id="{anchor}">{html.escape(title)}</h2>'


def _plans(entries: Sequence[Compared], best: int | None) -> str:
    """What each name stands for."""
    rows = []
    for place, entry in enumerate(entries):
        layout = entry.plan.strategy
        mark = ' class="best"' if place == best else "" if entry.estimate.fits else ' class="bad"'
        told = layout.label + (f", {layout.schedule}" if layout.pp > 1 else "")
        told += f", microbatch {layout.microbatch}; {entry.plan.gpus:,} × {entry.plan.hardware}"
        fits = "" if entry.estimate.fits else " – does not fit"
        rows.append(f"<li><span{mark}>{html.escape(entry.name)}</span>: {html.escape(told + fits)}</li>")
    return f"<ul>{''.join(rows)}</ul>"


def _section(part: Section) -> str:
    legend = "".join(f'<li><i class="{kind}"></i>{html.escape(kind_name(kind))}</li>' for kind in part.legend)
    charts = "".join(_bars(chart) if part.wide_labels else _stages(chart, part.anchor) for chart in part.charts)
    return f'{_heading(part.anchor, part.title)}<ul class="legend">{legend}</ul>{charts}'


def _bars(chart: Chart) -> str:
    """A bar below its own name."""
    rows = []
    for row in chart.rows:
        head = f'<div class="bar"><span>{html.escape(row.label)}</span><span>{html.escape(row.value)}</span></div>'
        rows.append(f"<figure>{head}{_svg([row], 24, f'{row.label}: {row.value}')}</figure>")
    return "".join(rows)


def _stages(chart: Chart, anchor: str) -> str:
    """Bars of one scale with their stages to the left and numbers to the right, as many as there is room for."""
    height = min(20, max(5, _TALLEST_PIXELS // len(chart.rows)))
    every = -(-_LABEL_PIXELS // height)
    last = len(chart.rows) - 1
    shown = {place for place in range(0, last, every) if last - place >= every} | {last}
    picture = _svg(chart.rows, height, f"{chart.title}: {chart.note}", chart.mark)
    left, right = (
        "".join(
            f'<span style="height:{height}px;line-height:{height}px">'
            f"{html.escape(getattr(row, key)) if place in shown else ''}</span>"
            for place, row in enumerate(chart.rows)
        )
        for key in ("label", "value")
    )
    grid = f'<div>{left}</div><div class="plot">{picture}{_axis(chart)}</div><div>{right}</div>'
    return (
        f"<h3>{html.escape(chart.title)}</h3>"
        f'<p class="faint">{html.escape(chart.note)}</p>'
        f'<figure class="{anchor} scroll" tabindex="0" role="group" aria-label="{html.escape(chart.title)}">'
        f'<div class="stages">{grid}</div></figure>'
    )


def _axis(chart: Chart) -> str:
    if chart.mark is None:
        return f'<div class="axis"><span>0</span><span style="right:0">{html.escape(chart.scale)}</span></div>'
    at, words = chart.mark
    place = f"right:{100 * (1 - at):.1f}%" if at > 0.3 else f"left:{100 * at:.1f}%"
    return f'<div class="axis"><span style="{place}">{html.escape(words)}</span></div>'


def _svg(rows: Sequence[Row], height: int, label: str, mark: tuple[float, str] | None = None) -> str:
    """Rows below one another; stretched to the width there is, so words stand outside."""
    drawn = "".join(_row(row, place * _ROW) for place, row in enumerate(rows))
    if mark is not None:
        drawn += f'<path class="mark" d="M{round(_WIDTH * mark[0])} 0V{_ROW * len(rows)}"/>'
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {_WIDTH} {_ROW * len(rows)}" '
        f'preserveAspectRatio="none" style="height:{height * len(rows)}px">{drawn}</svg>'
    )


def _row(row: Row, top: int) -> str:
    """Pieces with words as rectangles; the others of a kind as one line with gaps."""
    lines: dict[str, list[tuple[int, int]]] = {}
    drawn = []
    for piece in row.pieces:
        start, end = round(_WIDTH * piece.start), round(_WIDTH * piece.end)
        if piece.title:
            drawn.append(
                f'<rect class="{piece.kind}" x="{start}" y="{top + 1}" width="{end - start}" height="{_ROW - 2}">'
                f"<title>{html.escape(piece.title)}</title></rect>"
            )
        else:
            lines.setdefault(piece.kind, []).append((start, end))
    for kind, ends in lines.items():
        moves, at = [f"M0 {top + _ROW // 2}"], 0
        for start, end in ends:
            moves.append(f"{f'm{start - at} 0' if start != at else ''}h{end - start}")
            at = end
        drawn.append(f'<path class="{kind}" stroke-width="{_ROW - 2}" d="{"".join(moves)}"/>')
    return "".join(drawn)


def _table(entries: Sequence[Compared]) -> str:
    """What differs in the layouts, and all results; what is the same is said in a sentence."""
    found = facts(entries)
    several = len(entries) > 1
    rows = [fact for fact in found if fact.differs or not several or fact.group not in ("question", "layout")]
    same = common_text(found) if several else ""
    said = f'<p class="faint">The same in all: {html.escape(same)}.</p>' if same else ""
    names = "".join(f'<th scope="col">{html.escape(entry.short)}</th>' for entry in entries)
    body = "".join(_group(group, [row for row in rows if row.group == group], len(entries)) for group in _GROUPS)
    title = _facts_title(entries)
    return (
        f'{said}<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>'
        f'<thead><tr><th scope="col">{"differing" if several else "fact"}</th>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _group(group: str, rows: Iterable[Fact], columns: int) -> str:
    lines = [_fact(row) for row in rows]
    title = f'<tr class="group"><th scope="rowgroup" colspan="{columns + 1}">{_GROUPS[group]}</th></tr>'
    return title + "".join(lines) if lines else ""


def _fact(fact: Fact) -> str:
    cells = "".join(
        f"<td{_cell_class(fact, place, cell)}>{html.escape(cell)}</td>" for place, cell in enumerate(fact.cells)
    )
    mark = ' class="differs"' if fact.differs else ""
    return f'<tr{mark}><th scope="row">{html.escape(fact.name)}</th>{cells}</tr>'


def _cell_class(fact: Fact, place: int, cell: str) -> str:
    if place in fact.best:
        return ' class="best"'
    return ' class="bad"' if fact.name == "fits" and cell != "yes" else ""


def _commands(entries: Sequence[Compared]) -> str:
    items = []
    for entry in entries:
        warnings = "".join(f'<p class="faint">{html.escape(text)}</p>' for text in entry.estimate.warnings)
        items.append(
            f"<li>{html.escape(entry.short)}: <code>{html.escape(entry.plan.command)}</code>{warnings}</li>"
        )
    return f"<ul>{''.join(items)}</ul>"
