"""Every assignment of a block: which regions there are, which choices can run, and one name for each."""

from __future__ import annotations

import itertools

import pytest

from planner.spec.graph import Block, Graph
from planner.spec.regions import (
    alternatives,
    canonical,
    needs_all_tokens,
    regions,
    whole_but,
)
from planner.spec.splits import block_splits, could_be_cut, own_operators, usual_meetings, walk
from tests.cost.training_cases import tiny, user

USERS = ("mlp", "hybrid", "scaled", "relu_chain", "two_tower", "shared_layer", "einsums", "encoder_layers")
KINDS = ("gpt", "llama", "gemma2", "falcon", "mixtral", "gpt_oss", "deepseek", "unfused", "bert", "t5", "vit")
MOST_NAMES_TRIED = 7

STARTS = {
    "gpt": ("blocks.0", [{"attention.query", "attention.key", "attention.value"}, {"ffn.up"}]),
    "llama": ("blocks.0", [{"attention.query", "attention.key", "attention.value"}, {"ffn.gate", "ffn.up"}]),
    "mixtral": ("blocks.0", [{"attention.query", "attention.key", "attention.value"}]),
    "deepseek": (
        "blocks.1", [{"attention.query_up", "attention.expand"}, {"ffn.shared.gate", "ffn.shared.up"}]
    ),
    "t5": (
        "decoder_blocks.0",
        [
            {"attention.query", "attention.key", "attention.value"},
            {"cross.query", "cross.key", "cross.value"},
            {"ffn.up"},
        ],
    ),
    "bert": ("end", [{"head.projection"}]),
    "vit": ("start", []),
}  # fmt: skip


def graphs() -> list[Graph]:
    return [tiny(name) for name in KINDS] + [user(name) for name in USERS]


def blocks() -> list[tuple[str, Block]]:
    return [(f"{graph.name} {name}", block) for graph in graphs() for name, block in graph.blocks.items()]


def modules(block: Block, names: tuple[str, ...] | frozenset[str]) -> set[str]:
    return {operator.module for operator in block.operators if operator.name in names}


@pytest.mark.parametrize("name", STARTS)
def test_what_is_cut_together(name: str) -> None:
    place, expected = STARTS[name]
    block = tiny(name).blocks[place]
    assert [modules(block, region.starts) for region in regions(block)] == expected


def test_every_set_of_names_leads_to_a_listed_assignment() -> None:
    """And each listed one to itself: nothing is missing, nothing exists twice."""
    tried = 0
    for label, block in blocks():
        names = could_be_cut(block)
        if not 1 < len(names) <= MOST_NAMES_TRIED:
            continue
        found = {
            canonical(block, frozenset(chosen))
            for count in range(len(names) + 1)
            for chosen in itertools.combinations(names, count)
        }
        listed = alternatives(block, sequence_parallel=False)
        assert found == set(listed), label
        assert len(listed) == len(set(listed)) == len({str(block_splits(block, whole)) for whole in listed}), label
        tried += 1
    assert tried >= 20


def test_the_usual_assignment_comes_first() -> None:
    for label, block in blocks():
        for sequence_parallel in (False, True):
            found = alternatives(block, sequence_parallel=sequence_parallel)
            if sequence_parallel and "encoder_layers layers" in label:  # attention that is never cut
                assert found == ()
            else:
                assert found[0] == frozenset(), label


def test_names_are_canonical() -> None:
    for label, block in blocks():
        for whole in alternatives(block, sequence_parallel=False):
            assert canonical(block, whole) == whole, label
            splits = block_splits(block, whole)
            assert not any(splits[name].is_cut for name in whole), label


def test_a_name_that_changes_nothing_is_dropped() -> None:
    block = tiny("llama").blocks["blocks.0"]
    operator = {item.module: item.name for item in block.operators if item.parameters}
    assert canonical(block, frozenset((operator["ffn.down"],))) == frozenset(), "a row cut follows its input"
    feed_forward = frozenset(operator[f"ffn.{name}"] for name in ("gate", "up", "down"))
    assert canonical(block, frozenset((operator["ffn.gate"],))) == feed_forward, (
        "a cut and a whole value never meet"
    )


def test_what_stays_whole_never_meets_what_is_cut() -> None:
    """But where it does in the usual assignment: masks at scores, a shared rotary key at those of heads."""
    for label, block in blocks():
        usual = usual_meetings(block)
        for whole in alternatives(block, sequence_parallel=False):
            kept = {name for name, split in block_splits(block, whole).items() if not split.is_cut}
            found = walk(block, kept)
            assert found.meetings <= usual, label
            assert not found.spoiled, label


def test_regions_share_no_operator_or_exclude_each_other() -> None:
    block = user("mlp").blocks["start"]
    every = regions(block)
    assert len(every) == 5, "of six products in a row, each with the next"
    for one, other in itertools.pairwise(every):
        assert one.operators & other.operators
        both = frozenset(could_be_cut(block)) - one.products - other.products
        assert canonical(block, both) in alternatives(block, sequence_parallel=False)
    assert len(alternatives(block, sequence_parallel=False)) == 13, "sets of neighbours: a Fibonacci number"


def test_under_sequence_parallelism_attention_sees_every_token() -> None:
    for name in ("gpt", "llama", "gpt_oss", "unfused", "deepseek", "t5", "vit"):
        for block in tiny(name).blocks.values():
            needed = needs_all_tokens(block)
            cores = {op.name for op in block.operators if op.kind == "attention"}
            assert cores <= needed
            for whole in alternatives(block, sequence_parallel=True):
                assert all(block_splits(block, whole)[operator].is_cut for operator in needed)
    written_out = tiny("unfused").blocks["blocks.0"]
    assert modules(written_out, needs_all_tokens(written_out)) == {"attention.core"}
    layer = tiny("llama").blocks["blocks.0"]
    assert [modules(layer, whole) for whole in alternatives(layer, sequence_parallel=True)] == [
        set(), {"ffn.gate", "ffn.up", "ffn.down"}
    ]  # fmt: skip
    assert len(alternatives(layer, sequence_parallel=False)) == 4


def test_uses_of_one_weight_are_cut_alike() -> None:
    for block in (user("two_tower").blocks["start"], user("shared_layer").blocks["start"]):
        for whole in alternatives(block, sequence_parallel=False):
            splits, by_weight = block_splits(block, whole), dict[str, set[str]]()
            for operator in block.operators:
                for path in operator.parameters:
                    by_weight.setdefault(path, set()).add(splits[operator.name].split)
            assert all(len(words) == 1 for words in by_weight.values())


def test_experts_keep_their_own_tokens() -> None:
    """A shared expert that stays whole is no part of the way to the routed ones."""
    for name in ("mixtral", "deepseek", "gpt_oss"):
        for block in tiny(name).blocks.values():
            usual = own_operators(block, block_splits(block))
            for whole in alternatives(block, sequence_parallel=False):
                assert own_operators(block, block_splits(block, whole)) == usual


def test_no_regions_are_chosen() -> None:
    block = tiny("gpt").blocks["blocks.0"]
    assert whole_but(block, ()) == frozenset(could_be_cut(block))
    assert whole_but(block, regions(block)) == frozenset()
