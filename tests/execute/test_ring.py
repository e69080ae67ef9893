"""Keys and values around a ring: a step equals that of one process in fp64, what is sent, and what is refused."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

from planner.errors import PlannerError
from planner.execute import ring
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from planner.spec.strategy import Strategy
from tests.execute import compiled_runs, ring_runs
from tests.execute.cases import LENGTH
from tests.execute.plans import plan_of
from tests.execute.test_parity import TOLERANCE
from tests.execute.world import run_world
from tests.tiny import tiny_spec

Case = tuple[Plan, ModelSpec]


def case(model: str, gpus: int, changed: dict[str, Any] | None = None, **keys: Any) -> Case:
    spec = tiny_spec(model, **{"layers": 2, "vocab": 99} | (changed or {}))
    return plan_of(spec, Strategy.from_dict(keys, gpus=gpus), 4), spec


def check(gpus: int, cases: list[tuple[Case, tuple[int, int]]]) -> None:
    """Errors of every rank; each runs so many turns forward and backward."""
    for rank in run_world(gpus, ring_runs.step_errors, [each for each, _ in cases]):
        for ((plan, _), wanted), (errors, turns) in zip(cases, rank, strict=True):
            assert not {path: error for path, error in errors.items() if not error < TOLERANCE}, plan.strategy
            assert turns == wanted, plan.strategy


def test_two_ranks() -> None:
    """Two layers and four microbatches. What is kept selectively does not go around again."""
    check(
        2,
        [
            (case("llama", 2, cp=2), (8, 8)),
            (case("gpt", 2, cp=2, recompute="full"), (16, 8)),
            (case("llama", 2, cp=2, recompute="selective"), (8, 8)),
            (case("deepseek", 2, cp=2), (8, 8)),
            (case("mistral", 2, {"sliding_window": LENGTH}, cp=2), (8, 8)),
        ],
    )


def test_four_ranks() -> None:
    check(
        4,
        [
            (case("llama", 4, cp=4), (8, 8)),
            (case("llama", 4, cp=2, tp=2, sp=True, recompute="selective"), (8, 8)),
            (case("llama", 4, cp=2, dp=2, zero=3, recompute="full"), (8, 4)),
            (case("gpt", 4, cp=2, pp=2), (4, 4)),
            (case("llama", 4, {"layers": 4}, cp=2, pp=2, vpp=2, schedule="zbv"), (8, 8)),
        ],
    )


def test_modules_of_hugging_face() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [("qwen3", {}, {"cp": 2}), ("gpt2", {}, {"cp": 2})]
    for wrong, (turns, _) in run_world(2, ring_runs.wrong_with_theirs, cases):
        assert not wrong, "\n".join(wrong)
        assert turns


def test_a_compiled_block_is_one_graph() -> None:
    cases = [case("llama", 2, cp=2, recompute="selective")]
    for ((errors, graphs, breaks),) in run_world(
        2, functools.partial(compiled_runs.step_errors, context="ring"), cases
    ):
        assert not {path: error for path, error in errors.items() if not error < TOLERANCE}
        assert (graphs, breaks) == (1, 0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_turn(ranks: int) -> None:
    """Groups of queries, values narrower than keys, and heads that no flash kernel takes as they are."""
    for errors in run_world(ranks, ring_runs.turn_errors, 4, 2, 12, 5):
        assert not {name: error for name, error in errors.items() if not error < 1e-13}


def test_what_is_sent() -> None:
    """cp − 1 hops of a rank's keys and values either way, and cp of their gradients, which are summed in fp32.

    Keys and values of 3 sequences of 4 tokens, 2 heads of 8: 384 values.
    """
    for dtype, size, summed in ((torch.float64, 8, 8), (torch.bfloat16, 2, 4)):
        for forward, backward in run_world(4, ring_runs.sent, dtype):
            assert [(each.kind, each.count, each.bytes) for each in forward] == [("all_to_all", 3, 3 * 384 * size)]
            assert [(each.kind, each.count, each.bytes) for each in backward] == [
                ("all_to_all", 7, 3 * 384 * size + 4 * 384 * summed)
            ]


def test_options_of_the_process_are_as_they_were() -> None:
    before = vars(torch_ring._cp_options).copy()
    with contextlib.suppress(KeyError), ring._options(torch.float64):
        assert not torch_ring._cp_options.convert_to_f32
        assert torch_ring._cp_options.rotate_method is torch_ring._RotateMethod.ALL_TO_ALL
        raise KeyError
    assert vars(torch_ring._cp_options) == before


def _piece(device: str, dtype: torch.dtype, *, keys: int = 16) -> list[torch.Tensor]:
    """A gradient, queries of 8 heads of 100, keys of 2 and values of 60, values drawn on the CPU."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((16, 8, 60), (16, 8, 100), (keys, 2, 100), (keys, 2, 60))
    drawn = (torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype).to(device).transpose(1, 2) for x in drawn]


