"""Which kernels a stack fuses, and what is left to read, write and keep."""

from __future__ import annotations

from typing import get_args

import pytest

from planner.cost.fusion import Pass, is_heavy, passes
from planner.spec.graph import Block
from planner.spec.workload import Stack
from tests.cost.training_cases import tiny

DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.1}


def layer(name: str, **changes: float) -> Block:
    return tiny(name, **changes).blocks["blocks.0"]


def holding(found: tuple[Pass, ...], call: str, module: str) -> Pass:
    """The kernel that runs a module's operator."""
    (one,) = [item for item in found if any((op.call, op.module) == (call, module) for op in item.operators)]
    return one


def names(tensors: tuple[object, ...]) -> set[str]:
    return {tensor.name.removeprefix("blocks.0.") for tensor in tensors}  # type: ignore[attr-defined]


def calls(item: Pass) -> list[str]:
    return [operator.call for operator in item.operators]


@pytest.mark.parametrize("name", ["gpt", "llama", "mixtral", "unfused"])
def test_eager_launches_each_operator_alone(name: str) -> None:
    block = layer(name)
    found = passes(block, "eager")
    light = [operator for operator in block.operators if not is_heavy(operator)]
    assert [item.operators for item in found] == [(operator,) for operator in light]
    assert [item.launches for item in found] == [max(1, operator.kernels) for operator in light]
    assert [item.keeps for item in found] == [tuple({t.name: t for t in op.keeps}.values()) for op in light]


@pytest.mark.parametrize("stack", ["megatron", "compiled", "cuda_graph"])
def test_a_fused_swiglu_keeps_gate_and_up_alone(stack: Stack) -> None:
    """Eager keeps silu(gate) besides: 3 tensors of [b, s, ffn], here 2."""
    item = holding(passes(layer("llama"), stack), "silu", "ffn.activation")
    assert calls(item) == ["silu", "mul"]
    assert names(item.reads) == names(item.keeps) == {"ffn.gate/linear", "ffn.up/linear"}
    assert names(item.writes) == {"ffn.activation/mul"}
    assert not item.own
    eager = [holding(passes(layer("llama"), "eager"), call, "ffn.activation") for call in ("silu", "mul")]
    kept = names(eager[0].keeps) | names(eager[1].keeps)
    assert kept == {"ffn.gate/linear", "ffn.up/linear", "ffn.activation/silu"}


@pytest.mark.parametrize("stack", ["megatron", "compiled"])
def test_fused_rotary_embeddings_keep_their_tables_alone(stack: Stack) -> None:
    block = layer("llama")
    found = [item for item in passes(block, stack) if "sub" in calls(item)]
    assert [(len(item.operators), item.launches) for item in found] == [(7, 1), (7, 1)], "of queries and of keys"
    for item in found:
        assert {tensor.name for tensor in item.keeps} == set(block.shared)


def test_megatron_runs_scale_mask_and_softmax_as_one_and_drops_out_after_it() -> None:
    found = passes(layer("unfused", **DROPOUTS), "megatron")
    softmax = holding(found, "softmax", "attention.core")
    assert calls(softmax)[-1] == "softmax"
    assert "masked_fill" in calls(softmax)
    assert names(softmax.writes) == {"attention.core/softmax"}
    assert "attention.core/softmax" in names(softmax.keeps)
    assert "attention.core/masked_fill" not in names((*softmax.keeps, *softmax.writes))
    mask = holding(found, "dropout", "attention.core")
    assert calls(mask) == ["dropout"]
    assert [tensor.dtype for tensor in mask.own] == ["bool"]


def test_megatron_adds_the_residual_in_the_dropout_and_keeps_its_mask() -> None:
    found = passes(layer("gpt", **DROPOUTS), "megatron")
    dropped = [item for item in found if "dropout" in calls(item)]
    assert [calls(item) for item in dropped] == [["dropout", "add"]] * 2
    assert [[tensor.dtype for tensor in item.keeps] for item in dropped] == [["bool"], ["bool"]]


def test_a_compiler_joins_a_residual_to_the_norm_after_it() -> None:
    """x + attention, and the norm of it: the sum is written for the next residual, and kept for the norm."""
    block = layer("llama")
    item = holding(passes(block, "compiled"), "rms_norm", "ffn_norm")
    assert calls(item) == ["add", "rms_norm"]
    assert names(item.writes) == {"add", "ffn_norm/rms_norm"}
    assert holding(passes(block, "megatron"), "rms_norm", "ffn_norm").operators[0].kind == "norm"


def test_a_residual_of_its_own_has_nothing_to_do_in_backward() -> None:
    found = passes(layer("gpt"), "eager")
    assert [item.backward_moves for item in found if calls(item) == ["add"]] == [False, False]
    assert all(item.backward_moves for item in found if item.operators[0].kind == "norm")


@pytest.mark.parametrize("stack", get_args(Stack))
@pytest.mark.parametrize("name", ["gpt", "llama", "mixtral", "deepseek", "unfused"])
def test_every_operator_runs_once_and_what_others_need_is_written(name: str, stack: Stack) -> None:
    for block in tiny(name).blocks.values():
        found = passes(block, stack)
        run = [operator.name for item in found for operator in item.operators]
        light = [operator.name for operator in block.operators if not is_heavy(operator)]
        assert sorted(run) == sorted(light)
        for item in found:
            inside = {operator.name for operator in item.operators}
            written = {tensor.name for tensor in item.writes}
            made = {tensor.name for operator in item.operators for tensor in operator.outputs}
            for operator in block.operators:
                if operator.name not in inside:
                    needed = {tensor.name for tensor in operator.inputs} & made
                    assert needed <= written, (item.operators, operator.name)
            assert set(block.outputs) & made <= written


@pytest.mark.parametrize("stack", ["megatron", "compiled", "cuda_graph"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "unfused"])
def test_fusing_never_moves_or_launches_more(name: str, stack: Stack) -> None:
    block = layer(name)

    def totals(of: Stack) -> tuple[float, int]:
        found = passes(block, of)
        return (
            sum(tensor.bytes(2, 256) for item in found for tensor in (*item.reads, *item.writes)),
            sum(item.launches for item in found),
        )

    moved, launched = totals(stack)
    most_moved, most_launched = totals("eager")
    assert moved < most_moved
    assert launched < most_launched


@pytest.mark.parametrize("stack", ["megatron", "compiled"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek", "unfused"])
def test_no_kernel_waits_for_its_own_result(name: str, stack: Stack) -> None:
    """What another kernel makes of a part of a fused one is never read by the rest of it."""
    for block in tiny(name).blocks.values():
        above = ancestors(block)
        for item in passes(block, stack):
            inside = {operator.name for operator in item.operators}
            for operator in inside:
                between = {other for other in above[operator] - inside if above[other] & inside}
                assert not between, (sorted(inside), sorted(between))


def ancestors(block: Block) -> dict[str, set[str]]:
    """The operators that each one needs the results of, however far before it."""
    makers = {tensor.name: operator.name for operator in block.operators for tensor in operator.outputs}
    above: dict[str, set[str]] = {}
    for operator in block.operators:
        before = {makers[tensor.name] for tensor in operator.inputs if tensor.name in makers}
        above[operator.name] = before.union(*(above[other] for other in before))
    return above
