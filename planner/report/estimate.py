"""An estimate on a terminal: the verdict, where the time and the memory go, how sure that is, what to do next."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from planner.report.terminal import console, show_table
from planner.spec.estimate import Estimate, Memory
from planner.spec.hardware import HardwareProfile
from planner.spec.part_sources import part_sources
from planner.spec.remedy import Remedy
from planner.spec.requests import TrainingRequest, command_line
from planner.spec.workload import TrainWorkload
from planner.units import GIB

_LONGEST_NAME = 40
_FOLDED = 8  # stages that are shown one by one
_MOSTLY = 0.5
_SMALL = 0.005  # of the step: parts below stand in one row
_NAMES = {
    "matmul": "matrix products",
    "tp": "tp exposed",
    "cp": "cp exposed",
    "ep": "ep exposed",
    "dp": "dp exposed",
    "pp": "pp exposed",
    "host": "waiting for the host",
}
_GROUPS: dict[str, tuple[str, ...]] = {
    "states": ("weights", "gradients", "optimizer"),
    "activations": ("activations",),
    "passing": ("recompute", "logits", "gathered", "buffers", "kv_cache", "other"),
    "reserve": ("reserve", "context"),
}
_SHADES, _PLAIN_SHADES = "█▓▒░·", "#+=-."


def show_estimate(
    found: Estimate,
    profile: HardwareProfile,
    *,
    model: str,
    hardware: str,
    remedies: Sequence[Remedy] | None = None,
) -> None:
    """The verdict first; `model` and `hardware` as the user named them.

    `remedies` are changes after which it would fit, where somebody looked for them.
    """
    out = console()
    _show_verdict(out, found)
    if remedies is not None:
        _show_remedies(out, found, remedies)
    out.print()
    _show_time(out, found, profile)
    out.print()
    _show_memory(out, found)
    out.print()
    _show_certainty(out, found)
    for warning in found.warnings:
        _say(out, f"! {warning}")
    following = _next_command(found, model, hardware, remedies or ())
    out.print(Text(f"\nNext: {following}"), soft_wrap=True)  # one line, to be copied


def _next_command(found: Estimate, model: str, hardware: str, remedies: Sequence[Remedy]) -> str:
    """The first remedy; else what the numbers rest on where most are assumed, else what the model computes."""
    w = found.workload
    assert isinstance(w, TrainWorkload), "serving has its own page"
    if remedies:
        return command_line(model, hardware, TrainingRequest(workload=w, strategy=remedies[0].strategy))
    if not found.fits:
        return "tp-plan list hardware"
    if found.uncertainty.sources.assumed > _MOSTLY:
        return shlex.join(["tp-plan", "explain", hardware])
    sizes = ["--microbatch", str(found.strategy.microbatch), "--seq-len", str(w.seq_len)]
    return shlex.join(["tp-plan", "explain", model, *sizes])


def _show_verdict(out: Console, found: Estimate) -> None:
    device, high, capacity = found.memory_bytes, found.uncertainty.memory_bytes.high, found.capacity_bytes
    pp = found.strategy.pp
    where = f" on stage {found.memory_per_stage.index(found.memory)}" if pp > 1 else ""
    use = f"{_gib(device)} of {_gib(capacity)} GiB{where}, up to {_gib(high)}"
    if found.fits:
        _say(out, f"Fits: {use}", style="bold green")
    elif device <= capacity:
        _say(out, f"May not fit: {use}, which is {_gib(high - capacity)} GiB too much", style="bold yellow")
    else:
        over = f"{_gib(device - capacity)} GiB too much, up to {_gib(high - capacity)}"
        _say(out, f"Does not fit: {_gib(device)} of {_gib(capacity)} GiB{where}, {over}", style="bold red")
    step, total = found.uncertainty.step_seconds, found.step_seconds
    range_ = f"{_scaled(step.low, total)} to {_scaled(step.high, total)}"
    parts = (
        f"{_scaled(total, total)} {_unit(total)[1]}/step, {range_} in {_percent(found.uncertainty.confidence)} of "
        "such runs",
        f"{_rate(found.tokens_per_second_per_gpu)} tokens/s/GPU",
        f"MFU {_percent(found.mfu, digits=1)}",
    )
    _say(out, "   ".join(parts), style="bold")
    _say(out, _what(found))


def _what(found: Estimate) -> str:
    """The layout and the work in a sentence."""
    s, w = found.strategy, found.workload
    assert isinstance(w, TrainWorkload), "serving has its own page"
    count = s.microbatches(w.global_batch)
    gpus = f"{found.gpus:,} GPUs" if found.gpus > 1 else "one GPU"
    layout = f"{s.label}, " if found.gpus > 1 else ""
    pipeline = f", {s.schedule}" if s.pp > 1 else ""
    again = f", {s.recompute} recompute" if s.recompute != "none" else ", no recompute"
    return (
        f"{_short(found.model)} on {gpus} of {_short(found.hardware)}: {layout}{_counted(count, 'microbatch')} of "
        f"{s.microbatch}{pipeline}{again}; {w.global_batch:,} × {w.seq_len:,} tokens in {w.precision}, {w.stack}"
    )


def _show_remedies(out: Console, found: Estimate, remedies: Sequence[Remedy]) -> None:
    """The changes after which it would fit."""
    if not remedies:
        _say(out, "No change that was tried makes it fit: it takes many more GPUs, or shorter sequences.")
        return
    out.print("\nWould fit with")
    rows = [
        (remedy.flags, _gib(remedy.memory_bytes), _gib(remedy.memory_high_bytes),
         _scaled(remedy.step_seconds, found.step_seconds), _pace(remedy, found))
        for remedy in remedies
    ]  # fmt: skip
    unit = _unit(found.step_seconds)[1]
    show_table(out, ("flags", ">GiB", ">up to", f">{unit}/step", "compared"), rows, drop=(">up to",))


def _pace(remedy: Remedy, found: Estimate) -> str:
    ratio = remedy.step_seconds / found.step_seconds
    if abs(ratio - 1.0) < 0.005:
        return "as fast"
    word = "slower" if ratio > 1.0 else "faster"
    if not 0.67 < ratio < 2.0:
        return f"{max(ratio, 1.0 / ratio):.1f}x {word}"
    return f"{_percent(abs(ratio - 1.0))} {word}"


def _show_time(out: Console, found: Estimate, profile: HardwareProfile) -> None:
    """The parts of a step, the longest first; small ones share a row."""
    total = found.step_seconds
    assert isinstance(found.workload, TrainWorkload), "serving has its own page"
    sources: Mapping[str, str] = part_sources(profile, found.workload, found.strategy)
    parts = sorted(found.breakdown.parts.items(), key=lambda part: -part[1])
    small = [key for key, seconds in parts if 0.0 < seconds < _SMALL * total]
    shown = [(key, seconds) for key, seconds in parts if seconds > 0.0 and (key not in small or len(small) == 1)]
    rows = [
        (_name(key), _scaled(seconds, total, finer=1), _bar(out, seconds / total), _percent(seconds / total),
         sources.get(key, "formula"))
        for key, seconds in shown
    ]  # fmt: skip
    if len(small) > 1:
        seconds = sum(found.breakdown.parts[key] for key in small)
        named = ", ".join(_name(key) for key in small)
        origins = {sources.get(key, "formula") for key in small}
        source = origins.pop() if len(origins) == 1 else "mixed"
        rows.append((named, _scaled(seconds, total, finer=1), "", _percent(seconds / total), source))
    rows.append(("a step", _scaled(total, total, finer=1), "", "", ""))
    show_table(out, ("time", f">{_unit(total)[1]}", "", ">share", "source"), rows, drop=("source", ""))


def _show_memory(out: Console, found: Estimate) -> None:
    """Each stage's fullest GPU against the device, then the parts of the worst."""
    stages, capacity = found.memory_per_stage, found.capacity_bytes
    worst, shades = stages.index(found.memory), _shades(out)
    rows = [
        (name, *_memory_cells(stages[place], capacity, found.memory_bytes, 40 if out.width >= 80 else 20, shades))
        for place, name in _shown_stages(stages, worst)
    ]
    if len(stages) > _FOLDED:
        rest = [memory for place, memory in enumerate(stages) if place not in (0, worst, len(stages) - 1)]
        low, high = min(item.device_bytes for item in rest), max(item.device_bytes for item in rest)
        rows.append((f"{len(rest)} others", f"{_gib(low)}–{_gib(high)}", *[""] * (1 + len(_GROUPS))))
    legend = " ".join(f"{shade} {group}" for shade, group in zip(shades, _GROUPS, strict=False))
    numbers = [f">{group}" for group in _GROUPS]
    show_table(out, ("memory", f">of {_gib(capacity)} GiB", legend, *numbers), rows, drop=numbers[::-1])
    parts = sorted(found.memory.parts.items(), key=lambda part: -part[1])
    told = [f"{_name(key)} {_gib(size)}" for key, size in parts if size > 0.0]
    _say(out, f"{_place(worst, len(stages))} in GiB: {', '.join(told)}")


