"""The space against a plain enumeration that asks `violations` of every candidate, and its promises."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

import planner
from planner.cost.layouts import Layouts
from planner.cost.training import TrainingCost
from planner.errors import PlannerError
from planner.search.space import Space, divisors, space_of
from planner.spec.legality import RULES, violations
from planner.spec.model import ModelSpec
from planner.spec.strategy import Overlap, Strategy
from planner.spec.wishes import Wishes
from planner.spec.workload import TrainWorkload
from tests.tiny import tiny_spec

LLAMA = tiny_spec("llama", layers=6, hidden=96, heads=6, kv_heads=3, ffn=96)
EXPERTS = tiny_spec("mixtral", layers=10)
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb", "zbv")


def training(batch: int, seq_len: int = 48, stack: Any = "eager") -> TrainWorkload:
    return TrainWorkload(seq_len=seq_len, global_batch=batch, precision="bf16", stack=stack)


def listed(
    model: ModelSpec | None, gpus: int, batch: int, layers: int, held: dict[str, Any]
) -> Iterator[Strategy]:
    """Candidates one by one, as the module's text says it, some of them twice."""
    degrees = range(1, gpus + 1)
    for tp, pp, cp, dp in itertools.product(degrees, repeat=4):
        factors = {"tp": tp, "pp": pp, "cp": cp, "dp": dp}
        if tp * pp * cp * dp != gpus or any(held.get(key, size) != size for key, size in factors.items()):
            continue
        if model is None and (tp != held.get("tp", 1) or cp != held.get("cp", 1)):
            continue
        if model is None and pp > (layers + 2 if layers else 1):
            continue
        has_experts = model is not None and model.moe is not None
        whole = [size for size in range(1, gpus + 1) if tp * cp * dp % size == 0] if has_experts else [1]
        cuts = [1, tp] if has_experts else [1]
        stages = [
            vpp for vpp in range(2, 9) if layers and (layers % (pp * vpp) == 0 or (layers + 2) % (pp * vpp) == 0)
        ]
        sizes = [
            size for size in range(1, 2000) if batch % (dp * size) == 0 and (size <= 8 or size & (size - 1) == 0)
        ]
        ranges: dict[str, Any] = {
            "ep": whole, "etp": cuts, "schedule": SCHEDULES, "vpp": [1, *stages], "microbatch": sizes or [1],
            "zero": range(4), "dp_replicate": [size for size in degrees if dp % size == 0], "sp": [False, True],
            "order": ["tp-cp-dp-pp", "tp-cp-pp-dp"],
        }  # fmt: skip
        ranges |= {key: [value] for key, value in held.items() if key not in factors}
        for values in itertools.product(*ranges.values()):
            found = Strategy(**factors, **dict(zip(ranges, values, strict=True)))
            if _meant(found, held):
                yield _written_once(found, held)


def _meant(found: Strategy, held: dict[str, Any]) -> bool:
    """Whether the schedule comes with such virtual stages, and the ZeRO stage with such copies."""
    if "dp_replicate" not in held and found.zero == 0 and found.dp_replicate > 1:
        return False
    if "vpp" in held:
        return True
    if found.pp == 1 or found.schedule in ("gpipe", "1f1b"):
        return found.vpp == 1
    return found.vpp == 2 if found.schedule == "zbv" else found.vpp > 1


def _written_once(found: Strategy, held: dict[str, Any]) -> Strategy:
    if found.pp == 1 and "schedule" not in held:
        found = replace(found, schedule="1f1b")
    if found.tp == 1:
        found = replace(found, sp=False)
    if (found.pp == 1 or found.dp == 1) and "order" not in held:
        found = replace(found, order="tp-cp-dp-pp")
    return found


def rows(space: Space) -> list[Strategy]:
    return [space.strategy(row) for row in range(len(space))]


