"""Launch costs of a software stack refined by steps that were measured: one factor on all of them.

A step says one number, so no more than one is fitted. Rates of kernels and links were measured for themselves and
stay as they are; what a step adds to them is what the host spends between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.spec.hardware import HardwareProfile
from planner.spec.provenance import Origin
from planner.spec.workload import Stack

LEAST, MOST = 0.25, 4.0  # of the factor: beyond them something else is wrong than launch costs
_SCALED = ("kernel_us", "layer_us", "expert_layer_us", "collective_us", "step_us")
_STEPS = 20  # of a search that narrows by the golden section: far below a percent
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_CLOSE = 1e-3  # to a limit: nearer than the search comes to a factor
_FELT = 0.01  # of a step: less than that over the whole range, and the steps say nothing about the factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """The factor, and the mean error of the steps (as a ratio's logarithm) before and with it."""

    factor: float
    error_before: float
    error_after: float
    felt: bool  # whether the steps depend on launch costs at all

    @property
    def at_limit(self) -> bool:
        """Whether a factor beyond those that are tried might fit better."""
        return self.factor <= LEAST * (1.0 + _CLOSE) or self.factor >= MOST * (1.0 - _CLOSE)


def fitted_factor(price: Callable[[float], Sequence[float]], measured: Sequence[float]) -> Refinement:
    """The factor with the least squared log error; `price` gives predicted steps under a factor.

    Predictions rise with the factor, so the error has one minimum over each step and is searched as if it had
    one over all.
    """

    def error(factor: float) -> float:
        pairs = zip(price(factor), measured, strict=True)
        return math.sqrt(sum(math.log(found / true) ** 2 for found, true in pairs) / len(measured))

    least, most = price(LEAST), price(MOST)
    felt = any(high > low * (1.0 + _FELT) for low, high in zip(least, most, strict=True))
    before = error(1.0)
    if not felt:
        return Refinement(factor=1.0, error_before=before, error_after=before, felt=False)
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(_STEPS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if error(math.exp(left)) <= error(math.exp(right)):
            high = right
        else:
            low = left
    factor = math.exp((low + high) / 2.0)
    after = error(factor)
    if after >= before:
        return Refinement(factor=1.0, error_before=before, error_after=before, felt=True)
    return Refinement(factor=factor, error_before=before, error_after=after, felt=True)


def with_launch_costs(
    profile: HardwareProfile, stack: Stack, factor: float, reference: str = ""
) -> HardwareProfile:
    """A profile with the launch costs of a stack times a factor; with `reference`, marked as measured by it."""
    given = profile.software[stack]
    changed = {key: getattr(given, key) * factor for key in _SCALED}
    if reference:
        origin = Origin(source="measured", reference=reference)
        sources = {key: origin for key in _SCALED if changed[key]}
        changed_stack = replace(given, **changed, other_sources={**given.other_sources, **sources})
    else:
        changed_stack = replace(given, **changed)
    return replace(profile, software={**profile.software, stack: changed_stack})
