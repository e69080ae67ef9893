"""Assignments of a model's blocks that may stand together."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.api import trace
from planner.errors import PlannerError
from planner.search.choices import choices_of
from planner.spec.sources import UserModule
from tests.cost.training_cases import tiny
from tests.execute import own_models
from tests.search import mlps


def test_what_shares_weights_is_cut_alike() -> None:
    found = choices_of(tiny("gpt"))  # the embedding is the head
    ends = {(bool(one["start"]), bool(one["end"])) for one in found.together}
    assert ends == {(False, False), (True, True)}


def test_uncut_every_block_has_the_usual_assignment() -> None:
    found = choices_of(tiny("llama"), cut=False)
    assert found.together == ({"start": frozenset(), "blocks.0": frozenset(), "end": frozenset()},)
    assert found.allowed == {False: (True,), True: (True,)}


def test_a_table_that_its_head_cannot_follow_is_whole_where_tp_cuts() -> None:
    """Scores that a module returns beside its loss are not cut, and the table is the head's weight."""
    graph = trace(UserModule(path=Path(own_models.__file__), function="pair"))
    assert all(found["start"] for found in choices_of(graph).together)
    assert [set(found.values()) for found in choices_of(graph, cut=False).together] == [{frozenset()}]


def test_too_many_assignments_are_refused_where_tp_cuts() -> None:

    graph = trace(UserModule(path=Path(mlps.__file__), function="chain"))
    with pytest.raises(PlannerError, match="at most 256") as refused:
        choices_of(graph)
    assert refused.value.key == "fix.tp"
    assert len(choices_of(graph, cut=False).together) == 1
