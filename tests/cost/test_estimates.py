"""planner.estimate as a user calls it: published steps, round trips, errors, and what it says about itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import planner
from planner.cost.estimates import arranged_estimate, model_flops, training_estimate
from planner.cost.ways import Arrangement, Way
from planner.errors import PlannerError
from planner.spec.estimate import Estimate
from planner.spec.hardware_sources import load_hardware
from planner.spec.strategy import Recompute, Strategy
from planner.spec.workload import TrainWorkload
from planner.units import GIB
from tests.cost.published import PUBLISHED, Published
from tests.cost.training_cases import MEGATRON_SHAPE, exact, legal, tiny, workload
from tests.spec.strategies import STEADY
from tests.tiny import tiny_spec

H100 = load_hardware("dgx-h100")
SHORT = {"seq_len": 128, "global_batch": 64}


def asked(strategy: Any = None, gpus: int = 8, model: Any = None, **work: Any) -> Estimate:
    given = tiny_spec("llama") if model is None else model
    return planner.estimate(given, "dgx-h100", gpus, {**SHORT, **work}, strategy)


# published steps

EACH = 0.16  # the largest is BLOOM's final run, whose fastest step with the same layout was 4 % shorter
MEAN = 0.08


@pytest.fixture(scope="module")
def predicted() -> dict[str, float]:
    """Predicted over published step time, by run."""
    return {
        row.name: planner.estimate(row.model, row.hardware, row.gpus, row.workload, row.strategy).step_seconds
        / row.step_seconds
        for row in PUBLISHED
    }


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_a_published_step(row: Published, predicted: dict[str, float]) -> None:
    assert abs(predicted[row.name] - 1.0) <= EACH


def test_published_steps_on_average(
    predicted: dict[str, float], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = np.abs(np.array(list(predicted.values())) - 1.0)
    if request.config.get_verbosity() >= 0:  # under -v
        with capsys.disabled():
            print()
            for row in PUBLISHED:
                print(f"{row.name:36} published {row.step_seconds:7.2f} s  off by {predicted[row.name] - 1:+.1%}")
            print(f"{'mean':36} {errors.mean():.1%}")
    assert errors.mean() <= MEAN


# what an estimate holds


def test_totals_are_sums_and_rates_follow() -> None:
    found = asked({"tp": 2, "pp": 2, "zero": 1, "sp": True})
    assert found.step_seconds == pytest.approx(sum(found.breakdown.parts.values()))
    assert found.tokens_per_second_per_gpu == pytest.approx(128 * 64 / 8 / found.step_seconds)
    assert found.memory_bytes == max(memory.device_bytes for memory in found.memory_per_stage)
    assert len(found.memory_per_stage) == 2
    assert found.memory.device_bytes == pytest.approx(sum(found.memory.parts.values()))
    assert found.capacity_bytes == H100.device.memory_bytes
    assert (found.gpus, found.hardware, found.model) == (8, "dgx-h100", "llama")
    assert found.strategy.dp == 2, "which follows from gpus"


def test_flops_of_utilisation_leave_recomputation_out() -> None:
    """Attention whole and its backward twice the forward: 72·B·s·L·h²·(1 + s/6h + V/12Lh) of a GPT."""
    h, s, layers, vocab = 1024, 128, 2, 100
    graph = tiny("gpt", **MEGATRON_SHAPE, attention="flash")
    expected = 72 * 64 * s * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    assert model_flops(graph, workload()) == pytest.approx(expected)
    for recompute in ("none", "full"):
        found = training_estimate(graph, H100, workload(), Strategy(dp=4, recompute=recompute))  # type: ignore[arg-type]
        assert found.mfu * found.step_seconds * 4 * 989.4e12 == pytest.approx(expected)
    narrow = training_estimate(graph, H100, workload(precision="fp8"), Strategy())
    assert narrow.mfu * narrow.step_seconds * 1978.9e12 == pytest.approx(expected)


def test_flops_agree_with_the_graph() -> None:
    """Products as the graph counts them; fused attention without its scores computed again, 4 for 5."""
    for name in ("llama", "mixtral", "deepseek", "unfused"):
        graph, work = tiny(name), workload()
        repeats = graph.repeats()
        again = sum(
            repeats[block] * (op.backward_flops(1, 128) - 2 * op.flops(1, 128))
            for block, found in graph.blocks.items()
            for op in found.operators
            if op.kind == "attention"
        )
        expected = graph.flops(1, 128) + graph.backward_flops(1, 128) - again
        assert model_flops(graph, work) == pytest.approx(64 * expected)


@settings(max_examples=40, **STEADY)
@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    work = workload(stack="megatron")
    strategy = data.draw(st.sampled_from(legal("mixtral", 16, work, 300)))
    found = training_estimate(tiny("mixtral"), H100, work, strategy)
    again = Estimate.from_dict(found.to_dict())
    assert again == found
    assert again.step_seconds == found.step_seconds
    assert again.fits == found.fits
    told = found.to_dict()
    told["breakdown"]["matmul_seconds"] *= 2
    with pytest.raises(PlannerError):
        Estimate.from_dict(told)


# recomputation on its own


def capacities() -> Iterator[tuple[str, float]]:
    """A GPU just large enough for each level of recomputation, and one too small for any."""
    graph, work = tiny("gpt", layers=16), workload()
    for level in ("none", "selective", "full"):
        strategy = Strategy(microbatch=32, recompute=level)  # type: ignore[arg-type]
        yield level, training_estimate(graph, exact(), work, strategy).uncertainty.memory_bytes.high / GIB


def test_auto_takes_the_cheapest_recomputation_that_fits() -> None:
    graph = tiny("gpt", layers=16)
    needed = dict(capacities())
    assert needed["none"] > needed["selective"] > needed["full"]
    for level, gib in needed.items():
        profile = exact(device__memory_gib=gib * (1 + 1e-9))
        found = training_estimate(graph, profile, workload(), Strategy(microbatch=32, recompute="auto"))
        assert (found.strategy.recompute, found.fits) == (level, True)
    profile = exact(device__memory_gib=0.9 * needed["full"])
    found = training_estimate(graph, profile, workload(), Strategy(microbatch=32, recompute="auto"))
    assert (found.strategy.recompute, found.fits) == ("full", False)


def arranged(layers: tuple[int, ...], recompute: tuple[Recompute, ...]) -> Estimate:
    graph = tiny("gpt", layers=4)
    blocks = iter(recompute)
    ways = tuple(Way(block=item.block, recompute=next(blocks) if item.path else None) for item in graph.sequence)
    return arranged_estimate(
        graph, H100, workload(), Arrangement(strategy=Strategy(pp=2), layers=layers, ways=ways)
    )


def test_layers_of_stages_may_be_given() -> None:
    even = training_estimate(tiny("gpt", layers=4), H100, workload(), Strategy(pp=2))
    same, uneven = arranged((2, 2), ("none",) * 4), arranged((0, 4), ("none",) * 4)
    assert same == even
    assert uneven.step_seconds > even.step_seconds
    assert uneven.memory_per_stage[1].weights_bytes > even.memory_per_stage[1].weights_bytes


def test_each_layer_may_be_recomputed_or_not() -> None:
    none, first = arranged((2, 2), ("none",) * 4), arranged((2, 2), ("full", "none", "none", "none"))
    both, last = arranged((2, 2), ("full",) * 4), arranged((2, 2), ("none", "none", "none", "full"))
    held = [[stage.activations_bytes for stage in found.memory_per_stage] for found in (none, first, last, both)]
    assert held[3][0] < held[1][0] < held[0][0] == held[2][0]
    assert held[3][1] < held[2][1] < held[0][1] == held[1][1]
    assert none.step_seconds < first.step_seconds < both.step_seconds


def test_out_of_memory_is_an_answer() -> None:
    found = planner.estimate("gpt3-175b", "dgx-h100", 1)
    assert not found.fits
    assert found.memory_bytes > found.capacity_bytes
    assert math.isfinite(found.step_seconds)


# input


def test_dicts_and_dataclasses_ask_the_same() -> None:
    keys = {"tp": 2, "zero": 1}
    plain = asked(keys)
    typed = planner.estimate(
        tiny_spec("llama"), H100, 8, TrainWorkload(precision="bf16", **SHORT), Strategy.from_dict(keys, gpus=8)
    )
    assert typed == plain


def test_defaults() -> None:
    """About a million tokens in bf16, everything data-parallel."""
    found = planner.estimate(tiny_spec("llama"), "dgx-h100", 8)
    assert (found.workload.global_batch, found.workload.precision) == (256, "bf16")  # type: ignore[union-attr]
    assert found.strategy == Strategy(dp=8)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"gpus": 0}, "gpus"),
        ({"gpus": -8}, "gpus"),
        ({"gpus": 2.5}, "gpus"),
        ({"gpus": "8"}, "gpus"),
        ({"gpus": True}, "gpus"),
        ({"strategy": {"tpp": 2}}, "tpp"),
        ({"strategy": {"tp": "two"}}, "tp"),
        ({"strategy": {"tp": 0}}, "tp"),
        ({"strategy": ["tp"]}, "data"),
        ({"strategy": {"recompute": "sometimes"}}, "recompute"),
        ({"strategy": {"order": "tp-dp"}}, "order"),
        ({"workload": {"batch": 3}}, "batch"),
        ({"workload": {"seq_len": "long"}}, "seq_len"),
        ({"workload": {"mode": "serve"}}, "mode"),
        ({"workload": {"mode": "infer"}}, "mode"),
        ({"workload": 5}, "workload"),
        ({"workload": {"precision": "fp64"}}, "precision"),
        ({"model": "gpt5"}, "model"),
        ({"model": 5}, "model"),
        ({"hardware": "dgx-z900"}, "hardware"),
        ({"hardware": 5}, "hardware"),
        # what cannot run
        ({"strategy": {"tp": 3}, "gpus": 9}, "tp"),
        ({"strategy": {"tp": 2, "dp": 2}}, "gpus"),
        ({"strategy": {"ep": 2}}, "ep"),
        ({"strategy": {"pp": 8, "vpp": 4}, "workload": SHORT}, "pp"),
        ({"strategy": {"vpp": 2}}, "vpp"),
        ({"strategy": {"dp_replicate": 3, "zero": 1}}, "dp_replicate"),
        ({"strategy": {"microbatch": 3}}, "global_batch"),
        ({"strategy": {"attention_dp": 2}}, "gpus"),
        ({"strategy": {"attention_dp": 2, "dp": 4}}, "attention_dp"),
        ({"hardware": "rtx4090-pcie", "workload": {**SHORT, "precision": "nvfp4"}}, "gemm.nvfp4"),
    ],
    ids=str,
)
def test_wrong_input_says_rule_value_and_remedy(given: dict[str, Any], key: str) -> None:
    full = {"model": tiny_spec("llama"), "hardware": "dgx-h100", "gpus": 8, "workload": SHORT, **given}
    with pytest.raises(PlannerError) as raised:
        planner.estimate(**full)
    error = raised.value
    assert error.key == key
    assert error.rule
    assert error.remedy
    assert error.value is not None


def test_a_user_module_is_estimated() -> None:
    from tests.trace import user_models

    found = planner.estimate(f"{user_models.__file__}:hybrid", "dgx-h100", 8, SHORT, {"tp": 2, "zero": 1})
    assert found.step_seconds > 0
    assert found.breakdown.tp_seconds > 0


def test_estimates_are_values() -> None:
    one, other = asked({"tp": 2}), asked({"tp": 2})
    assert one == other
    assert dataclasses.replace(one, warnings=("told",)) != one
