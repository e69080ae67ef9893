"""A plan dry-run: short runs stand for whole steps, what agrees is said to, and what does not is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest

from planner.errors import PlannerError
from planner.execute.dry_rank import short_order
from planner.execute.dryrun import dry_run
from planner.execute.verify import verify_layout
from planner.spec.graph import Graph
from planner.spec.orders import Action, orders
from planner.spec.paths import Span
from planner.spec.plan import Plan
from planner.spec.strategy import Schedule, Strategy
from planner.spec.verification import StageCheck, Verification
from planner.spec.workload import TrainWorkload
from tests.cost.training_cases import tiny
from tests.search.arrangements import arranged, planned
from tests.tiny import tiny_spec

LENGTH = 32


def made(name: str, keys: dict[str, Any], *, microbatches: int, layers: int = 0, **more: Any) -> Plan:
    """A plan of a tiny model."""
    strategy = Strategy.from_dict(keys)
    batch = strategy.dp * strategy.microbatch * microbatches
    work = TrainWorkload(seq_len=LENGTH, global_batch=batch, precision="bf16")
    graph = tiny(name, layers)
    return planned(graph, arranged(graph, keys, **more), work)


def verified(plan: Plan, graph: Graph) -> Verification:
    kinds = [placement.block for placement in graph.sequence if placement.path]
    return verify_layout(plan, tiny_spec(graph.name, layers=len(kinds)), kinds)


def whole_step(plan: Plan, stage: StageCheck) -> Any:
    """Collectives and peak of all microbatches of a rank, in its schedule's order."""
    spec = tiny_spec(plan.model, layers=1 + max(span.last for stage in plan.stages for span in stage.layers))
    assert isinstance(plan.workload, TrainWorkload)
    where = {"layers": plan.stages[stage.stage].layers, "stage": stage.stage, "recompute": plan.recompute or None}
    run = dry_run(spec, plan.strategy, plan.workload, plan.modules, clip=True, **where)
    span = Span(stage.stage, stage.stage)
    counts = {(item.axis, item.phase, item.kind): (item.count, item.bytes) for item in run.as_expected(span)}
    return counts, run.peak.bytes


CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "experts": ("mixtral", 1, 4, {"ep": 2, "dp": 4, "zero": 1}),
    "many held": ("llama", 4, 9, {"pp": 4, "zero": 3, "schedule": "gpipe"}),
    "a backward in two": ("llama", 6, 8, {"pp": 3, "vpp": 2, "dp": 2, "zero": 1, "schedule": "zbv"}),
    "rounds, tied ends": ("gemma2", 8, 6, {"pp": 2, "vpp": 2, "dp": 2, "zero": 3, "schedule": "interleaved"}),
    "rounds, run again": (
        "llama",
        4,
        6,
        {"pp": 2, "vpp": 2, "tp": 2, "schedule": "interleaved", "recompute": "full"},
    ),
    "rounds of a backward in two": ("llama", 8, 6, {"pp": 2, "vpp": 2, "dp": 2, "zero": 3, "schedule": "zb"}),
    "shards, run again in part": ("llama", 5, 7, {"pp": 3, "dp": 2, "zero": 3, "recompute": "selective"}),
}


@pytest.mark.parametrize("case", CASES)
def test_short_runs_stand_for_whole_steps(case: str) -> None:
    name, layers, count, keys = CASES[case]
    plan = made(name, keys, layers=layers, microbatches=count)
    found = verified(plan, tiny(name, layers))
    assert found.agrees, found.differences
    for stage in {check.same_as: check for check in found.stages}.values():
        counts, peak = whole_step(plan, stage)
        checked = {
            (item.axis, item.phase, item.kind): (item.found_count, item.found_bytes) for item in stage.collectives
        }
        assert checked == counts
        assert stage.memory.found_tensor_bytes == peak


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("pp", [2, 3, 5])
@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_a_short_order_holds_what_the_whole_one_holds(schedule: Schedule, pp: int, rounds: int) -> None:
    vpp = {"interleaved": 3, "zb": 2, "zbv": 2}.get(schedule, 1)
    strategy = Strategy(pp=pp, vpp=vpp, schedule=schedule)
    count = rounds * (pp + 1 if rounds < 3 else pp)
    shorter = 0
    for rank, whole in enumerate(orders(schedule, pp, vpp, count)):
        short = short_order(strategy, rank, count)
        shorter += len(whole) - len(short)
        assert _most(short) == _most(whole)
        kinds = [sum(action.kind == kind for action in short) for kind in "FBIW"]
        assert kinds[0] == kinds[1] + kinds[3]
        assert kinds[2] == kinds[3]
    assert schedule == "gpipe" or rounds < 9 or shorter > 0