@pytest.mark.parametrize(
    ("model", "gpus", "batch", "fixed", "stack"),
    [
        (LLAMA, 12, 24, {}, "eager"),
        (LLAMA, 12, 24, {}, "megatron"),
        (LLAMA, 8, 30, {}, "compiled"),
        (LLAMA, 1, 40, {}, "eager"),
        (EXPERTS, 8, 16, {"schedule": "interleaved"}, "eager"),
        (EXPERTS, 16, 16, {"pp": 2, "zero": 3, "microbatch": 1}, "eager"),
        (EXPERTS, 8, 8, {"schedule": "1f1b"}, "eager"),
        (EXPERTS, 12, 36, {"ep": 3, "etp": 2, "dp_replicate": 2}, "megatron"),
        (LLAMA, 12, 36, {"microbatch": 9, "vpp": 3, "order": "pp-dp-cp-tp"}, "eager"),
        (LLAMA, 12, 24, {"sp": True, "schedule": "zb", "dp": 2}, "eager"),
        (LLAMA, 8, 24, {"tp": 4, "cp": 2, "zero": 0, "dp_replicate": 3}, "eager"),
        (tiny_spec("t5", heads=6, hidden=96), 6, 12, {}, "eager"),
        (None, 12, 24, {}, "eager"),
        (None, 6, 12, {"tp": 3, "vpp": 2}, "eager"),
    ],
)
def test_the_space_is_what_its_text_says(
    model: ModelSpec | None, gpus: int, batch: int, fixed: dict[str, Any], stack: str
) -> None:
    workload = training(batch, stack=stack)
    layers = model.layers if model else 4
    wishes = Wishes.from_dict({"fix": fixed})
    space = space_of(model, workload, gpus, wishes, layers=0 if model else layers)
    expected = set(listed(model, gpus, batch, layers, fixed))
    judged = {strategy: violations(model, workload, strategy, gpus) for strategy in expected}
    found = rows(space)
    assert len(found) == len(set(found)), "a candidate is there once"
    assert set(found) == {strategy for strategy, broken in judged.items() if not broken}
    assert space.illegal == Counter(broken[0].name for broken in judged.values() if broken)
    assert space.candidates == len(expected)
    assert list(space.illegal) == [name for name in RULES if name in space.illegal]


def test_what_has_no_layers_is_one_stage() -> None:
    assert {strategy.pp for strategy in rows(space_of(None, training(8), 4, Wishes()))} == {1}
    with pytest.raises(PlannerError, match="the stages of a pipeline are made of layers"):
        space_of(None, training(8), 4, Wishes.from_dict({"fix": "pp=2"}))


@pytest.mark.parametrize(("name", "gpus"), [("llama3.1-70b", 64), ("deepseek-v3", 256), ("gpt3-175b", 96)])
def test_random_strategies_of_a_large_space(name: str, gpus: int) -> None:
    """Those in it are legal, and a random change of one is in it exactly where it is legal."""
    model, workload = planner.load_model(name), training(768, seq_len=2048)
    space = space_of(model, workload, gpus, Wishes())
    columns = (space.layouts.tp, space.layouts.pp, space.layouts.cp, space.layouts.ep, space.layouts.etp,
               space.layouts.schedule, space.layouts.vpp, space.layouts.microbatch, space.layouts.zero,
               space.layouts.dp_replicate, space.layouts.sp, space.layouts.order)  # fmt: skip
    known = set(zip(*(column.tolist() for column in columns), strict=True))
    assert len(known) == len(space)
    chance = random.Random(7)
    outcomes: Counter[bool] = Counter()
    for _ in range(1500):
        strategy = space.strategy(chance.randrange(len(space)))
        assert violations(model, workload, strategy, gpus) == ()
        other = space.strategy(chance.randrange(len(space)))
        keys = ("ep", "etp", "microbatch", "zero") if model.moe else ("microbatch", "zero")
        mixed = replace(strategy, **{key: getattr(other, key) for key in keys})
        if mixed.zero == 0:
            mixed = replace(mixed, dp_replicate=1)
        if mixed.etp not in (1, mixed.tp):
            continue
        legal = violations(model, workload, mixed, gpus) == ()
        outcomes[legal] += 1
        own = (mixed.tp, mixed.pp, mixed.cp, mixed.ep, mixed.etp, mixed.schedule, mixed.vpp, mixed.microbatch,
               mixed.zero, mixed.dp_replicate, mixed.sp, mixed.order)  # fmt: skip
        assert (own in known) == legal, mixed
    assert min(outcomes[True], outcomes[False]) > 100


