"""What a search found out around a plan: who lost, which limit binds, what easing it buys, what flips the choice.

Each is the outcome of solving again, never a guess: a limit is eased or a parameter changed, and the objective
before and after stands beside the layout that is then the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from planner.errors import PlannerError
from planner.spec.codec import decode, encode
from planner.spec.plan import Objective
from planner.spec.strategy import Strategy
from planner.spec.yaml_text import Source

FindingKind = Literal["runner_up", "binding", "easing", "flip", "untried"]
FindingUnit = Literal["objective", "bytes", "gpus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fact that explains a plan; what `text`, `before` and `after` hold depends on the kind.

    runner_up: why `strategy` lost; the plan's objective and its own.
    binding: a limit in words, such as `memory of stage 0`; what the plan uses of it and the limit, in `unit`.
    easing: how a limit is eased, such as `4 GiB more memory`; the objective and the best one with that.
    flip: a change such as `inter_node_bandwidth × 2.1`; with it the plan's objective, and that of `strategy`.
    untried: what was not solved for want of time; the plan's objective, twice.
    """

    kind: FindingKind
    text: str
    before: Objective
    after: Objective
    unit: FindingUnit = "objective"  # as the certificate's, where it is not of a limit
    key: str = ""  # of the limit or parameter, as a flag or a dotted key names it
    strategy: Strategy | None = None  # the layout that lost, or that is the best after the change

    def __post_init__(self) -> None:
        for holds, key, value, rule, remedy in self._rules():
            if not holds:
                raise PlannerError(rule, value=value, remedy=remedy, key=key)

    def _rules(self) -> tuple[tuple[bool, str, object, str, str], ...]:
        kind = self.kind
        return (
            (bool(self.text.strip()), "text", self.text, "a finding says in words what was found", "give text"),
            (kind == "binding" or self.unit == "objective", "unit", self.unit,
             "what is compared is the objective, except of a limit that binds", "leave unit out"),
            (kind not in ("runner_up", "flip") or self.strategy is not None, "strategy", None,
             f"a {kind} names a layout", "give strategy"),
            (kind != "easing" or self.after <= self.before * (1 + 1e-9), "after", self.after,
             f"easing a limit never makes the objective, {self.before}, worse", "solve again"),
        )  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any, source: Source | None = None) -> Finding:
        """A finding from plain data."""
        return decode(cls, data, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain data without neutral keys."""
        data: dict[str, Any] = encode(self, omit_defaults=True)
        return data

    @property
    def saving(self) -> float:
        """Share of `before` that `after` saves; below 0 where it takes more."""
        return 1.0 - self.after / self.before if self.before else 0.0
