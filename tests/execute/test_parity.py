"""Loss and every gradient of a parallel step equal those of one process, in fp64."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from planner.spec.strategy import Strategy
from tests.execute.cases import step_errors
from tests.execute.world import run_world
from tests.tiny import tiny_spec

TOLERANCE = 1e-10


STRATEGY_KEYS = set(Strategy.__dataclass_fields__)


def check(
    model: str, ranks: int, *, sequences: int = 2, model_keys: dict[str, Any] | None = None, **keys: Any
) -> None:
    """`keys` are those of the strategy, and further arguments of `step_errors`."""
    spec = tiny_spec(model, **{"layers": 2, "vocab": 99} | (model_keys or {}))
    strategy = Strategy.from_dict({key: keys.pop(key) for key in STRATEGY_KEYS & set(keys)}, gpus=ranks)
    for errors in run_world(ranks, functools.partial(step_errors, **keys), spec, strategy, sequences):
        wrong = {path: error for path, error in errors.items() if not error < TOLERANCE}
        assert not wrong


@pytest.mark.parametrize("sp", [False, True], ids=["whole", "sp"])
@pytest.mark.parametrize("model", ["gpt", "llama", "qwen3", "bloom", "gemma2", "falcon", "gpt_oss"])
def test_tensor_parallel(model: str, sp: bool) -> None:
    """Learned and rotary positions, ALiBi, windows, sinks, tied tables, norms of heads, biases, padding."""
    check(model, 2, tp=2, sp=sp)


@pytest.mark.parametrize("sp", [False, True], ids=["whole", "sp"])
def test_fewer_kv_heads_than_ranks(sp: bool) -> None:
    check("qwen3", 4, tp=4, sp=sp, model_keys={"kv_heads": 2})


def test_one_kv_head_and_sharded_state() -> None:
    check("llama", 4, tp=2, zero=3, sp=True, sequences=4, model_keys={"kv_heads": 1})


def test_whole_logits() -> None:
    check("gpt", 2, tp=2, layout={"logits": "replicate"})


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_sharded_state(zero: int) -> None:
    check("gpt", 2, zero=zero, sequences=6)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_copies_of_sharded_state(zero: int) -> None:
    check("llama", 4, zero=zero, dp_replicate=2, sequences=8)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_tensor_and_data_parallel(zero: int) -> None:
    check("gpt", 4, tp=2, sp=True, zero=zero, sequences=4)


@pytest.mark.parametrize("model", ["gpt", "llama", "bloom", "gemma2"])
def test_context_parallel(model: str) -> None:
    check(model, 2, cp=2)


def test_context_parallel_with_all_else() -> None:
    check("llama", 4, tp=2, sp=True, cp=2, zero=3, recompute="selective")
    check("gpt", 4, cp=2, zero=1, sequences=4, recompute="full", order="cp-tp-dp-pp")


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute(recompute: str) -> None:
    check("llama", 2, tp=2, sp=True, recompute=recompute)


@pytest.mark.parametrize("model", ["gpt", "qwen3", "gemma2", "falcon", "unfused"])
def test_selective_recompute_keeps_sums(model: str) -> None:
    """Biases, norms of heads and behind sums, blocks in parallel, scores written out."""
    check(model, 2, tp=2, recompute="selective")


def test_selective_recompute_with_everything_else() -> None:
    check("unfused", 2, cp=2, recompute="selective")
    check("llama", 4, tp=2, sp=True, zero=3, recompute="selective", sequences=8)


@pytest.mark.parametrize("zero", [1, 3])
def test_selective_recompute_of_experts(zero: int) -> None:
    check("mixtral", 4, tp=2, ep=2, etp=2, zero=zero, recompute="selective", sequences=4)
    check("deepseek", 4, tp=2, ep=2, sp=True, zero=zero, recompute="selective", sequences=8)


def test_experts_fewer_than_the_ranks_that_hold_them() -> None:
    check("mixtral", 4, zero=3, sequences=4, model_keys={"moe": {"experts": 2, "top_k": 1, "expert_ffn": 32}})


def test_recompute_block_by_block() -> None:
    check("gpt", 2, zero=3, sequences=4, blocks={"blocks.0": "full", "blocks.1": "selective"})


def test_several_microbatches() -> None:
    check("llama", 2, zero=1, sequences=8)


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"])
def test_experts_over_data_parallel_ranks(model: str) -> None:
    check(model, 2, ep=2, zero=1, sequences=4)


def test_experts_with_copies() -> None:
    check("mixtral", 4, ep=2, zero=3, sequences=4)
    check("mixtral", 2, zero=0, sequences=4)


@pytest.mark.parametrize("sp", [False, True], ids=["whole", "sp"])
def test_experts_over_tensor_parallel_ranks(sp: bool) -> None:
    check("mixtral", 2, tp=2, ep=2, sp=sp)
    check("mixtral", 4, tp=2, ep=2, sp=sp, zero=1, sequences=4)


def test_experts_cut_inside() -> None:
    check("mixtral", 2, tp=2, etp=2, sp=True)
    check("mixtral", 4, tp=2, ep=2, etp=2, zero=1, sequences=4, recompute="full")


def test_latent_attention_and_shared_experts() -> None:
    check("deepseek", 2, ep=2, zero=3, sequences=4, model_keys={"layers": 3})


@pytest.mark.parametrize("sp", [False, True], ids=["whole", "sp"])
def test_latent_attention_over_tensor_parallel_ranks(sp: bool) -> None:
    check("deepseek", 2, tp=2, ep=2, sp=sp)
    check("deepseek", 4, tp=2, cp=2, sp=sp, zero=1)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_gradients_wait_for_the_end_in_a_pipeline(zero: int) -> None:
    check("llama", 2, zero=zero, sequences=6, as_in_pipeline=True)
