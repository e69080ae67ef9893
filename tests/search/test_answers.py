"""Answers over several numbers of GPUs: each objective against every number tried by itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from planner.errors import PlannerError
from planner.search.answers import Answer, Question, answer, figures, runners_up, searched
from planner.search.objectives import step_limit_seconds, value_of
from planner.search.optimize import Progress
from planner.search.variations import every_recompute, every_schedule
from planner.spec.wishes import Wishes
from tests.cost.training_cases import workload
from tests.search.questions import best_seconds, cluster, planned, question

COUNTS = (1, 2, 3, 4, 8)
GOALS: dict[str, dict[str, Any]] = {
    "time": {},
    "gpus": {"minimize": "gpus", "deadline_seconds": 0.05},
    "cost": {"minimize": "cost_per_token", "price_per_gpu_hour": 3.0},
}


def each(asked: Question) -> dict[int, Answer]:
    """The best of every number by itself, whatever its step."""
    wishes = dataclasses.replace(asked.wishes, minimize="step_seconds", deadline_seconds=0.0)
    return {gpus: answer(dataclasses.replace(asked, wishes=wishes), (gpus,)) for gpus in COUNTS}


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("memory", [1.0, 8.0 / 1024])
def test_the_best_of_several_is_the_best_of_each(goal: str, memory: float) -> None:
    asked = question(profile=cluster(memory_gib=memory), **GOALS[goal])
    deadline = asked.wishes.deadline_seconds or math.inf
    values = {
        gpus: value_of(asked.wishes, asked.workload, gpus, one.found.best[0].seconds)
        for gpus, one in each(asked).items()
        if one.found.best and one.found.best[0].seconds <= deadline
    }
    found = answer(asked, COUNTS)
    proof = found.found.certificate
    assert proof.objective == pytest.approx(min(values.values()), rel=1e-12)
    assert found.gpus in {gpus for gpus, value in values.items() if value <= proof.objective * (1 + 1e-12)}
    assert proof.bound == proof.objective
    assert proof.minimize == asked.wishes.minimize
    assert proof.candidates == proof.pruned + proof.solved + sum(proof.illegal.values())
    assert planned(found).certificate == proof
    assert answer(asked, COUNTS).found == found.found


def test_layers_in_several_lists_make_no_stages() -> None:
    """Of a module of one's own: the executor cuts one list."""
    asked = question()
    graph = dataclasses.replace(asked.graph, own=True)
    layers = [place for place in graph.sequence if place.path]
    moved = {place: dataclasses.replace(place, path=f"other.{place.path}") for place in layers[2:]}
    apart = dataclasses.replace(graph, sequence=tuple(moved.get(place, place) for place in graph.sequence))
    for found, most in ((graph, 4), (apart, 1)):
        assert max(dataclasses.replace(asked, spec=None, graph=found).space(4).layouts.pp) == most


def test_a_users_module_is_planned_as_the_executor_runs_it() -> None:
    asked = question()
    own = dataclasses.replace(asked, spec=None, graph=dataclasses.replace(asked.graph, own=True))
    columns = own.space(4).layouts
    assert max(columns.cp) == max(columns.vpp) == 1
    assert set(columns.schedule) == {"gpipe", "1f1b"}
    assert own.wishes.allowed_recompute == ("none", "full")
    assert every_recompute(own).wishes == every_schedule(own).wishes == own.wishes


def test_the_certificate_is_the_sum_of_all_numbers() -> None:
    asked = question()
    spaces = [asked.space(gpus) for gpus in COUNTS]
    proof = answer(asked, COUNTS).found.certificate
    assert proof.candidates == sum(space.candidates for space in spaces)
    assert sum(proof.illegal.values()) == sum(sum(space.illegal.values()) for space in spaces)


def test_the_fewest_gpus_meet_the_deadline_and_no_fewer_do() -> None:
    steps = {gpus: best_seconds(question(), gpus) for gpus in COUNTS if gpus != 3}
    asked = question(minimize="gpus", deadline_seconds=steps[4])
    assert answer(asked, COUNTS).gpus == 4
    tighter = question(minimize="gpus", deadline_seconds=steps[4] * (1 - 1e-6))
    assert answer(tighter, COUNTS).gpus == 8
    nobody = question(minimize="gpus", deadline_seconds=steps[8] * 0.5)
    assert answer(nobody, COUNTS).found.best == ()


