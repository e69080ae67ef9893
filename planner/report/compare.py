"""Plans side by side: written as one HTML file or one PNG, and told on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.report.compare_table import facts
from planner.report.compare_verdict import Compared, verdict
from planner.report.compare_verdict import side_by_side as side_by_side
from planner.report.estimate import _gib as in_gib
from planner.report.estimate import _percent as in_percent
from planner.report.estimate import _rate as in_rate
from planner.report.estimate import _say as say
from planner.report.estimate import _scaled as in_unit_of
from planner.report.estimate import _unit as unit_of
from planner.report.plan_words import proof_text
from planner.report.terminal import console, show_table
from planner.spec.files import write_bytes, write_text

SUFFIXES = (".html", ".png")


def require_writable_kind(output: Path) -> None:
    """Refuse, before anything is computed, a file that is neither a page nor a picture."""
    if output.suffix.lower() not in SUFFIXES:
        raise PlannerError(
            "plans are compared in a page or a picture",
            value=str(output),
            remedy="end the name in .html or .png",
            key="output",
        )


def write_comparison(entries: Sequence[Compared], output: Path) -> None:
    """One file that needs nothing else; its ending says which kind."""
    require_writable_kind(output)
    if output.suffix.lower() == ".png":
        from planner.report.compare_plots import comparison_png

        write_bytes(output, comparison_png(entries))
    else:
        from planner.report.compare_page import comparison_html

        write_text(output, comparison_html(entries))


def show_comparison(entries: Sequence[Compared]) -> None:
    """The verdict, and a line for each plan."""
    out = console()
    found = verdict(entries)
    say(out, found.answer, style="bold")
    for note in found.notes:
        say(out, note)
    out.print()
    longest = max(entry.estimate.step_seconds for entry in entries)
    best = 0.0 if found.best is None else entries[found.best].estimate.step_seconds
    rows = [_line(entry, longest, best) for entry in entries]
    step = f">{unit_of(longest)[1]}/step"
    columns = ("plan", "layout", step, ">× best", ">tokens/s/GPU", ">MFU", ">GiB", "fits", "proof")
    known = [place for place, name in enumerate(columns) if best or name != ">× best"]
    shown = [[row[place] for place in known] for row in rows]
    drop = ("proof", ">MFU", ">tokens/s/GPU", "layout", ">× best")
    show_table(
        out, [columns[place] for place in known], shown, [name for name in drop if best or name != ">× best"]
    )


def comparison_data(entries: Sequence[Compared]) -> dict[str, Any]:
    """The same for `--json`."""
    found = verdict(entries)
    return {
        "verdict": found.answer,
        "notes": list(found.notes),
        "best": None if found.best is None else entries[found.best].name,
        "plans": [{"name": entry.name, "estimate": entry.estimate.to_dict()} for entry in entries],
        "differences": [
            {"group": fact.group, "name": fact.name, "values": list(fact.cells)}
            for fact in facts(entries)
            if fact.differs
        ],
    }


def _line(entry: Compared, longest: float, best: float) -> tuple[str, ...]:
    found = entry.estimate
    return (
        entry.short,
        found.strategy.label,
        in_unit_of(found.step_seconds, longest),
        f"{found.step_seconds / best:,.2f}" if best else "",
        in_rate(found.tokens_per_second_per_gpu),
        in_percent(found.mfu, digits=1),
        in_gib(found.memory_bytes),
        "yes" if found.fits else "no",
        proof_text(entry.plan),
    )
