"""A model as a chain against the stages that the cost model counts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from planner.cost.stages import stage_counts
from planner.search.chain import Chain
from planner.spec.graph import Graph
from tests.cost.training_cases import tiny, user
from tests.search.exhaustive import layers_of
from tests.search.instances import mixed

GRAPHS: dict[str, Any] = {
    "llama": lambda: tiny("llama", layers=4),
    "deepseek": lambda: tiny("deepseek"),
    "gemma2": lambda: tiny("gemma2", layers=4),
    "t5": lambda: tiny("t5"),
    "hybrid": lambda: user("hybrid"),
    "pyramid": lambda: user("pyramid"),
    "odd_and_even": lambda: user("odd_and_even"),
    "mixed": lambda: mixed(("plain", "wide", "experts", "plain"), False)[0],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_stretches_are_what_stages_hold(name: str) -> None:
    graph: Graph = GRAPHS[name]()
    chain, total = Chain.of(graph), layers_of(graph)
    assert chain.layers == total
    for first, end in itertools.combinations_with_replacement(range(total + 1), 2):
        layers = (first, end - first, total - end)
        counts = stage_counts(graph, 3, 1, "1f1b", layers).counts
        held = np.array([chain.stretch(0, first), chain.stretch(first, end), chain.stretch(end, total)])
        held[0] += chain.before
        held[2] += chain.after
        names = stage_counts(graph, 3, 1, "1f1b", layers).blocks
        places = [chain.blocks.index(block) for block in names]
        assert counts.tolist() == held[:, places].tolist()


def test_uniform_is_one_kind_of_layers() -> None:
    assert Chain.of(tiny("llama")).uniform
    assert not Chain.of(tiny("deepseek")).uniform
    assert not Chain.of(tiny("t5")).uniform
    assert not Chain.of(mixed(("plain", "wide"), False)[0]).uniform


def test_what_stands_between_layers_is_inside_and_no_layer() -> None:
    chain = Chain.of(tiny("t5"))
    assert dict(zip(chain.blocks, zip(chain.layer, chain.inside, strict=True), strict=True)) == {
        "start": (False, False),
        "encoder_blocks.0": (True, True),
        "between": (False, True),
        "decoder_blocks.0": (True, True),
        "end": (False, False),
    }
    assert chain.inside_of(1, 3) == (1, 1, 1)


def test_words_follow_the_layers() -> None:
    chain = Chain.of(mixed(("plain", "wide", "plain", "wide"), False)[0])
    words: Any = {"plain": ["full", "none"], "wide": ["selective", "none"]}
    assert chain.reruns(0, 4, words) == ["full", "selective", "none", "none"]
    between = Chain.of(tiny("t5"))
    held: Any = {"encoder_blocks.0": ["full"], "between": [], "decoder_blocks.0": ["none"]}
    assert between.reruns(1, 3, held) == ["full", "none"]