def test_the_cost_of_a_token_by_hand() -> None:
    wishes = Wishes.from_dict(GOALS["cost"])
    work = workload(seq_len=100, global_batch=36)
    assert value_of(wishes, work, 8, 30.0) == pytest.approx(3.0 * 8 * 30.0 / 3600 / 3600)
    best = value_of(wishes, work, 8, 30.0)
    assert step_limit_seconds(wishes, work, 4, best) == pytest.approx(60.0)


def test_numbers_that_nothing_divides_are_passed_over() -> None:
    asked = question(fix="tp=2")
    assert answer(asked, (1, 2, 3)).gpus == 2
    with pytest.raises(PlannerError) as caught:
        answer(asked, (1, 3))
    assert caught.value.key == "fix"


def test_numbers_without_a_legal_layout_count_and_give_nothing() -> None:
    asked = question(batch=5, fix="tp=1,cp=1,pp=1")
    found = answer(asked, (2, 3))
    assert found.found.best == ()
    assert found.found.certificate.illegal["batch"] == found.found.certificate.candidates
    assert runners_up(found) == ()
    assert answer(asked, (2, 3, 5)).gpus == 5


def test_memory_for_nothing_gives_nothing() -> None:
    found = answer(question(max_memory_bytes=2.0**10), (4,))
    assert found.found.best == ()
    assert found.found.certificate.solved == 0
    assert not found.found.interrupted


class _Interrupts:
    """Progress that interrupts at a report."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, progress: Progress) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupt_gives_the_best_so_far() -> None:
    asked = question("mixtral", profile=cluster(link_gb=0.05))
    whole = answer(asked, (4, 8))
    stopped = answer(asked, (4, 8), progress=_Interrupts(0))
    assert stopped.found.interrupted
    assert stopped.found.best
    proof = stopped.found.certificate
    assert proof.bound <= whole.found.certificate.objective <= proof.objective * (1 + 1e-12)
    assert proof.gap > 0.0


def test_an_interrupt_before_anything_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupts(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Question, "space", interrupts)
    with pytest.raises(KeyboardInterrupt):
        answer(question(), (4,))


def test_the_fewest_gpus_are_proven_though_the_step_is_not() -> None:
    asked = question("mixtral", profile=cluster(link_gb=0.05), minimize="gpus", deadline_seconds=0.035)
    found = answer(asked, (8, 16), progress=_Interrupts(0))
    assert found.found.best
    assert found.found.interrupted
    assert found.found.certificate.gap == 0.0


def test_runners_up_have_other_degrees_and_a_reason() -> None:
    found = answer(question(profile=cluster(link_gb=0.5)), (8,))
    others = runners_up(found)
    assert 1 <= len(others) <= 5
    best = found.found.best[0]
    degrees = [(s.tp, s.pp, s.cp, s.ep) for s in (best.arrangement.strategy, *(o.strategy for o in others))]
    assert len(set(degrees)) == len(degrees)
    for other in others:
        assert other.objective >= best.seconds
        slower = 100 * (other.objective / best.seconds - 1)
        assert f"{slower:.0f}." in other.reason or f"{slower:.1f} %" in other.reason or "as fast" in other.reason
        assert other.memory_bytes > 0


def test_figures_are_those_of_the_search() -> None:
    found = answer(question(), (8,))
    for solved in found.found.best:
        assert figures(found.question, solved.arrangement).step.total_seconds == pytest.approx(
            solved.seconds, rel=1e-12
        )


def test_a_limit_only_lets_shorter_steps_through() -> None:
    asked = question()
    best = best_seconds(asked, 8)
    assert searched(asked, 8, limit_seconds=best).found.best == ()
    assert searched(asked, 8, limit_seconds=best * 1.001).found.best[0].seconds == pytest.approx(best, rel=1e-12)
