"""Lines of a plan back to what a block keeps whole; lines that do not fit together; weights of two blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.errors import PlannerError
from planner.spec.assignments import require_equal_ties, tied_operators, whole_of_modules
from planner.spec.graph import Graph
from planner.spec.paths import folded
from planner.spec.plan import ModuleSplit
from planner.spec.regions import alternatives
from planner.spec.splits import could_be_cut, module_splits
from tests.cost.training_cases import tiny

COLUMN = ModuleSplit(split="column", input="replicate", output="features")
WHOLE = ModuleSplit(split="replicate")


def refused(graph: Graph, place: int, lines: dict[str, ModuleSplit], *, sp: bool = False) -> PlannerError:
    placement = graph.sequence[place]
    with pytest.raises(PlannerError) as caught:
        whole_of_modules(graph.blocks[placement.block], lines, path=placement.path, sequence_parallel=sp)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize(
    "name", ["gpt", "llama", "qwen3", "mixtral", "gpt_oss", "deepseek", "falcon", "t5", "vit"]
)
def test_lines_of_every_assignment_lead_back_to_it(name: str, sp: bool) -> None:
    graph = tiny(name)
    table = frozenset[tuple[int, str]]().union(*tied_operators(graph))
    for place, placement in enumerate(graph.sequence):
        block = graph.blocks[placement.block]
        for whole in alternatives(block, sequence_parallel=sp):
            tied = {other: frozenset((operator,)) for other, operator in table if (place, *whole) in table}
            lines = folded(module_splits(graph, sequence_parallel=sp, whole={place: whole} | tied))
            assert whole_of_modules(block, lines, path=placement.path, sequence_parallel=sp) == whole


def test_one_edited_line_does_not_fit_the_others() -> None:
    graph = tiny("llama")
    lines = module_splits(graph)
    error = refused(graph, 2, lines | {"blocks.1.ffn.up": WHOLE})
    assert error.key == "modules.blocks.1.ffn.gate", "it would meet the whole values of the other"
    assert error.value == "blocks.1.ffn.gate with split: column, input: replicate, output: features"
    assert "split: replicate, input: replicate, output: replicate" in error.remedy
    three = dict.fromkeys(("blocks.1.ffn.gate", "blocks.1.ffn.up", "blocks.1.ffn.down"), WHOLE)
    found = whole_of_modules(graph.blocks["blocks.0"], lines | three, path="blocks.1")
    assert len(found) == 3
    assert whole_of_modules(graph.blocks["blocks.0"], lines | three, path="blocks.0") == frozenset()


def test_a_row_cut_cannot_be_made_whole_alone() -> None:
    graph = tiny("gpt")
    error = refused(graph, 1, module_splits(graph) | {"blocks.0.ffn.down": WHOLE})
    assert error.key == "modules.blocks.0.ffn.down"
    assert error.rule == "the splits of a block's modules fit together"


def test_a_layout_that_its_split_does_not_have() -> None:
    graph = tiny("gpt")
    lines = module_splits(graph)
    error = refused(graph, 1, lines | {"blocks.0.ffn.up": replace(COLUMN, output="replicate")})
    assert error.key == "modules.blocks.0.ffn.up"
    assert "output: features" in error.remedy


def test_a_split_that_does_not_fit_its_module() -> None:
    graph = tiny("gpt")
    for path, split in (("attention.query", "row"), ("attention.core", "column"), ("attention_norm", "vocab")):
        wrong = ModuleSplit(split=split)  # type: ignore[arg-type]
        error = refused(graph, 1, module_splits(graph) | {f"blocks.0.{path}": wrong})
        assert error.key == f"modules.blocks.0.{path}"


def test_a_line_that_is_missing() -> None:
    graph = tiny("gpt")
    lines = module_splits(graph)
    del lines["blocks.0.ffn.up"]
    error = refused(graph, 1, lines)
    assert error.key == "modules.blocks.0.ffn.up"
    assert "split: column" in error.remedy


def test_whole_attention_on_parts_of_the_sequence() -> None:
    graph = tiny("llama")
    block = graph.blocks["blocks.0"]
    whole = frozenset(
        op.name for op in block.operators if op.name in could_be_cut(block) and "attention" in op.module
    )
    lines = module_splits(graph, sequence_parallel=True, whole={1: whole})
    error = refused(graph, 1, lines, sp=True)
    assert error.key == "modules.blocks.0.attention.core"
    assert "sequence parallelism" in error.rule
    assert whole_of_modules(block, module_splits(graph, whole={1: whole}), path="blocks.0") == whole


def test_a_table_that_the_head_shares() -> None:
    graph = tiny("gpt")
    last = len(graph.sequence) - 1
    table, head = could_be_cut(graph.blocks["start"])[0], could_be_cut(graph.blocks["end"])[0]
    assert tied_operators(graph) == (frozenset({(0, table), (last, head)}),)
    assert tied_operators(tiny("llama")) == ()
    both = {0: frozenset((table,)), last: frozenset((head,))}
    require_equal_ties(graph, {})
    require_equal_ties(graph, both)
    for place in both:
        with pytest.raises(PlannerError) as caught:
            require_equal_ties(graph, {place: both[place]})
        assert caught.value.key == ("modules.embedding.tokens" if place == 0 else "modules.head.projection")


def test_a_table_that_three_blocks_share() -> None:
    """T5's encoder, decoder and head."""
    graph = tiny("t5")
    (group,) = tied_operators(graph)
    assert {graph.sequence[place].block for place, _ in group} == {"start", "between", "end"}
