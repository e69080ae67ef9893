"""Which storages and products belong to heads of keys and values that several query heads share."""

from __future__ import annotations

import pytest

from planner.cost.kv_heads import kv_heads
from planner.spec.splits import block_splits
from tests.cost.training_cases import tiny


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_oss"])
def test_keys_and_values_with_their_products(name: str) -> None:
    """Through rotation and norms of heads; 2 heads for 4 of queries."""
    block = tiny(name).blocks["blocks.0"]
    found = kv_heads(block, block_splits(block))
    products = {op.module: op.name for op in block.operators if op.kind == "matmul"}
    (attention,) = [op for op in block.operators if op.kind == "attention"]
    assert set(found.values()) == {2}
    assert {products["attention.key"], products["attention.value"]} <= found.keys()
    assert {tensor.name for tensor in attention.inputs[1:3]} <= found.keys()
    others = [name for module, name in products.items() if module not in ("attention.key", "attention.value")]
    assert not found.keys() & {*others, attention.inputs[0].name, attention.outputs[0].name}


@pytest.mark.parametrize("name", ["gpt", "deepseek"])
def test_none_where_every_query_head_has_its_own(name: str) -> None:
    block = tiny(name).blocks["blocks.0"]
    assert kv_heads(block, block_splits(block)) == {}
