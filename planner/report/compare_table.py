"""Where plans differ, fact by fact: layout, splits, recompute, time, memory and proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from planner.report.compare_verdict import Compared, incomparable
from planner.report.estimate import _gib as in_gib
from planner.report.estimate import _name as part_name
from planner.report.estimate import _percent as in_percent
from planner.report.estimate import _rate as in_rate
from planner.report.estimate import _scaled as in_unit_of
from planner.report.estimate import _unit as unit_of
from planner.report.plan_words import NOT_SAID, interval_text, layers_text, proof_text, recompute_text, split_text
from planner.spec.estimate import StepTime
from planner.spec.paths import folded
from planner.spec.plan import ModuleSplit
from planner.spec.strategy import Overlap, Strategy
from planner.spec.workload import TrainWorkload

_MOST_SPLITS = 12  # that have a row
_SMALL = 0.005  # of every step: parts below have no row

_Cell = Callable[[Compared], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One row: what it is, and what each plan says."""

    group: str
    name: str
    cells: tuple[str, ...]
    best: tuple[int, ...] = ()  # places of the plans that do best in it, where that means anything

    @property
    def differs(self) -> bool:
        """Whether the plans say different things."""
        return len(set(self.cells)) > 1


def facts(entries: Sequence[Compared]) -> tuple[Fact, ...]:
    """Every fact that some plan says something about, in the order in which a reader asks."""
    found = [_fact(entries, "question", name, cell) for name, cell in _QUESTION]
    found += [_fact(entries, "layout", _plain(key), _strategy_cell(key)) for key in _layout_keys()]
    found += [_fact(entries, "layout", "microbatches", _microbatches)]
    found += [_fact(entries, "layout", "layers by stage", lambda entry: layers_text(entry.plan))]
    found += [_fact(entries, "layout", "recompute", lambda entry: recompute_text(entry.plan))]
    found += _split_facts(entries)
    found += _results(entries)
    return tuple(fact for fact in found if set(fact.cells) != {NOT_SAID})


def common_text(found: Sequence[Fact]) -> str:
    """What is the same in all plans, in a sentence; empty where nothing is."""
    same = [fact for fact in found if not fact.differs and fact.group in ("question", "layout")]
    return ", ".join(f"{fact.name} {fact.cells[0]}" for fact in same)


def _fact(entries: Sequence[Compared], group: str, name: str, cell: _Cell) -> Fact:
    return Fact(group=group, name=name, cells=tuple(cell(entry) for entry in entries))


def _workload_cell(key: str) -> _Cell:
    def cell(entry: Compared) -> str:
        value = getattr(entry.plan.workload, key, NOT_SAID)
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

    return cell


_QUESTION: tuple[tuple[str, _Cell], ...] = (
    ("model", lambda entry: entry.plan.model),
    ("hardware", lambda entry: entry.plan.hardware),
    ("GPUs", lambda entry: f"{entry.plan.gpus:,}"),
    *((key.replace("_", " "), _workload_cell(key))
      for key in ("seq_len", "global_batch", "precision", "optimizer", "stack")),
)  # fmt: skip


def _layout_keys() -> list[str]:
    """Degrees first; recompute has a row of its own that says more."""
    names = [item.name for item in fields(Strategy) if item.name != "recompute"]
    return sorted(names, key=lambda key: key not in ("tp", "pp", "dp", "cp", "ep", "etp", "vpp", "microbatch"))


def _strategy_cell(key: str) -> _Cell:
    neutral = getattr(Strategy(), key)

    def cell(entry: Compared) -> str:
        value = getattr(entry.plan.strategy, key)
        if isinstance(value, Overlap):
            return ", ".join(item.name for item in fields(Overlap) if getattr(value, item.name)) or "none"
        if isinstance(value, bool):
            return "on" if value else "off"
        named = key in ("tp", "pp", "dp", "microbatch", "schedule", "order", "grad_dtype", "zero")
        return str(value) if named or value != neutral else NOT_SAID

    return cell


def _plain(key: str) -> str:
    return {"sp": "sequence parallel", "zero": "ZeRO stage"}.get(key, key.replace("_", " "))


def _microbatches(entry: Compared) -> str:
    workload = entry.plan.workload
    if not isinstance(workload, TrainWorkload):
        return NOT_SAID
    return f"{entry.plan.strategy.microbatches(workload.global_batch):,}"


