"""Heads of keys and values: where ranks of a tensor-parallel group outnumber them, several keep the same one."""

from __future__ import annotations

from collections.abc import Mapping

from planner.spec.graph import Block, Operator
from planner.spec.splits import OperatorSplit


def kv_heads(block: Block, splits: Mapping[str, OperatorSplit]) -> dict[str, int]:
    """How many heads of keys and values there are, by storage that holds them and by product that makes it."""
    makers = {tensor.name: operator for operator in block.operators for tensor in operator.outputs}
    found: dict[str, int] = {}

    def follow(name: str, heads: int) -> None:
        maker = makers.get(name)
        if name in found or maker is None or not splits[maker.name].is_cut:
            return
        found[name] = heads
        if maker.kind == "matmul":
            found[maker.name] = heads
            return
        for tensor in maker.inputs:
            follow(tensor.name, heads)

    for operator in _grouped(block):
        for tensor in operator.inputs[1:3]:
            follow(tensor.name, operator.dims["kv_heads"].constant)
    return found


def _grouped(block: Block) -> list[Operator]:
    """Attention whose heads share keys and values."""
    found = [operator for operator in block.operators if operator.kind == "attention"]
    return [item for item in found if 0 < item.dims["kv_heads"].constant < item.dims["heads"].constant]
