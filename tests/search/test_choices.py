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


def test_uncut_blocks_share_a_weight_whatever_their_assignments() -> None:
    """The usual one would cut the table in front, and not the head, whose scores are returned."""
    graph = trace(UserModule(path=Path(own_models.__file__), function="pair"))
    assert len(graph.tied) == 1
    assert len(choices_of(graph, cut=False).together) == 1


def test_too_many_assignments_are_refused_where_tp_cuts() -> None:

    graph = trace(UserModule(path=Path(mlps.__file__), function="chain"))
    with pytest.raises(PlannerError, match="at most 256") as refused:
        choices_of(graph)
    assert refused.value.key == "fix.tp"
    assert len(choices_of(graph, cut=False).together) == 1