def _memory_cells(memory: Memory, capacity: float, most: float, cells: int, shades: str) -> tuple[str, ...]:
    """What a GPU takes, as a bar whose upright stands at the device's memory, and by group."""
    sizes = [sum(getattr(memory, f"{part}_bytes") for part in parts) for parts in _GROUPS.values()]
    full, bar, used = max(capacity, most), "", 0.0
    for size, shade in zip(sizes, shades, strict=False):
        used += size
        bar += shade * (round(cells * used / full) - len(bar))
    end = round(cells * capacity / full)
    bar = bar.ljust(end, shades[-1])
    return _gib(memory.device_bytes), f"{bar[:end]}|{bar[end:]}", *map(_gib, sizes)


def _shown_stages(stages: Sequence[Memory], worst: int) -> list[tuple[int, str]]:
    """The stages that have a row: all of a few, otherwise the fullest, the first and the last."""
    last = len(stages) - 1
    if len(stages) <= _FOLDED:
        return [(place, _place(place, len(stages))) for place in range(len(stages))]
    kept = dict.fromkeys((worst, 0, last))
    return [(place, _place(place, len(stages)) + (", fullest" if place == worst else "")) for place in kept]


def _place(stage: int, stages: int) -> str:
    return f"stage {stage}" if stages > 1 else "each GPU"


