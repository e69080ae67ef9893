"""Why nothing fits: the closest layout against all of them, and every change solved again."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest

from planner.api import trace
from planner.cost.training import TrainingCost
from planner.cost.uncertainty import memory_headroom
from planner.errors import PlannerError
from planner.search.answers import Question, answer
from planner.search.refusals import closest, why_not
from planner.search.variations import with_wishes
from planner.spec.hardware_sources import load_hardware
from planner.spec.misfit import Misfit
from planner.spec.sources import UserModule
from planner.spec.wishes import Wishes
from planner.spec.workload import TrainWorkload
from tests.execute import own_models
from tests.search.questions import best_seconds, cluster, question

KIB = 1024.0


def tight(**keys: Any) -> Question:
    """Less memory than any layout takes."""
    return question(**{"max_memory_bytes": 900 * KIB, **keys})


def refused(asked: Question, gpus: tuple[int, ...]) -> Misfit:
    assert answer(asked, gpus).found.best == ()
    return why_not(asked, gpus, seconds=math.inf)


@functools.cache
def too_large() -> Misfit:
    return refused(tight(), (4,))


@pytest.mark.parametrize("model", ["llama", "mixtral"])
@pytest.mark.parametrize("recompute", [["none"], ["none", "selective", "full"]])
def test_the_closest_has_the_least_memory_of_all_even_layouts(model: str, recompute: list[str]) -> None:
    asked = question(model, recompute=recompute)
    space = asked.space(4)
    found = closest(asked, space)
    strategies = [
        dataclasses.replace(space.strategy(row), recompute=word)
        for row in range(len(space))
        for word in asked.wishes.allowed_recompute
    ]
    device = TrainingCost(asked.graph, asked.profile, asked.workload).costs(strategies).device_bytes
    assert found.memory.device_bytes == pytest.approx(device.min(), rel=1e-12)
    headroom = memory_headroom(asked.graph, asked.profile, asked.workload)
    assert found.high_bytes == pytest.approx(device.min() * headroom, rel=1e-12)
    assert found.missing_bytes == 0.0


@pytest.mark.parametrize("fixed", ["dp=4,zero=3", "tp=2"])
def test_the_closest_is_found_where_it_just_fits(fixed: str) -> None:
    """Of a module whose table could be cut and whose head, with the same weight, cannot."""
    graph = trace(UserModule(path=Path(own_models.__file__), function="pair"))
    asked = Question(
        spec=None,
        graph=graph,
        profile=load_hardware("dgx-h100"),
        workload=TrainWorkload(seq_len=16, global_batch=8, precision="bf16"),
        wishes=Wishes.from_dict({"fix": fixed}),
    )
    needed = closest(asked, asked.space(4)).high_bytes
    assert answer(with_wishes(asked, max_memory_bytes=needed * (1 + 1e-9)), (4,)).found.best


def test_memory_by_how_much_and_what_would_fit() -> None:
    asked = tight()
    found = too_large()
    assert (found.limit, found.gpus) == ("memory", (4,))
    assert found.closest is not None
    assert found.closest.missing_bytes == pytest.approx(found.closest.high_bytes - 900 * KIB)
    flags = [change.flags for change in found.changes]
    assert flags[0] == "--gpus 8"
    assert any(flag.startswith("--max-memory") for flag in flags)
    assert any(flag.startswith("--seq-len") for flag in flags)
    more = found.changes[0]
    assert answer(asked, (8,)).found.best[0].seconds == pytest.approx(more.step_seconds, rel=1e-12)
    assert more.memory_high_bytes <= 900 * KIB
    assert found.lines[0].startswith("error[memory]: no layout fits 900 KiB on 4 GPUs")


def test_each_change_of_memory_is_solved() -> None:
    asked, found = tight(), too_large()
    (length,) = (change for change in found.changes if change.flags.startswith("--seq-len"))
    shorter = dataclasses.replace(asked.workload, seq_len=int(length.flags.split()[1]))
    assert best_seconds(dataclasses.replace(asked, workload=shorter), 4) == pytest.approx(length.step_seconds)
    longer = dataclasses.replace(asked.workload, seq_len=2 * shorter.seq_len)
    assert answer(dataclasses.replace(asked, workload=longer), (4,)).found.best == ()


def test_recompute_and_fixed_keys_are_let_go() -> None:
    asked = tight(max_memory_bytes=1300 * KIB, recompute=["none"], fix="zero=1")
    found = refused(asked, (4,))
    flags = {change.flags: change for change in found.changes}
    assert "leave zero free" in flags
    free = dataclasses.replace(asked, wishes=dataclasses.replace(asked.wishes, fix=type(asked.wishes.fix)()))
    assert best_seconds(free, 4) == pytest.approx(flags["leave zero free"].step_seconds)


def test_what_is_held_together_is_let_go_together() -> None:
    asked = question(
        max_memory_bytes=1000 * KIB, recompute=["none"], fix="zero=0,tp=1,pp=1", length=96,
        profile=cluster(topology__flat__gpus=4),
    )  # fmt: skip
    found = refused(asked, (4,))
    assert found.changes, found.lines
    assert "allow recompute" in found.failed
    assert "leave zero free" in found.failed


def test_a_deadline_that_nobody_meets() -> None:
    best = best_seconds(question(), 4)
    asked = question(minimize="gpus", deadline_seconds=best * 0.75)
    found = refused(asked, (2, 4))
    assert found.limit == "deadline"
    assert found.best_seconds == pytest.approx(best)
    assert "33.3 % too long" in found.value
    assert found.changes[0].flags == "--gpus 8"
    assert found.changes[0].step_seconds <= best * 0.75


def test_rules_are_counted_and_the_batch_is_mended() -> None:
    found = refused(question(batch=5, fix="tp=1,pp=1,cp=1"), (4,))
    assert found.limit == "rules"
    assert found.illegal == {"batch": found.candidates}
    assert "divides the global batch" in found.value
    flags = [change.flags for change in found.changes]
    assert "--global-batch 4" in flags
    assert "leave tp free" in flags
    assert found.closest is None


def test_fixed_degrees_that_divide_nothing_are_an_error() -> None:
    with pytest.raises(PlannerError) as caught:
        why_not(question(fix="tp=3"), (4,))
    assert caught.value.key == "fix"


def test_without_time_nothing_is_tried_and_that_is_told() -> None:
    found = why_not(tight(), (4,), seconds=-1.0)
    assert found.changes == ()
    assert found.failed == ()
    assert "up to" in found.untried[0]
    assert any("not tried" in line for line in found.lines)
    assert found.remedy.startswith("unknown")


def test_a_search_that_was_ended_too_soon() -> None:
    found = why_not(question(time_limit_seconds=5.0), (4,))
    assert found.limit == "time"
    assert [change.flags for change in found.changes] == ["leave --time-limit out"]


def test_the_same_answer_twice() -> None:
    asked = question(batch=5, fix="tp=1,pp=1,cp=1")
    assert refused(asked, (4,)) == refused(asked, (4,))
