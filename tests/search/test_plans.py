"""Plans of arrangements: what the file says, that it is read back to the same, and figures checked by hand."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from planner.cost.estimates import arranged_estimate
from planner.cost.expected import expected_collectives
from planner.cost.training import TrainingCost
from planner.execute.dryrun import dry_run
from planner.search.arranged import arrangement_of, settled
from planner.search.plans import folded_collectives, plan_of, re_estimated
from planner.spec.graph import Graph
from planner.spec.paths import Span
from planner.spec.plan import Certificate, ExpectedCollective, Plan, RunnerUp, content_digest
from planner.spec.strategy import Recompute, Strategy
from planner.spec.yaml_text import parse_yaml
from tests.cost.training_cases import bundled, hardware, tiny, user, workload
from tests.search.arrangements import EXACT, any_arrangement, arranged, layers_of, planned
from tests.tiny import NAMES, tiny_spec

H100 = hardware("dgx-h100")
DEEP = {"layers": 8}
PIPELINES: tuple[dict[str, Any], ...] = (
    {"dp": 4, "zero": 3},
    {"tp": 2, "dp": 2, "sp": True},
    {"tp": 2, "pp": 2, "dp": 2, "zero": 1},
    {"tp": 2, "pp": 2, "vpp": 2, "schedule": "interleaved", "sp": True},
    {"tp": 2, "pp": 2, "vpp": 2, "schedule": "zbv"},
)


def through_a_file(plan: Plan) -> Plan:
    data, source = parse_yaml(plan.to_yaml(), "plan.yaml")
    return Plan.from_dict(data, source)


def check_round_trip(graph: Graph, arrangement: Any, work: Any = None, profile: Any = EXACT) -> Plan:
    """The arrangement comes back from the file, with its price; estimating again changes not a byte."""
    work = work or workload()
    plan = planned(graph, arrangement, work, profile)
    again = through_a_file(plan)
    assert again == plan
    assert not again.edited
    found = arrangement_of(again, graph)
    assert found == settled(graph, arrangement)
    given, read = (arranged_estimate(graph, profile, work, item) for item in (arrangement, found))
    assert read.step_seconds == pytest.approx(given.step_seconds, rel=1e-12)
    assert plan.estimate.step_seconds == pytest.approx(given.step_seconds, rel=1e-12)
    assert read.memory_bytes == pytest.approx(given.memory_bytes, rel=1e-12)
    assert re_estimated(again, graph, profile).to_yaml() == plan.to_yaml()
    return plan


@pytest.mark.parametrize("strategy", PIPELINES, ids=lambda keys: Strategy.from_dict(keys).label)
@pytest.mark.parametrize("name", ["gpt", "llama", "mixtral", "deepseek"])
def test_round_trip_of_mixed_arrangements(name: str, strategy: dict[str, Any]) -> None:
    graph, draw = tiny(name, **DEEP), random.Random(f"{name} {sorted(strategy.items())}")
    for _ in range(2):
        check_round_trip(graph, any_arrangement(draw, graph, strategy))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gpt", "llama", "mixtral", "deepseek")])
def test_round_trip_of_other_models(name: str) -> None:
    graph, draw = tiny(name), random.Random(name)
    for strategy in ({"tp": 2, "dp": 2}, {"tp": 2, "sp": True}):
        check_round_trip(graph, any_arrangement(draw, graph, strategy))


@pytest.mark.parametrize("name", ["mlp", "odd_and_even", "hugging_face"])
def test_round_trip_of_a_users_module(name: str) -> None:
    graph, draw = user(name), random.Random(name)
    for strategy in ({"tp": 2, "dp": 2}, {"dp": 2, "zero": 2}):
        check_round_trip(graph, any_arrangement(draw, graph, strategy))


def test_experts_spread_without_tensor_parallelism() -> None:
    graph = tiny("mixtral")
    plan = check_round_trip(graph, arranged(graph, {"dp": 4, "ep": 4}))
    assert {pattern: line.split for pattern, line in plan.modules.items()} == {"blocks.0-1.ffn.experts": "expert"}
    assert planned(graph, arranged(graph, {"dp": 4})).modules == {}


def test_a_model_of_eighty_layers() -> None:
    graph = bundled("llama3.1-70b")
    layers = (19, 21, 21, 19)
    words: dict[int, Recompute] = dict.fromkeys(range(1, 6), "full")
    strategy = {"tp": 8, "pp": 4, "dp": 2, "zero": 1, "sp": True, "recompute": "selective"}
    whole = {40: frozenset(op.name for op in graph.blocks["blocks.0"].operators
                           if op.kind == "matmul" and op.module.startswith("ffn."))}  # fmt: skip
    arrangement = arranged(graph, strategy, layers=layers, words=words, whole=whole)
    plan = check_round_trip(graph, arrangement, workload(seq_len=4096, global_batch=128), H100)
    assert [stage.layers for stage in plan.stages] == [
        (Span(0, 18),), (Span(19, 39),), (Span(40, 60),), (Span(61, 79),),
    ]  # fmt: skip
    assert plan.recompute == {"blocks.0-4": "full", "blocks.5-79": "selective"}
    assert plan.strategy.recompute == "auto", "blocks differ"
    assert [pattern for pattern in plan.modules if pattern.endswith("ffn.up")] == [
        "blocks.0-38,40-79.ffn.up", "blocks.39.ffn.up",
    ]  # fmt: skip
    assert plan.split_of("blocks.39.ffn.up") == plan.split_of("blocks.39.ffn_norm"), (
        "whole on part of the sequence"
    )
    assert len(plan.modules) == 16, "13 kinds of modules, three of them another way in one layer"


def test_equal_layers_are_one_line() -> None:
    graph = tiny("llama", **DEEP)
    plan = planned(graph, arranged(graph, {"tp": 2, "pp": 2, "recompute": "full"}))
    assert plan.recompute == {"blocks.0-7": "full"}
    assert plan.strategy.recompute == "full"
    assert all(pattern.startswith(("blocks.0-7.", "embedding", "norm", "head")) for pattern in plan.modules)
    assert planned(graph, arranged(graph, {"tp": 2})).recompute == {}


def test_stages_are_those_of_the_schedule() -> None:
    graph = tiny("llama", **DEEP)
    keys: dict[str, Any] = {"pp": 2, "vpp": 2}
    looped = planned(graph, arranged(graph, keys | {"schedule": "interleaved"}, layers=(1, 2, 3, 2)))
    assert [stage.layers for stage in looped.stages] == [(Span(0, 0), Span(3, 5)), (Span(1, 2), Span(6, 7))]
    turned = planned(graph, arranged(graph, keys | {"schedule": "zbv"}, layers=(1, 2, 3, 2)))
    assert [stage.layers for stage in turned.stages] == [(Span(0, 0), Span(6, 7)), (Span(1, 2), Span(3, 5))]


def test_an_end_may_be_a_stage_of_its_own() -> None:
    graph = tiny("llama")
    plan = check_round_trip(graph, arranged(graph, {"pp": 4}, layers=(0, 1, 1, 0)))
    assert [span.to_plain() for stage in plan.stages for span in stage.layers] == ["none", 0, 1, "none"]


def test_seconds_of_stages_are_those_of_their_blocks() -> None:
    graph = tiny("llama", **DEEP)
    arrangement = arranged(graph, {"pp": 2}, layers=(5, 3), words={1: "full"})
    plan = planned(graph, arrangement)
    blocks = TrainingCost(graph, EXACT, workload()).alone(arrangement.strategy).blocks
    layer, start, end = (blocks[name] for name in ("blocks.0", "start", "end"))
    ahead = [float(block.forward_seconds[0]) for block in (layer, start, end)]
    back = [float(block.backward_seconds[0]) for block in (layer, start, end)]
    first, last = plan.stages
    assert first.forward_seconds == pytest.approx(5 * ahead[0] + ahead[1], rel=1e-12)
    assert last.forward_seconds == pytest.approx(3 * ahead[0] + ahead[2], rel=1e-12)
    assert first.backward_seconds == pytest.approx(5 * back[0] + ahead[0] + back[1], rel=1e-12), "one layer again"
    assert last.backward_seconds == pytest.approx(3 * back[0] + back[2], rel=1e-12)


def test_collectives_of_equal_neighbours_are_one_line() -> None:
    graph, strategy = tiny("llama", **DEEP), {"tp": 2, "pp": 4, "sp": True}
    arrangement = arranged(graph, strategy)
    plan = planned(graph, arrangement)
    ways = settled(graph, arrangement).ways
    shared = TrainingCost(graph, EXACT, workload(), ways).alone(arrangement.strategy, arrangement.layers, ways)
    every = expected_collectives(shared)
    assert len(plan.collectives) < len(every)
    unfolded = [
        dataclasses.replace(item, stages=Span(stage, stage))
        for item in plan.collectives
        for stage in range(item.stages.first, item.stages.last + 1)
    ]
    assert sorted(unfolded, key=repr) == sorted(every, key=repr)
    gathers = [item for item in plan.collectives if (item.phase, item.kind) == ("forward", "all_gather")]
    # two gathers a layer, two layers a stage, 64 microbatches; the head reads the whole sequence once more
    assert [(item.stages.to_plain(), item.count) for item in gathers] == [("0-2", 256), (3, 320)]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("llama", {"tp": 2, "pp": 2, "dp": 2, "zero": 1}), ("deepseek", {"tp": 2, "dp": 2, "sp": True})],
)
def test_the_executor_issues_what_the_file_lists(name: str, strategy: dict[str, Any]) -> None:
    """Splits, stages and recomputation as the executor reads them from the plan; collectives rank by rank."""
    graph, spec, work = tiny(name, layers=4), tiny_spec(name, layers=4), workload(seq_len=32, global_batch=8)
    plan = through_a_file(planned(graph, any_arrangement(random.Random(1), graph, strategy), work))
    assert len(plan.modules) > len(planned(graph, arranged(graph, strategy), work).modules), "layers differ"
    for rank, stage in enumerate(plan.stages):
        ran = dry_run(
            spec, plan.strategy, work, plan.modules,
            layers=stage.layers[0], stage=rank, recompute=plan.recompute or None, clip=True,
        ).as_expected(Span(rank, rank))  # fmt: skip
        listed = [
            dataclasses.replace(item, stages=Span(rank, rank)) for item in plan.collectives if rank in item.stages
        ]
        assert sorted(ran, key=repr) == sorted(listed, key=repr)


def test_stages_that_are_equal_but_apart_stay_apart() -> None:
    def calls(stage: int, count: int, axis: Any = "tp") -> ExpectedCollective:
        return ExpectedCollective(
            stages=Span(stage, stage), axis=axis, phase="forward", kind="all_reduce", count=count, bytes=count
        )

    listed = [calls(0, 1), calls(0, 5, "ep"), calls(1, 1), calls(2, 2), calls(3, 1), calls(3, 5, "ep")]
    folded = folded_collectives(listed)
    assert [(item.axis, item.stages, item.count) for item in folded] == [
        ("tp", Span(0, 1), 1), ("tp", Span(2, 2), 2), ("tp", Span(3, 3), 1),
        ("ep", Span(0, 0), 5), ("ep", Span(3, 3), 5),
    ]  # fmt: skip


def test_the_proof_and_the_losers_stand_in_the_plan_and_fall_when_it_is_estimated_again() -> None:
    graph, arrangement = tiny("llama"), arranged(tiny("llama"), {"tp": 2})
    step = arranged_estimate(graph, EXACT, workload(), arrangement).step_seconds
    proof = Certificate(solver="HiGHS", objective=step, bound=step, candidates=3, pruned=1, solved=2)
    lost = RunnerUp(strategy=Strategy(dp=2), objective=2 * step, memory_bytes=1e9, reason="slower")
    plan = planned(graph, arrangement, certificate=proof, runners_up=(lost,))
    assert (plan.certificate, plan.runners_up) == (proof, (lost,))
    again = re_estimated(through_a_file(plan), graph, EXACT)
    assert again == dataclasses.replace(plan, certificate=None, runners_up=())


def test_names_are_the_users() -> None:
    graph = tiny("llama")
    plan = plan_of(
        model="mine.py:build", hardware="our-cluster.yaml", graph=graph, profile=EXACT, workload=workload(),
        arrangement=arranged(graph, {"dp": 2}), command="tp-plan plan mine.py:build",
        model_digest=content_digest("a"), hardware_digest=content_digest("b"), hardware_profile=EXACT,
    )  # fmt: skip
    assert (plan.estimate.model, plan.estimate.hardware) == ("mine.py:build", "our-cluster.yaml")
    assert (plan.digests.model, plan.digests.hardware) == (content_digest("a"), content_digest("b"))
    assert plan.hardware_profile == EXACT
    assert through_a_file(plan) == plan


def test_the_same_arrangement_gives_the_same_bytes() -> None:
    graph = tiny("deepseek", **DEEP)
    strategy = {"tp": 2, "pp": 2, "sp": True}
    texts = {planned(graph, any_arrangement(random.Random(7), graph, strategy)).to_yaml() for _ in range(3)}
    assert len(texts) == 1


def test_words_said_by_the_strategy_or_by_every_way_are_one() -> None:
    graph = tiny("llama")
    assert layers_of(graph) == 2
    one = planned(graph, arranged(graph, {"recompute": "full"}))
    other = planned(graph, arranged(graph, {}, words={1: "full", 2: "full"}))
    assert one.to_yaml() == other.to_yaml()