def _show_certainty(out: Console, found: Estimate) -> None:
    """The intervals, what they were learned from, and what the numbers behind are."""
    known, unit = found.uncertainty, _unit(found.step_seconds)[1]
    step, memory = known.step_seconds, known.memory_bytes
    shares = {kind: getattr(known.sources, kind) for kind in ("measured", "datasheet", "paper", "assumed")}
    told = [f"{_percent(share)} {kind}" for kind, share in shares.items() if share > 0.0]
    _say(
        out,
        f"Intervals hold {_percent(known.confidence)} of the published runs most like this ({known.regime}): step "
        f"{_scaled(step.low, found.step_seconds)} to {_scaled(step.high, found.step_seconds)} {unit}, memory "
        f"{_gib(memory.low)} to {_gib(memory.high)} GiB.",
    )
    _say(out, f"The step rests on numbers that are {', '.join(told)}.")


def _say(out: Console, text: str, *, style: str = "") -> None:
    """A sentence, wrapped between words with its further lines set in."""
    for line in textwrap.wrap(text, out.width, subsequent_indent="  ") or [""]:
        out.print(Text(line, style=style))


def _name(key: str) -> str:
    plain = key.removesuffix("_seconds").removesuffix("_bytes")
    return _NAMES.get(plain, plain.replace("_", " "))


def _short(name: str) -> str:
    """A name that leaves room for what else stands in its line."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _bar(out: Console, share: float) -> str:
    cells = max(10, min(32, (out.width - 40) // 2))  # what a terminal has room for beside the numbers
    return _shades(out)[0] * round(cells * share)


def _shades(out: Console) -> str:
    """Characters of bars that the stream can write."""
    try:
        _SHADES.encode(out.encoding)
    except (UnicodeEncodeError, LookupError):
        return _PLAIN_SHADES
    return _SHADES


def _unit(seconds: float) -> tuple[float, str]:
    """What a time is told in: seconds, or a smaller unit where they would be zeros."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.1 * scale:
            return scale, unit
    return 1e-9, "ns"


def _scaled(seconds: float, total: float, *, finer: int = 0) -> str:
    """A time in the unit of the whole, with the whole's decimals: three digits, and all of a large number."""
    scale, _ = _unit(total)
    whole = total / scale
    decimals = 3 if whole < 1.0 else 2 if whole < 10.0 else 1 if whole < 100.0 else 0
    return f"{seconds / scale:,.{decimals + finer}f}"


def _gib(size: float) -> str:
    count = size / GIB
    if count >= 1000.0:
        return f"{count:,.0f}"
    return f"{count:.1f}" if count >= 1.0 or count == 0.0 else f"{count:.2f}" if count >= 0.005 else "<0.01"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 99.5 else f"{rate:.3g}"


def _counted(number: int, what: str) -> str:
    """`1 microbatch`, `2 microbatches`."""
    return f"{number:,} {what}" + ("" if number == 1 else "es")


def _percent(share: float, *, digits: int = 0) -> str:
    percent = 100.0 * share
    if 0.0 < percent < 0.5 * 10.0**-digits:
        return f"<{10.0**-digits:g} %"
    return f"{percent:,.{digits}f} %"
