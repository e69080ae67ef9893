"""What explains a plan: every finding checked by solving the changed question apart."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest

from planner.search.answers import Question, answer, figures
from planner.search.arranged import arrangement_of
from planner.search.findings import KINDS, findings_of
from planner.search.variations import scaled, varied
from planner.spec.findings import Finding
from planner.spec.strategy import Strategy
from tests.search.questions import best_seconds, cluster, planned, question

DEGREES = ("tp", "pp", "cp", "dp", "ep")


def degrees(strategy: Strategy) -> tuple[int, ...]:
    return tuple(getattr(strategy, key) for key in DEGREES)


def of(found: Sequence[Finding], kind: str) -> list[Finding]:
    return [finding for finding in found if finding.kind == kind]


def explained(asked: Question, gpus: int, *kinds: Any) -> tuple[Finding, ...]:
    return findings_of(asked, gpus, planned(answer(asked, (gpus,))), seconds=math.inf, kinds=kinds)


def test_a_flip_is_where_other_degrees_win() -> None:
    asked = question(profile=cluster(link_gb=2.0))
    plan = planned(answer(asked, (8,)))
    flips = findings_of(asked, 8, plan, seconds=math.inf, kinds=("flip",))
    assert flips
    for flip in flips:
        factor = float(re.split("× ", flip.text)[1])
        after = answer(scaled(asked, flip.key, factor), (8,)).found.best[0]
        assert after.seconds == pytest.approx(flip.after, rel=1e-9)
        assert flip.strategy is not None
        assert degrees(after.arrangement.strategy) == degrees(flip.strategy) != degrees(plan.strategy)
        own = figures(scaled(asked, flip.key, factor), arrangement_of(plan, asked.graph)).step.total_seconds
        assert own == pytest.approx(flip.before, rel=1e-9)
        nearer = factor**0.9
        before = answer(scaled(asked, flip.key, nearer), (8,)).found.best[0]
        assert degrees(before.arrangement.strategy) == degrees(plan.strategy)


def test_easing_never_worsens_and_is_what_solving_says() -> None:
    asked = question(profile=cluster(link_gb=0.5), fix="zero=0,tp=2", recompute=["full"])
    found = {finding.text: finding for finding in explained(asked, 4, "easing")}
    best = best_seconds(asked, 4)
    for finding in found.values():
        assert finding.before == pytest.approx(best)
        assert finding.after <= finding.before
        assert (finding.strategy is None) == (finding.after == finding.before)
    free = dataclasses.replace(
        asked, wishes=dataclasses.replace(asked.wishes, recompute=("none", "selective", "full"))
    )
    assert found["every recomputation allowed"].after == pytest.approx(best_seconds(free, 4))
    assert found["every recomputation allowed"].saving > 0.05
    assert found["tp free, not 2"].saving > 0.0
    assert {finding.key for finding in found.values()} >= {"memory", "fix.zero", "fix.tp", "recompute"}


def test_memory_that_is_full_binds_and_more_of_it_buys_time() -> None:
    roomy = question(recompute=["none", "full"])
    high = answer(roomy, (4,)).found.best[0]
    need = figures(roomy, high.arrangement).memory_bytes
    headroom = 1.2
    asked = dataclasses.replace(
        roomy, wishes=dataclasses.replace(roomy.wishes, max_memory_bytes=need * headroom * 0.8)
    )
    plan = planned(answer(asked, (4,)))
    found = findings_of(asked, 4, plan, seconds=math.inf, kinds=("binding", "easing"))
    (more,) = (finding for finding in of(found, "easing") if finding.text == "4 GiB more memory")
    assert more.after == pytest.approx(high.seconds)
    for finding in of(found, "binding"):
        assert finding.unit == "bytes"
        assert 0.98 * finding.after < finding.before <= finding.after
    full = plan.estimate.uncertainty.memory_bytes.high / asked.wishes.max_memory_bytes
    assert bool(of(found, "binding")) == (full > 0.98)


def test_memory_that_is_just_enough_binds() -> None:
    roomy = question()
    plan = planned(answer(roomy, (4,)))
    enough = plan.estimate.uncertainty.memory_bytes.high * 1.001
    asked = dataclasses.replace(roomy, wishes=dataclasses.replace(roomy.wishes, max_memory_bytes=enough))
    (binding,) = explained(asked, 4, "binding")
    assert binding.before == pytest.approx(plan.estimate.uncertainty.memory_bytes.high)
    assert binding.after == pytest.approx(enough)
    assert "each GPU" in binding.text


def test_runners_up_are_the_best_of_their_degrees() -> None:
    asked = question(profile=cluster(link_gb=0.5))
    best = best_seconds(asked, 4)
    for finding in explained(asked, 4, "runner_up"):
        assert finding.strategy is not None
        held = {key: getattr(finding.strategy, key) for key in DEGREES}
        wishes = dataclasses.replace(asked.wishes, fix=type(asked.wishes.fix)(**held))
        assert best_seconds(dataclasses.replace(asked, wishes=wishes), 4) == pytest.approx(finding.after)
        assert finding.before == pytest.approx(best)
        assert finding.after >= best


def test_of_a_plan_that_was_given_the_best_is_told() -> None:
    asked = question(profile=cluster(link_gb=0.5))
    held = dataclasses.replace(asked, wishes=dataclasses.replace(asked.wishes, fix=type(asked.wishes.fix)(tp=4)))
    plan = dataclasses.replace(planned(answer(held, (4,))), certificate=None, runners_up=())
    (better,) = findings_of(asked, 4, plan, kinds=("runner_up",))
    assert better.after == pytest.approx(best_seconds(asked, 4))
    assert better.saving > 0.0
    assert "slower" in better.text


def test_without_time_the_rest_is_told_and_runners_up_are_the_plans() -> None:
    asked = question(profile=cluster(link_gb=0.5))
    plan = planned(answer(asked, (4,)))
    found = findings_of(asked, 4, plan, seconds=-1.0)
    assert [finding.text for finding in of(found, "runner_up")] == [other.reason for other in plan.runners_up]
    (untried,) = of(found, "untried")
    assert "4 GiB more memory" in untried.text
    assert "more intra-node bandwidth" in untried.text
    assert not of(found, "easing")


def test_the_fewest_gpus_are_eased_to_half_of_them() -> None:
    best = best_seconds(question(), 4)
    wishes = {"minimize": "gpus", "deadline_seconds": best * 1.01, "fix": "cp=1"}
    asked, free = question(recompute=["full"], **wishes), question(**wishes)
    found = answer(asked, (2, 4, 8))
    assert (found.gpus, answer(free, (2, 4, 8)).gpus) == (8, 4)
    easings = findings_of(asked, 8, planned(found), seconds=math.inf, kinds=("easing",))
    halved = {finding.key: (finding.before, finding.after) for finding in easings}
    assert halved == {"memory": (8.0, 8.0), "fix.cp": (8.0, 8.0), "recompute": (8.0, 4.0)}


def test_doubling_every_bandwidth_never_worsens() -> None:
    asked = question("mixtral", profile=cluster(link_gb=0.05))
    faster, _ = varied(asked, 8, {"intra_node_bandwidth": "2x", "memory_bandwidth": "2x"})
    assert best_seconds(faster, 8) <= best_seconds(asked, 8)


def test_the_same_findings_twice() -> None:
    asked = question(profile=cluster(link_gb=2.0))
    assert explained(asked, 4, *KINDS) == explained(asked, 4, *KINDS)