def _most(actions: Sequence[Action]) -> tuple[dict[Any, int], int, int]:
    """The most that each virtual stage holds and has waiting for its weight part, and of all together."""
    now: Counter[tuple[str, int]] = Counter()
    most: dict[tuple[str, int], int] = {}
    held = both = 0
    for kind, stage, _ in actions:
        now["held", stage] += {"F": 1, "W": 0}.get(kind, -1)
        now["waits", stage] += {"I": 1, "W": -1}.get(kind, 0)
        most = {key: max(most.get(key, 0), count) for key, count in now.items()}
        held = max(held, sum(count for (what, _), count in now.items() if what == "held"))
        both = max(both, sum(now.values()))
    return most, held, both


def test_equal_ranks_are_run_once() -> None:
    plan = made("llama", {"pp": 6, "recompute": "full"}, layers=6, microbatches=8)
    found = verified(plan, tiny("llama", 6))
    assert [stage.same_as for stage in found.stages] == [0, 1, 1, 1, 1, 5]
    assert [stage.memory.in_flight for stage in found.stages] == [6, 5, 4, 3, 2, 1]
    peaks = [stage.memory.found_tensor_bytes for stage in found.stages]
    for rank in (1, 2):
        assert whole_step(plan, found.stages[rank])[1] == peaks[rank]


def test_differences_are_named() -> None:
    plan = made("llama", {"tp": 2, "sp": True}, layers=1, microbatches=1)
    first, *others = plan.collectives
    less = replace(first, count=first.count - 1)
    assert [item.axis for item in others] == ["tp"] * (len(others) - 1) + ["world"], "the norm is the last"
    memory = plan.estimate.uncertainty.memory_bytes
    high = replace(memory, low=memory.low * 0.1, high=memory.low * 0.2)
    estimate = replace(plan.estimate, uncertainty=replace(plan.estimate.uncertainty, memory_bytes=high))
    wrong = replace(plan, collectives=(less, *others[:-1]), estimate=estimate)
    found = verified(wrong, tiny("llama", 1))
    assert not found.agrees
    counts, missing, peak = found.differences
    assert f"the plan lists {first.count - 1} of {first.bytes:,} bytes" in counts
    assert f"the executor issues {first.count} of {first.bytes:,} bytes" in counts
    assert f"{others[-1].axis} {others[-1].kind} in {others[-1].phase}: the plan lists none" in missing
    assert peak.startswith("stage 0: peak memory")
    assert found.to_dict()["differences"] == [counts, missing, peak]


def test_a_message_too_many_is_named() -> None:
    plan = made("gpt", {"pp": 2}, layers=2, microbatches=2)
    listed = {(item.axis, item.kind): item for item in plan.collectives}
    message, tied = listed["pp", "p2p"], listed["pp", "all_reduce"]
    changed = {message: replace(message, count=message.count + 1), tied: replace(tied, bytes=tied.bytes - 4)}
    wrong = replace(plan, collectives=tuple(changed.get(item, item) for item in plan.collectives))
    first, table, *_ = verified(wrong, tiny("gpt", 2)).differences
    assert first.startswith(f"stage 0: pp p2p in p2p: the plan lists {message.count + 1} of")
    assert table.startswith("stage 0: pp all_reduce in gradient_sync")


def test_what_the_executor_does_not_run_is_refused() -> None:
    graph = tiny("bert")
    plan = planned(
        graph, arranged(graph, {"dp": 2}), TrainWorkload(seq_len=LENGTH, global_batch=2, precision="bf16")
    )
    with pytest.raises(PlannerError, match="the executor runs decoders") as refused:
        verify_layout(plan, tiny_spec("bert"), [])
    assert "estimate" in refused.value.remedy
