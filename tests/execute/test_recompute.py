"""What selective recomputation runs again, and what it does not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.execute.phases import current_phase
from planner.execute.recompute import needs_last_product, products_of, recompute_blocks
from planner.execute.stage import DecoderStage
from tests.execute.cases import LENGTH, global_batch, whole_stage
from tests.tiny import tiny_spec

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "planner::grouped_matmul")
KERNELS = ("aten::_scaled_dot_product_flash_attention_for_cpu", "planner::attention")


class Run(TorchDispatchMode):
    """Operators that ran, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.again: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if current_phase() == "recompute":
            self.again[func.name()] += 1
        return func(*args, **(kwargs or {}))


def runs_again(stage: DecoderStage) -> Counter[str]:
    tokens, _ = global_batch(stage.spec, 2)
    with Run() as run:
        stage(tokens, LENGTH).sum().backward()
    return run.again


@pytest.mark.parametrize(
    ("model", "products", "needed", "again"),
    [
        ("llama", 7, False, 3),  # key, output, up; query, value, gate are kept, nothing reads down
        ("gpt", 6, False, 2),  # key, output; the result of down is not asked for
        ("gemma2", 7, True, 3),  # the result of down is kept for the norm behind it
        ("unfused", 8, False, 3),  # key, scores, up; query, value, weighted values, output go by turns
        ("mixtral", 8, True, 4),  # key, output, gate, down; the router is the fifth product
    ],
)
def test_every_second_product_runs_again(model: str, products: int, needed: bool, again: int) -> None:
    spec = tiny_spec(model, layers=1)
    stage = whole_stage(spec)
    block = stage.blocks["0"]
    assert (products_of(block), needs_last_product(spec, 0)) == (products, needed)
    recompute_blocks(stage, {"0": "selective"})
    ran = runs_again(stage)
    assert sum(ran[name] for name in PRODUCTS) == again
    assert not any(ran[name] for name in KERNELS)


def test_full_recomputation_runs_all_but_the_last_product() -> None:
    stage = whole_stage(tiny_spec("llama", layers=1))
    recompute_blocks(stage, {"0": "full"})
    ran = runs_again(stage)
    assert sum(ran[name] for name in PRODUCTS) == 6
    assert sum(ran[name] for name in KERNELS) == 1


def test_gradients_are_those_without_recomputation() -> None:
    """With dropout, whose masks are drawn anew."""
    spec = tiny_spec("gpt", dropout=0.2, attention_dropout=0.2)

    def gradients(choice: Any) -> dict[str, torch.Tensor]:
        stage = whole_stage(spec)
        recompute_blocks(stage, dict.fromkeys(stage.blocks, choice))
        tokens, _ = global_batch(spec, 2)
        torch.manual_seed(5)
        stage(tokens, LENGTH).square().sum().backward()
        return {path: p.grad for path, p in stage.named_parameters() if p.grad is not None}

    expected = gradients("none")
    for choice in ("selective", "full"):
        found = gradients(choice)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[path], expected[path]) for path in expected)