@pytest.mark.parametrize(("keys", "causal"), [(16, True), (8, False)])
def test_flash_kernels_of_a_gpu_take_what_a_ring_gives_them(keys: int, causal: bool) -> None:
    """Without a GPU, by the shapes alone: arguments, heads, widths and precisions fit torch's operators."""
    real = _piece("cpu", torch.bfloat16, keys=keys)
    with FakeTensorMode():
        grad, q, k, v = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in real)
        out, log_sums = ring._over_piece(q, k, v, is_causal=causal, scale=0.3)
        grads = ring._over_piece_backward(
            grad=grad, query=q, key=k, value=v, out=out, logsumexp=log_sums, is_causal=causal, scale=0.3
        )
    for made, like in zip((out, *grads), (grad, q, k, v), strict=True):
        assert (made.shape, made.dtype, made.device) == (like.shape, like.dtype, like.device)
    assert (log_sums.shape, log_sums.dtype) == (q.shape[:3], torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, on which its flash kernels could run")
@pytest.mark.parametrize(("keys", "causal"), [(16, True), (8, False)])
def test_flash_kernels_of_a_gpu_compute_what_those_of_a_cpu_do(keys: int, causal: bool) -> None:
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        grad, q, k, v = _piece(device, dtype, keys=keys)
        out, log_sums = ring._over_piece(q, k, v, is_causal=causal, scale=0.1)
        grads = ring._over_piece_backward(
            grad=grad, query=q, key=k, value=v, out=out, logsumexp=log_sums, is_causal=causal, scale=0.1
        )
        found.append([x.double().cpu() for x in (out, log_sums, *grads)])
    for exact, rounded in zip(*found, strict=True):
        assert float((exact - rounded).abs().max() / exact.abs().max()) < 0.03


@pytest.mark.parametrize(
    ("model", "changed", "value"),
    [
        ("unfused", {}, "attention unfused"),
        ("mistral", {}, "sliding_window 8"),
        ("gemma2", {}, "sliding_window 8"),
        ("gemma2", {"sliding_window": 0, "full_attention_every": 0}, "attention_softcap 50.0"),
        ("gpt_oss", {"sliding_window": 0, "full_attention_every": 0}, "attention_sinks True"),
        ("bloom", {}, "positions alibi"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ],
)
def test_other_attention_is_refused(model: str, changed: dict[str, Any], value: str) -> None:
    spec = tiny_spec(model, **changed)
    with pytest.raises(PlannerError, match="torch's ring attention has no") as caught:
        ring.require_context("ring", spec, Strategy(cp=2), LENGTH)
    assert (caught.value.value, caught.value.key, caught.value.exit_code) == (value, "context", 2)
    ring.require_context("gather", spec, Strategy(cp=2), LENGTH)
    ring.require_context("ring", spec, Strategy(dp=2), LENGTH)  # there is none


def test_a_word_that_means_nothing_is_refused() -> None:
    word: Any = "rings"
    with pytest.raises(PlannerError, match="one of gather, ring is needed"):
        ring.require_context(word, tiny_spec("llama"), Strategy(dp=2), LENGTH)


def test_a_gpu_computes_in_half_precision() -> None:
    ring.require_ring_kernel("ring", Strategy(cp=2), "fp64", "cpu")
    ring.require_ring_kernel("ring", Strategy(cp=2), "bf16", "cuda")
    ring.require_ring_kernel("ring", Strategy(dp=2), "fp32", "cuda")
    ring.require_ring_kernel("gather", Strategy(cp=2), "fp32", "cuda")
    with pytest.raises(PlannerError, match="compute in bf16 or fp16") as caught:
        ring.require_ring_kernel("ring", Strategy(cp=2), "fp32", "cuda")
    assert (caught.value.value, caught.value.key, caught.value.exit_code) == ("fp32", "context", 2)


def test_a_runner_refuses_before_any_work() -> None:
    told = run_world(2, ring_runs.refusal, *case("bloom", 2, cp=2))
    assert told == [("torch's ring attention has no slopes", "positions alibi")] * 2
