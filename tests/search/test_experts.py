"""Our plan beside the layouts of experts: by our own cost model it is never slower."""

from __future__ import annotations

import pytest

from tests.search.experts import DEGREES, EXPERTS, Expert, beside

SLACK = 1 + 1e-9
FREE = ("Megatron 22B, selective recompute", "torchtitan Llama 3 8B", "Bridge Llama 3 8B")  # all keys, one node
DEGREES_HELD = (
    "Megatron 1.7B", "Megatron 7.5B", "Megatron 175B, selective recompute",
    "torchtitan Llama 3 70B", "torchtitan Llama 3 70B on A100", "Bridge Qwen3 30B-A3B",
)  # fmt: skip


def _named(name: str) -> Expert:
    return next(expert for expert in EXPERTS if expert.name == name)


@pytest.mark.parametrize("name", FREE)
def test_a_plan_is_no_slower_than_the_experts_layout(name: str) -> None:
    assert beside(_named(name)).ratio <= SLACK


@pytest.mark.parametrize("name", DEGREES_HELD)
def test_with_the_experts_degrees_the_rest_is_no_slower(name: str) -> None:
    found = beside(_named(name), degrees=True)
    assert found.ratio <= SLACK
    ours = found.comparable.strategy if found.comparable else None
    assert all(getattr(ours, key) == getattr(found.expert.layout, key) for key in DEGREES)


def test_experts_are_told_once_and_legal() -> None:
    assert len({expert.name for expert in EXPERTS}) == len(EXPERTS)
    for expert in EXPERTS:
        assert expert.layout.gpus == expert.gpus
        assert expert.citation