def test_columns_are_those_of_the_strategies() -> None:
    wishes = Wishes.from_dict({"fix": {"overlap": {"tp": True, "dp": False}, "grad_dtype": "bf16"}})
    space = space_of(EXPERTS, training(8), 8, wishes)
    again = Layouts.of(rows(space), 8)
    assert space.strategy(3).overlap == Overlap(tp=True, dp=False)
    for item in fields(Layouts):
        own, other = getattr(space.layouts, item.name), getattr(again, item.name)
        assert np.array_equal(own, other), item.name
        assert own.dtype.kind == other.dtype.kind
    taken = space.layouts.take(np.array([2, 5]))
    assert taken.recompute.tolist() == ["none", "none"]
    assert space.strategy(5).dp == taken.dp[1]


def test_every_row_can_be_priced() -> None:
    model, workload = tiny_spec("llama", layers=4, max_positions=64), training(8)
    space = space_of(model, workload, 4, Wishes())
    cost = TrainingCost(planner.trace(model), planner.load_hardware("dgx-h100"), workload)
    costs = cost.costs(rows(space))
    assert np.all(np.isfinite(costs.step_seconds))
    assert np.all(costs.step_seconds > 0)


def test_a_second_space_equals_the_first() -> None:
    first, second = (space_of(LLAMA, training(24), 12, Wishes()) for _ in range(2))
    assert rows(first) == rows(second)
    assert first.illegal == second.illegal


def test_schedules_bind_pipelines_only() -> None:
    space = space_of(LLAMA, training(24), 12, Wishes(schedules=("zb", "interleaved")))
    with_pipeline = space.layouts.pp > 1
    assert set(space.layouts.schedule[with_pipeline]) == {"zb", "interleaved"}
    assert set(space.layouts.schedule[~with_pipeline]) == {"1f1b"}
    fixed = space_of(LLAMA, training(24), 12, Wishes.from_dict({"fix": "schedule=zb"}))
    assert set(fixed.layouts.schedule) == {"zb"}
    assert set(fixed.layouts.pp) == {2, 3, 4}, "held, so that only pipelines are legal"
    assert fixed.illegal["virtual_stages"] > 0


def test_nothing_legal_is_an_answer() -> None:
    vision = tiny_spec("vit")
    space = space_of(vision, training(8, seq_len=5), 4, Wishes())
    assert (len(space), list(space.illegal)) == (0, ["positions"])
    assert space.candidates == space_of(vision, training(8, seq_len=17), 4, Wishes()).candidates


def test_degrees_that_do_not_divide_are_told() -> None:
    with pytest.raises(PlannerError) as caught:
        space_of(LLAMA, training(24), 16, Wishes.from_dict({"fix": "tp=3,pp=2"}))
    assert (caught.value.key, caught.value.value) == ("fix", "tp 3, pp 2")
    assert caught.value.remedy == "give 6 GPUs or a multiple, or leave one of them free"


def test_all_degrees_fixed_to_less_than_the_gpus() -> None:
    with pytest.raises(PlannerError) as caught:
        space_of(LLAMA, training(24), 12, Wishes.from_dict({"fix": "tp=3,pp=2,dp=1,cp=1"}))
    assert caught.value.remedy == "give 6 GPUs, or leave one of them free"


def test_numbers_stay_exact_when_large() -> None:
    huge = tiny_spec("llama", heads=64, kv_heads=64, hidden=1024, ffn=4096, layers=14)
    batch = 2**29
    wishes = Wishes.from_dict({"fix": {"zero": 1, "dp_replicate": 2, "schedule": "1f1b", "tp": 64}})
    space = space_of(huge, training(batch, seq_len=2**29), 2**19, wishes)
    layouts = space.layouts
    assert layouts.tp.dtype == layouts.dp.dtype == np.int64
    assert np.all(layouts.gpus == 2**19)
    assert np.all(layouts.microbatches * layouts.microbatch * layouts.dp == batch)
    assert layouts.microbatch.max() == 2**19
    assert isinstance(space.candidates, int)


@pytest.mark.parametrize("number", [1, 2, 12, 97, 1024, 13_824])
def test_divisors(number: int) -> None:
    assert divisors(number) == tuple(size for size in range(1, number + 1) if number % size == 0)
