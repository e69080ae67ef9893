"""Models cut into stages: layers by virtual stage, and what goes with which."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from planner.cost.stages import even_layers, ranks_of_stages, stage_counts
from tests.cost.training_cases import tiny
from tests.spec.strategies import STEADY


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (96, 8, (12,) * 8),
        (7, 1, (7,)),
        # the embedding and the head count as a layer each: 126 + 2 = 16 · 8, as Llama 405B was trained
        (126, 16, (7, *(8,) * 14, 7)),
        (10, 4, (2, 3, 3, 2)),
        (6, 8, (0, 1, 1, 1, 1, 1, 1, 0)),
        # neither divides: the middle has one more
        (9, 4, (2, 2, 3, 2)),
        (11, 4, (2, 3, 3, 3)),
        (5, 3, (1, 2, 2)),
        (35, 8, (4, 4, 4, 5, 5, 5, 4, 4)),
    ],
)
def test_even_layers(layers: int, stages: int, expected: tuple[int, ...]) -> None:
    assert even_layers(layers, stages) == expected


@settings(max_examples=200, **STEADY)
@given(st.integers(1, 200), st.integers(1, 200))
def test_every_layer_has_a_stage_and_stages_are_alike(layers: int, stages: int) -> None:
    found = even_layers(layers, stages)
    assert len(found) == stages
    assert sum(found) == layers
    assert min(found) >= 0
    assert max(found) - min(found) <= 1


@pytest.mark.parametrize(
    ("pp", "vpp", "schedule", "expected"),
    [
        (4, 1, "1f1b", [0, 1, 2, 3]),
        (4, 2, "interleaved", [0, 1, 2, 3, 0, 1, 2, 3]),
        (2, 3, "zb", [0, 1, 0, 1, 0, 1]),
        (4, 2, "zbv", [0, 1, 2, 3, 3, 2, 1, 0]),
        (1, 1, "gpipe", [0]),
    ],
)
def test_ranks_of_virtual_stages(pp: int, vpp: int, schedule: str, expected: list[int]) -> None:
    assert ranks_of_stages(pp, vpp, schedule).tolist() == expected


def test_embedding_and_head_belong_to_the_ends() -> None:
    found = stage_counts(tiny("gpt", layers=6), 2, 1, "1f1b")
    assert found.blocks == ("start", "blocks.0", "end")
    assert found.counts.tolist() == [[1, 3, 0], [0, 3, 1]]
    assert (found.pp, found.vpp) == (2, 1)
    assert [found.holds(0, name) for name in found.blocks] == [True, True, False]
    assert [found.holds(1, name) for name in found.blocks] == [False, True, True]


def test_a_v_puts_both_ends_on_the_first_rank() -> None:
    found = stage_counts(tiny("gpt", layers=6), 2, 2, "zbv")
    assert found.counts.tolist() == [[1, 1, 0], [0, 2, 0], [0, 2, 0], [0, 1, 1]]
    assert found.rank_of.tolist() == [0, 1, 1, 0]
    assert found.rank_sums(found.counts).tolist() == [[1, 2, 1], [0, 4, 0]]


def test_layers_may_be_given_and_stages_empty() -> None:
    found = stage_counts(tiny("gpt", layers=6), 4, 1, "1f1b", layers=(0, 4, 2, 0))
    assert found.counts.tolist() == [[1, 0, 0], [0, 4, 0], [0, 2, 0], [0, 0, 1]]


def test_kinds_of_layers_keep_their_order() -> None:
    """DeepSeek's first layer is dense."""
    found = stage_counts(tiny("deepseek"), 3, 1, "1f1b")
    assert found.blocks == ("start", "blocks.0", "blocks.1", "end")
    assert found.counts.tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_what_stands_between_layers_goes_with_the_later_one() -> None:
    found = stage_counts(tiny("t5"), 2, 1, "1f1b")
    assert found.blocks == ("start", "encoder_blocks.0", "between", "decoder_blocks.0", "end")
    assert found.counts.tolist() == [[1, 2, 0, 0, 0], [0, 0, 1, 2, 1]]
    later = stage_counts(tiny("t5"), 2, 1, "1f1b", layers=(3, 1))
    assert later.counts.tolist() == [[1, 2, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_sums_and_most() -> None:
    found = stage_counts(tiny("gpt", layers=6), 2, 2, "interleaved")  # 1, 2, 2, 1 layers on ranks 0, 1, 0, 1
    of_blocks = np.array([[10.0], [3.0], [7.0]])
    assert found.sums(of_blocks).tolist() == [[13.0], [6.0], [6.0], [10.0]]
    assert found.rank_sums(found.sums(of_blocks)).tolist() == [[19.0], [16.0]]
    assert found.most(of_blocks).tolist() == [[10.0], [7.0]]
    assert found.most(of_blocks, only=["blocks.0"]).tolist() == [[3.0], [3.0]]


@pytest.mark.parametrize(("pp", "vpp", "schedule"), [(1, 1, "1f1b"), (3, 1, "gpipe"), (2, 2, "zbv"), (2, 3, "zb")])
@pytest.mark.parametrize("name", ["gpt", "deepseek", "t5"])
def test_every_block_stands_somewhere_once(name: str, pp: int, vpp: int, schedule: str) -> None:
    graph = tiny(name)
    found = stage_counts(graph, pp, vpp, schedule)
    assert dict(zip(found.blocks, found.counts.sum(axis=0).tolist(), strict=True)) == graph.repeats()