def _split_facts(entries: Sequence[Compared]) -> list[Fact]:
    """Modules that are cut differently; patterns of one plan are looked up in the others."""
    alike = len({entry.plan.digests.model for entry in entries}) == 1
    if not alike or all(entry.plan.strategy.tp == 1 for entry in entries):
        return []
    patterns = dict.fromkeys(pattern for entry in entries for pattern in entry.plan.modules)
    cells = {pattern: tuple(split_text(_split_of(entry, pattern)) for entry in entries) for pattern in patterns}
    differing = folded({pattern: row for pattern, row in cells.items() if len(set(row)) > 1})
    rows = [Fact(group="splits", name=pattern, cells=row) for pattern, row in differing.items()]
    left = len(rows) - _MOST_SPLITS
    if left > 1:
        more = Fact(group="splits", name=f"and {left} patterns more", cells=("…",) * len(entries))
        return [*rows[:_MOST_SPLITS], more]
    return rows


def _split_of(entry: Compared, pattern: str) -> ModuleSplit | None:
    """What a plan says of a pattern, or of its first module where it names others."""
    first = ".".join(
        part.split(",")[0].split("-")[0] if part[:1].isdigit() else part for part in pattern.split(".")
    )
    return entry.plan.modules.get(pattern) or entry.plan.split_of(first)


def _results(entries: Sequence[Compared]) -> list[Fact]:
    estimates = [entry.estimate for entry in entries]
    longest = max(found.step_seconds for found in estimates)
    unit = unit_of(longest)[1]
    steps = [found.step_seconds for found in estimates]
    fitting = [] if incomparable(entries) else [place for place, found in enumerate(estimates) if found.fits]
    rows = [
        _ranked("time", f"step, {unit}", [in_unit_of(step, longest) for step in steps], steps, fitting),
        Fact(group="time", name="its interval", cells=tuple(
            interval_text(found.uncertainty.step_seconds, found.step_seconds) for found in estimates)),
    ]  # fmt: skip
    for item in fields(StepTime):
        seconds = [getattr(found.breakdown, item.name) for found in estimates]
        if any(part > _SMALL * step for part, step in zip(seconds, steps, strict=True)):
            cells = tuple(in_unit_of(part, longest, finer=1) for part in seconds)
            rows.append(Fact(group="time", name=f"{part_name(item.name)}, {unit}", cells=cells))
    rates = [found.tokens_per_second_per_gpu for found in estimates]
    rows.append(_ranked("time", "tokens/s/GPU", list(map(in_rate, rates)), [-rate for rate in rates], fitting))
    shares = [in_percent(found.mfu, digits=1) for found in estimates]
    rows.append(_ranked("time", "MFU", shares, [-found.mfu for found in estimates], fitting))
    memory = [found.memory_bytes for found in estimates]
    rows.append(_ranked("memory", "memory, GiB", list(map(in_gib, memory)), memory, fitting))
    told: tuple[tuple[str, str, _Cell], ...] = (
        ("memory", "up to, GiB", lambda entry: in_gib(entry.estimate.uncertainty.memory_bytes.high)),
        ("memory", "of the device, GiB", lambda entry: in_gib(entry.estimate.capacity_bytes)),
        ("memory", "fullest stage", _fullest),
        (
            "memory",
            "fits",
            lambda entry: "yes" if entry.estimate.fits else f"no, {in_gib(entry.missing_bytes)} GiB",
        ),
        ("proof", "proof", lambda entry: proof_text(entry.plan)),
        ("proof", "candidates", lambda entry: f"{p.candidates:,}" if (p := entry.plan.certificate) else NOT_SAID),
    )
    return rows + [_fact(entries, group, name, cell) for group, name, cell in told]


def _fullest(entry: Compared) -> str:
    stages = entry.estimate.memory_per_stage
    return str(stages.index(entry.estimate.memory)) if len(stages) > 1 else NOT_SAID


def _ranked(group: str, name: str, cells: Sequence[str], costs: Sequence[float], fitting: Sequence[int]) -> Fact:
    """A row whose least cost of those that fit is the best; equal cells share it, unless all are equal."""
    if not fitting or len(set(cells)) == 1:
        return Fact(group=group, name=name, cells=tuple(cells))
    best = cells[min(fitting, key=lambda place: costs[place])]
    return Fact(
        group=group, name=name, cells=tuple(cells), best=tuple(place for place in fitting if cells[place] == best)
    )
