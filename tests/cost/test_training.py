"""A training step put together: what no layout's time and memory may do, and the closed form against events."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from planner.cost.times import PARTS
from planner.cost.training import SharedStages, TrainingCost
from planner.spec.hardware import HardwareProfile
from planner.spec.hardware_sources import load_hardware
from planner.spec.overrides import with_changes
from planner.spec.strategy import Overlap, Schedule, Strategy
from planner.spec.workload import TrainWorkload
from tests.cost.rendezvous import flush_seconds
from tests.cost.training_cases import (
    BANDWIDTH,
    LINK,
    PEAK,
    SMALL_ENDS,
    alone,
    bundled,
    cost,
    exact,
    hardware,
    legal,
    tiny,
    workload,
)
from tests.spec.strategies import STEADY

H100 = load_hardware("dgx-h100")
WORKS = {
    "eager": workload(),
    "megatron": workload(stack="megatron"),
    "compiled": workload(stack="compiled", precision="fp8"),
}
CASES = [("llama", "eager"), ("mixtral", "megatron"), ("gpt", "compiled")]
STATES = ("weights", "gradients", "optimizer", "gathered")
EXCHANGES = ("tp", "cp", "ep", "dp", "pp", "bubble")

cases = pytest.mark.parametrize(("name", "stack"), CASES)


def priced(name: str, stack: str, profile: HardwareProfile = H100) -> TrainingCost:
    return cost(tiny(name), profile, WORKS[stack])


def some(name: str, stack: str, count: int = 300, gpus: int = 16, **fixed: Any) -> tuple[Strategy, ...]:
    return legal(name, gpus, WORKS[stack], count, **fixed)


def part(shared: SharedStages, name: str) -> float:
    return float(shared.parts()[PARTS.index(name), 0])


# many at once


@cases
def test_order_and_company_do_not_matter(name: str, stack: str) -> None:
    """A strategy alone costs what it costs among others, whatever stands before it."""
    strategies = some(name, stack)
    together = priced(name, stack).costs(strategies)
    shuffled = np.random.default_rng(0).permutation(len(strategies))
    again = priced(name, stack).costs([strategies[place] for place in shuffled])
    noise = 1e-12 * together.step_seconds
    assert np.all(np.abs(again.parts - together.parts[:, shuffled]) <= noise[shuffled])
    np.testing.assert_allclose(again.device_bytes, together.device_bytes[shuffled], rtol=1e-12)
    pricer = priced(name, stack)
    for place in range(0, len(strategies), 6):
        single = pricer.costs([strategies[place]])
        assert np.all(np.abs(single.parts[:, 0] - together.parts[:, place]) <= noise[place])
        np.testing.assert_allclose(single.device_bytes[0], together.device_bytes[place], rtol=1e-12)


def test_few_microbatches_beside_many() -> None:
    """The rounds of a pipeline are those of each layout, not those of the longest one beside it."""
    few = Strategy(pp=4, vpp=2, schedule="interleaved", dp=4, microbatch=8)
    many = dataclasses.replace(few, microbatch=1)
    pricer = cost(tiny("gpt", layers=8), exact(), WORKS["eager"])
    both = pricer.costs([few, many]).step_seconds
    assert both.tolist() == [pricer.costs([item]).step_seconds[0] for item in (few, many)]


@cases
def test_parts_are_times(name: str, stack: str) -> None:
    found = priced(name, stack).costs(some(name, stack))
    assert np.all(np.isfinite(found.parts))
    assert np.all(found.parts >= 0.0)
    assert found.step_seconds == pytest.approx(found.parts.sum(axis=0))
    assert np.all(found.device_bytes > 0.0)


# hand-worked


def test_one_gpu_only_computes() -> None:
    for name in ("gpt", "mixtral", "deepseek", "vit"):
        keys = {"seq_len": 17} if name == "vit" else {}
        found = alone(tiny(name), H100, workload(**keys))
        assert [part(found, axis) for axis in EXCHANGES] == pytest.approx([0.0] * 6, abs=1e-15)
        assert part(found, "matmul") > 0.0
        assert part(found, "optimizer") > 0.0


def test_a_uniform_pipeline_waits_p_minus_1_times() -> None:
    """Narayanan et al. 2021: of m microbatches through p stages, (p − 1)/m; interleaved, v times less."""
    for pp, vpp, schedule in ((4, 1, "1f1b"), (4, 1, "gpipe"), (4, 2, "interleaved"), (8, 4, "interleaved")):
        graph = tiny("gpt", layers=32, **SMALL_ENDS)  # ends that weigh next to nothing
        profile = exact(topology__flat__bandwidth_gb_per_second=1e6)
        work = workload(global_batch=32, seq_len=1024)
        found = alone(graph, profile, work, pp=pp, vpp=vpp, schedule=schedule)
        busy = sum(part(found, name) for name in ("matmul", "attention", "elementwise"))
        assert part(found, "bubble") / busy == pytest.approx((pp - 1) / (vpp * 32), rel=0.05)


def test_gradients_cross_the_network_once_a_step() -> None:
    """2Ψ(n−1)/n of fp32, all exposed without overlap; with it, what outlasts the last backward, or a block's.

    Around it FSDP2 without shards moves 4·4 + (2 + 4) bytes of each gradient, and 2·2 + (4 + 2) of each value.
    """
    graph, given, profile = tiny("gpt"), {"dp": 4, "microbatch": 2}, exact()
    copied = graph.parameter_count * (22 + 10) / profile.device.memory_bandwidth
    seconds = 2 * 4 * graph.parameter_count * 3 / 4 / LINK + copied
    plain = alone(graph, profile, **given, overlap={"dp": False})
    assert part(plain, "dp") == pytest.approx(seconds)
    slow = exact(device__peak_tflops__bf16=1e-6)  # a backward that any exchange hides behind
    hidden = alone(graph, slow, **given)
    assert copied < part(hidden, "dp") < seconds


def test_parts_of_gradients_are_summed_once_a_step() -> None:
    """Norms that each rank applies to its part of the sequence: two a layer and the last, in fp32."""
    bytes_ = 4.0 * 5 * 64
    norms = bytes_ / LINK + 4 * bytes_ / BANDWIDTH  # two ranks send half of it twice; packed and unpacked
    priced_alone = cost(tiny("llama"), exact(), workload())

    def of(**degrees: Any) -> float:
        return float(priced_alone.alone(Strategy(**degrees)).once_a_step().alone[0, 0])

    assert of(tp=2, sp=True, zero=0) == pytest.approx(norms)
    assert of(tp=2, sp=False, zero=0) == 0.0
    # four ranks have two heads of keys and values: each one of them, summed with the one rank that has the same
    heads = 4.0 * 2 * 2 * 16 * 64
    pairs = heads / LINK + 4 * heads / BANDWIDTH
    assert of(tp=4, sp=False, zero=0) == pytest.approx(pairs)
    assert of(tp=4, sp=True, zero=0) == pytest.approx(pairs + 1.5 * bytes_ / LINK + 4 * bytes_ / BANDWIDTH)


def test_nothing_overlaps_where_launches_wait_for_kernels() -> None:
    graph, blocking = tiny("llama"), hardware("dgx-h100", software__eager__blocking=1.0)
    for zero in (0, 3):
        given: dict[str, Any] = {"dp": 8, "zero": zero}
        found = alone(graph, blocking, WORKS["eager"], **given)
        apart = alone(graph, blocking, WORKS["eager"], **given, overlap={"dp": False})
        assert part(found, "dp") == part(apart, "dp") > part(alone(graph, H100, WORKS["eager"], **given), "dp")


@pytest.mark.parametrize(("stack", "zero"), [("eager", 0), ("eager", 3), ("megatron", 3)])
def test_what_is_not_overlapped_is_waited_for(stack: str, zero: int) -> None:
    given: dict[str, Any] = {"dp": 8, "zero": zero}
    beside = alone(tiny("llama"), H100, WORKS[stack], **given)
    after = alone(tiny("llama"), H100, WORKS[stack], **given, overlap={"dp": False})
    assert part(after, "dp") > part(beside, "dp")


def test_the_optimizer_shares_its_work_under_zero() -> None:
    """Each parameter: gradient 4, fp32 weight and two moments read and written 24, 16-bit weight 2, the norm 4."""
    graph = tiny("gpt")
    for zero, share in ((0, 1), (1, 4)):
        found = alone(graph, exact(), workload(stack="megatron"), dp=4, zero=zero)
        assert part(found, "optimizer") == pytest.approx(34 * graph.parameter_count / share / 1e12)


def test_products_take_the_flops_of_the_slowest_rank() -> None:
    graph = tiny("gpt", layers=4)
    profile = exact(device__memory_bandwidth_gb_per_second=1e9)
    layer = 2 * 128 * (4 * 64 * 64 + 2 * 64 * 128)
    head = 2 * 128 * 64 * 100
    found = alone(graph, profile, pp=2)
    assert part(found, "matmul") == pytest.approx(64 * 3 * (2 * layer + head) / PEAK, rel=1e-3)
    given = cost(graph, profile).alone(Strategy(pp=2), layers=(4, 0))
    assert part(given, "matmul") == pytest.approx(64 * 3 * 4 * layer / PEAK, rel=1e-3)


def test_busy_seconds_of_ranks() -> None:
    found = alone(tiny("gpt", layers=4), exact(), pp=2, overlap={"pp": True})
    busy = found.busy_seconds()[:, 0]
    assert busy[1] > busy[0], "the head weighs more than the embedding"
    assert found.timeline().busy_seconds / 64 == pytest.approx(busy)


# what holds for every layout


@pytest.mark.parametrize(
    "faster",
    [
        {"device.peak_tflops.bf16": "2x", "device.peak_tflops.fp8": "2x"},
        {"device.memory_bandwidth_gb_per_second": "3x"},
        {"intra_node_bandwidth": "2x"},
        {"inter_node_bandwidth": "2x"},
    ],
    ids=lambda changes: next(iter(changes)),
)
@cases
def test_a_faster_gpu_is_never_slower(name: str, stack: str, faster: dict[str, str]) -> None:
    strategies = some(name, stack, gpus=32)
    before = priced(name, stack).costs(strategies).step_seconds
    after = priced(name, stack, with_changes(H100, faster)).costs(strategies).step_seconds
    # a zero bubble's fill follows the weights' share of a backward, of which the host's part has none
    split = np.array([item.schedule in ("zb", "zbv") for item in strategies])
    assert np.all(after <= before * np.where(split, 1 + 1e-3, 1 + 1e-12)), strategies[
        int(np.argmax(after / before))
    ]
    assert np.any(after < before)


def varied(strategies: Sequence[Strategy], **changes: Any) -> list[Strategy]:
    return [dataclasses.replace(item, **changes) for item in strategies]


@cases
def test_recomputing_more_takes_longer_and_keeps_less(name: str, stack: str) -> None:
    strategies = some(name, stack, recompute="none")
    pricer = priced(name, stack)
    found = [pricer.costs(varied(strategies, recompute=level)) for level in ("none", "selective", "full")]
    for less, more in itertools.pairwise(found):
        assert np.all(more.step_seconds >= less.step_seconds * (1 - 1e-12))
        worse = more.device_bytes / less.device_bytes
        assert np.all(worse <= 1 + 1e-12), strategies[int(np.argmax(worse))]


@cases
def test_sharding_more_keeps_less(name: str, stack: str) -> None:
    """ZeRO-1 beside none, ZeRO-3 beside ZeRO-1: states of the worst rank, and all that the device sees."""
    graph = tiny(name, layers=16, **SMALL_ENDS)
    sharded = [item for item in some(name, stack, zero=3) if item.dp // item.dp_replicate * item.cp > 1]
    pricer = cost(graph, H100, WORKS[stack])
    found = []
    for zero in (0, 1, 3):
        costs = [pricer.alone(item).memory() for item in varied(sharded[:24], zero=zero)]
        states = [sum(item.parts[key] for key in STATES).max() for item in costs]  # type: ignore[union-attr]
        found.append(np.array([states, [item.device.max() for item in costs]]))
    for less, more in itertools.pairwise(found):
        worse = (more / less).max(axis=0)
        assert np.all(worse <= 1 + 1e-12), (sharded[int(np.argmax(worse))], worse.max())


@cases
def test_a_larger_batch_never_takes_less(name: str, stack: str) -> None:
    strategies = some(name, stack)
    once = priced(name, stack).costs(strategies)
    doubled = cost(tiny(name), H100, dataclasses.replace(WORKS[stack], global_batch=128)).costs(strategies)
    assert np.all(doubled.step_seconds >= once.step_seconds * (1 - 1e-12))


@settings(max_examples=30, **STEADY)
@given(st.sampled_from(["gpipe", "1f1b"]), st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 4]))
def test_microbatches_in_memory(schedule: str, pp: int, times: int) -> None:
    """More of them take no less under GPipe, and the same under 1F1B once every stage is filled."""
    pricers = [
        cost(tiny("gpt", layers=8), H100, workload(global_batch=size)) for size in (pp * times, 2 * pp * times)
    ]
    few, many = (pricer.costs([Strategy(pp=pp, schedule=schedule)]).device_bytes[0] for pricer in pricers)  # type: ignore[arg-type]
    if schedule == "gpipe":
        assert many > few
    else:
        assert many == few


# the closed form against the simulation


def compared(graph: Any, work: TrainWorkload, strategy: Strategy, profile: HardwareProfile) -> tuple[float, float]:
    """Closed form over simulation, and how uneven the ranks are."""
    shared = cost(graph, profile, work).alone(strategy)
    parts = shared.parts()[:, 0]
    outside = (
        sum(parts[PARTS.index(name)] for name in ("optimizer",)) + profile.software_for(work.stack).step_us * 1e-6
    )
    busy = shared.busy_seconds()[:, 0]
    return float((parts.sum() - outside) / shared.timeline().seconds), float(busy.max() / busy.mean())


def layouts_of_one_replica(count: int) -> list[Strategy]:
    """Pipelines of 4 and 8 ranks under every schedule."""
    found = []
    for pp in (4, 8):
        for schedule, vpp in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb", 2), ("zbv", 2)):
            for recompute, sp in (("none", True), ("full", False)):
                found.append(
                    Strategy(tp=8, pp=pp, vpp=vpp, schedule=schedule, recompute=recompute, sp=sp)  # type: ignore[arg-type]
                )
    return found[:count]


@pytest.mark.parametrize(("model", "stack"), [("gpt3-175b", "megatron"), ("llama3.1-70b", "eager")])
def test_the_closed_form_meets_the_simulation(model: str, stack: str) -> None:
    """Within 1 % where ranks have equal work, 3 % where the ends weigh more; 20 layouts of one replica each."""
    work = workload(seq_len=2048, global_batch=32, stack=stack)
    for strategy in layouts_of_one_replica(20):
        ratio, uneven = compared(bundled(model), work, strategy, H100)
        assert ratio == pytest.approx(1.0, abs=0.01 if uneven < 1.02 else 0.03), (
            strategy.label,
            strategy.schedule,
        )


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("network", ["1x", "0.02x"])
def test_messages_take_what_a_simulation_of_their_waits_says(schedule: Schedule, network: str) -> None:
    profile = with_changes(H100, {"inter_node_bandwidth": network})
    for microbatches in (4, 7, 24):
        work = workload(seq_len=2048, global_batch=microbatches)
        costs = cost(bundled("llama3.1-8b"), profile, work)
        given = {"tp": 8, "sp": True, "pp": 4, "schedule": schedule, "recompute": "full"}
        apart = costs.alone(Strategy(**given, overlap=Overlap(pp=True))).work
        assert float(apart.hop[0]) > 0
        simulated = flush_seconds(
            schedule, apart.ahead[:, 0].tolist(), apart.back[:, 0].tolist(), float(apart.hop[0]), microbatches
        )
        pipeline = float(costs.alone(Strategy(**given)).step().pipeline[0])
        assert pipeline == pytest.approx(simulated, rel=1e-6)
