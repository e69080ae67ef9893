"""Flags of a run: there and back, and those that do not go together."""

from __future__ import annotations

import pytest

from planner.errors import PlannerError
from planner.spec.training_run import RankArguments, TrainingRun, parse_arguments


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"lr": 1e-2},
        {"lr": 1e-2, "min_lr": 3e-5},
        {"data": "tokens.bin", "data_dtype": "uint32", "compile": True, "clip": 0.0, "seed": 7, "device": "cpu"},
        {"checkpoint": "a folder", "every": 3, "resume": True, "timeout": 2.5, "dtype": "fp64"},
        {"context": "ring", "steps": 3},
    ],
)
def test_each_rank_gets_what_was_asked(flags: dict[str, object]) -> None:
    asked = RankArguments(plan="plan.yaml", run=TrainingRun.from_flags(flags), quiet=True)
    assert parse_arguments(asked.words()) == asked
    for key, value in flags.items():
        assert getattr(asked.run, key) == value


def test_the_cosine_ends_at_a_tenth_unless_told() -> None:
    assert TrainingRun.from_flags({"lr": 1.0, "min_lr": None}).min_lr == 0.1
    assert TrainingRun.from_flags({"lr": 1}).min_lr == 0.1


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({"min_lr": 1.0}, "min_lr is at most lr"),
        ({"resume": True}, "resumes from a folder"),
        ({"every": 2}, "checkpoints go to a folder"),
        ({"steps": 0}, "at least 1"),
        ({"device": "tpu"}, "one of auto, cpu, cuda"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags: dict[str, object], rule: str) -> None:
    with pytest.raises(PlannerError, match=rule):
        TrainingRun.from_flags(flags)
