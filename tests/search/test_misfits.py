"""The nearest thing that a person may have meant."""

from __future__ import annotations

import pytest

from planner.errors import PlannerError
from planner.search.misfits import nearest_pattern, spell_out_misfit
from planner.spec.plan import ModuleSplit
from planner.spec.splits import block_splits, split_modules
from tests.cost.training_cases import tiny

PATHS = [f"layers.{layer}.mlp.{name}" for layer in range(4) for name in ("up", "down")] + ["embedding", "head"]


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("layers.3.mlp.upp", "did you mean layers.3.mlp.up?"),
        ("layers.0-2,3.mlp.dwn", "did you mean layers.0-2,3.mlp.down?"),
        ("layer.*.mlp.up", "did you mean layers.*.mlp.up?"),
        ("layers.7.mlp.up", "did you mean layers.0-3.mlp.up?"),
        ("embeding", "did you mean embedding?"),
        ("xyz", "use one of: layers.0-3.mlp.up, layers.0-3.mlp.down, embedding, head"),
    ],
)
def test_nearest_pattern(pattern: str, remedy: str) -> None:
    assert nearest_pattern(pattern, PATHS) == remedy


def test_a_long_list_is_cut_short() -> None:
    assert nearest_pattern("xyz", [f"part_{letter}" for letter in "abcdefgh"]).endswith("part_e, …")


def test_the_line_that_was_changed_is_named_not_those_that_it_leaves_behind() -> None:
    """With `up` alone whole, `gate` and `down` no longer fit: two lines to change, against one."""
    block = tiny("llama").blocks["blocks.0"]
    lines = {
        f"blocks.0.{module}": line
        for module, line in split_modules(block, block_splits(block), sequence_parallel=False).items()
    }
    spell_out_misfit(block, lines, "blocks.0", sequence_parallel=False)  # fits: nothing to tell
    whole = ModuleSplit(split="replicate")
    with pytest.raises(PlannerError) as caught:
        spell_out_misfit(block, lines | {"blocks.0.ffn.up": whole}, "blocks.0", sequence_parallel=False)
    assert caught.value.key == "modules.blocks.0.ffn.up"
    two = lines | {"blocks.0.ffn.up": whole, "blocks.0.ffn.gate": whole}
    with pytest.raises(PlannerError) as caught:
        spell_out_misfit(block, two, "blocks.0", sequence_parallel=False)
    assert caught.value.key == "modules.blocks.0.ffn.down", "one line is missing to a feed-forward that is whole"
    assert "split: replicate" in caught.value.remedy


def test_missing_lines_are_not_its_matter() -> None:
    spell_out_misfit(tiny("llama").blocks["blocks.0"], {}, "blocks.0", sequence_parallel=False)
