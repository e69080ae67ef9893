"""Launch costs fitted to steps made up of a known part for the device and a known part for the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from planner.cost.refine import MOST, fitted_factor, with_launch_costs
from tests.cost.training_cases import hardware


def steps(factor: float) -> Sequence[float]:
    """Two steps: a second on the device, and of the host one or three tenths times the factor."""
    return [1.0 + 0.1 * factor, 1.0 + 0.3 * factor]


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_the_factor_behind_the_steps_is_found(true: float) -> None:
    found = fitted_factor(steps, steps(true))
    assert found.factor == pytest.approx(true, rel=1e-3)
    assert found.error_after < 1e-4
    assert found.felt
    assert not found.at_limit


def test_a_factor_has_its_limits() -> None:
    found = fitted_factor(steps, [30.0, 30.0])
    assert found.factor == pytest.approx(MOST, rel=1e-3)
    assert found.error_before > found.error_after > math.log(10.0)
    assert found.at_limit
    assert fitted_factor(steps, [1e-3, 1e-3]).at_limit


def test_steps_that_do_not_depend_on_launches_change_nothing() -> None:
    found = fitted_factor(lambda factor: [2.0 + 1e-3 * factor], [3.0])
    assert (found.factor, found.felt) == (1.0, False)
    assert found.error_after == found.error_before == pytest.approx(math.log(3.0 / 2.001))


def test_what_was_refined_says_so() -> None:
    profile = hardware("dgx-h100")
    before = profile.software["eager"]
    after = with_launch_costs(profile, "eager", 2.0, "two runs").software["eager"]
    assert after.kernel_us == 2.0 * before.kernel_us
    assert after.origin("kernel_us").source == "measured"
    assert after.origin("kernel_us").reference == "two runs"
    assert after.origin("attention_share") == before.origin("attention_share")
    assert with_launch_costs(profile, "eager", 1.0) == profile
