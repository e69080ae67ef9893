"""How well predicted steps choose among layouts: their errors, and what the chosen one loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from planner.report.accuracy import rank_correlation

Pairs = Sequence[tuple[float, float]]  # predicted and measured seconds


def mean_error(pairs: Pairs) -> float:
    """Mean of |predicted/measured − 1|."""
    return sum(abs(predicted / measured - 1.0) for predicted, measured in pairs) / len(pairs)


def regret(pairs: Pairs) -> float:
    """What the layout that is predicted to be the fastest takes beyond the one that is."""
    return min(pairs)[1] / min(measured for _, measured in pairs) - 1.0


def verdict(pairs: Pairs) -> str:
    """Error and order of all."""
    order = rank_correlation(*zip(*pairs, strict=True))
    told = "too few to rank" if order is None else f"rank correlation {order:+.3f}"
    return f"mean absolute error {mean_error(pairs):.1%}, {told}"


def verdicts(choices: dict[str, Pairs]) -> Iterator[str]:
    """A line for each choice among layouts."""
    for name, pairs in choices.items():
        yield f"  {name:12} {verdict(pairs)}, regret {regret(pairs):.1%}"
