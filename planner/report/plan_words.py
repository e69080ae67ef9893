"""What a plan says, in the words that a terminal, a page and a picture share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from planner.spec.estimate import Interval
from planner.spec.paths import Span, is_pattern
from planner.spec.plan import ModuleSplit, Plan, Stage

NOT_SAID = "–"


def interval_text(known: Interval, middle: float) -> str:
    """`±6 %`, or the two ends where they lie unevenly."""
    low, high = 1.0 - known.low / middle if middle else 0.0, known.high / middle - 1.0 if middle else 0.0
    below, above = f"{100 * low:.0f}", f"{100 * high:.0f}"
    return f"±{above} %" if below == above else f"−{below} to +{above} %"


def ratio_text(ratio: float) -> str:
    """`1.18x`."""
    return f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:,.0f}x"


def proof_text(plan: Plan) -> str:
    """What is known of better layouts: `proven optimal`, the gap, or nothing."""
    proof = plan.certificate
    if proof is None:
        return "given, not searched"
    if proof.gap < 1e-9:
        return "proven optimal"
    return f"gap at most {100 * proof.gap:.2g} %"


def layers_text(plan: Plan) -> str:
    """`19, 2 × 20, 19`: layers of each stage, all its virtual stages together."""
    counts = [sum(len(span) for span in stage.layers) for stage in plan.stages]
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][1] == count:
            runs[-1][0] += 1
        else:
            runs.append([1, count])
    return ", ".join(f"{times} × {count}" if times > 1 else str(count) for times, count in runs)


def recompute_text(plan: Plan) -> str:
    """What backward computes again: block by block where the plan says so."""
    if not plan.recompute:
        return plan.strategy.recompute
    words: dict[str, list[str]] = {}
    for pattern, word in plan.recompute.items():
        words.setdefault(word, []).append(pattern)
    return "; ".join(f"{word}: {', '.join(patterns)}" for word, patterns in words.items())


def split_text(split: ModuleSplit | None) -> str:
    """`column, sequence → features`."""
    return NOT_SAID if split is None else f"{split.split}, {split.input} → {split.output}"


def recompute_by_stage(plan: Plan) -> list[tuple[str, str]]:
    """Stages and what backward computes again there, equal neighbours together.

    Nothing where the plan does not tell blocks apart, or not by the numbers that its layers have.
    """
    before = {pattern.rpartition(".")[0] for pattern in plan.recompute}
    numbered = all(pattern[-1:].isdigit() and is_pattern(pattern) for pattern in plan.recompute)
    if len(before) != 1 or not numbered:
        return []
    (prefix,) = before
    told = [_recomputed(plan, stage, prefix) for stage in plan.stages]
    return _together(told)


def _recomputed(plan: Plan, stage: Stage, prefix: str) -> str:
    """`3 of 20 layers full, 17 selective`."""
    layers = [layer for span in stage.layers for layer in range(span.first, span.last + 1)]
    counts = Counter(plan.recompute_of(f"{prefix}.{layer}") for layer in layers)
    words = [(counts[word], word) for word in ("full", "selective") if counts[word]]
    if not words:
        return "none"
    (count, word), *others = words
    if count == len(layers):
        return f"all {count} layers {word}" if count > 1 else f"its layer {word}"
    return ", ".join([f"{count} of {len(layers)} layers {word}", *(f"{more} {other}" for more, other in others)])


def _together(told: Sequence[str]) -> list[tuple[str, str]]:
    """Texts by stage → texts by stretches of stages."""
    stretches: list[tuple[Span, str]] = []
    for place, text in enumerate(told):
        if stretches and stretches[-1][1] == text:
            stretches[-1] = (Span(stretches[-1][0].first, place), text)
        else:
            stretches.append((Span(place, place), text))
    if len(told) == 1:
        return [("each GPU", told[0])]
    return [(f"stage{'s' if len(span) > 1 else ''} {span.to_plain()}", text) for span, text in stretches]
