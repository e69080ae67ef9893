"""What a user wishes of a plan: the text of `--fix`, YAML and back, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.spec.requests import STRATEGY_KEYS
from planner.spec.strategy import Overlap, Strategy
from planner.spec.wishes import RECOMPUTES, SCHEDULES, Fix, Wishes
from planner.spec.yaml_text import dump_yaml, parse_yaml
from tests.spec.strategies import STEADY

TEXT = "tp=8,pp=4,sp=true,schedule=1f1b,order=tp-cp-pp-dp,overlap=tp+dp"


def refused(data: Any) -> PlannerError:
    with pytest.raises(PlannerError) as caught:
        Wishes.from_dict(data)
    return caught.value


def test_text_and_keys_say_the_same() -> None:
    fix = Fix.from_text(" tp = 8, pp=4,overlap=dp+tp,sp=True,schedule=1f1b,order=tp-cp-pp-dp,")
    overlap = Overlap(tp=True, dp=True)
    assert fix == Fix(tp=8, pp=4, sp=True, schedule="1f1b", order="tp-cp-pp-dp", overlap=overlap)
    assert fix.text == TEXT
    assert Wishes.from_dict({"fix": TEXT}) == Wishes.from_dict({"fix": fix.to_plain()}) == Wishes(fix=fix)
    assert Fix.from_text("") == Fix()
    assert Fix.from_text("dp-replicate=2,overlap=none") == Fix(dp_replicate=2, overlap=Overlap(dp=False))


def test_every_key_of_training_can_be_fixed() -> None:
    assert {item.name for item in fields(Fix)} == set(STRATEGY_KEYS)
    for key in STRATEGY_KEYS:
        value = getattr(Strategy(), key)
        assert Fix(**{key: value}).given == {key: value}


@settings(max_examples=200, **STEADY)
@given(keys=st.fixed_dictionaries({}, optional={
    "tp": st.integers(1, 1_000_000), "zero": st.integers(0, 3), "sp": st.booleans(),
    "recompute": st.sampled_from(["none", "selective", "full", "auto"]), "schedule": st.sampled_from(SCHEDULES),
    "order": st.permutations(["tp", "cp", "dp", "pp"]).map("-".join),
    "grad_dtype": st.sampled_from(["fp32", "bf16"]),
    "overlap": st.builds(Overlap, tp=st.booleans(), dp=st.booleans(), ep=st.booleans(), pp=st.booleans()),
}))  # fmt: skip
def test_text_and_yaml_come_back(keys: dict[str, Any]) -> None:
    wishes = Wishes(fix=Fix(**keys), memory_margin=0.1)
    assert Fix.from_text(wishes.fix.text) == wishes.fix
    text = dump_yaml(wishes.to_dict())
    assert Wishes.from_dict(*parse_yaml(text)) == wishes


def test_nothing_wished_is_nothing_said() -> None:
    assert Wishes().to_dict() == {}
    assert Wishes.from_dict({}) == Wishes()


def test_what_is_fixed_is_all_that_is_allowed() -> None:
    wishes = Wishes(fix=Fix(recompute="full", schedule="zb"))
    assert (wishes.allowed_recompute, wishes.allowed_schedules) == (("full",), ("zb",))
    free = Wishes(fix=Fix(recompute="auto"), recompute=("full", "none"), schedules=("zb", "gpipe"))
    assert free.allowed_recompute == ("none", "full")
    assert free.allowed_schedules == ("gpipe", "zb")
    assert (Wishes().allowed_recompute, Wishes().allowed_schedules) == (RECOMPUTES, SCHEDULES)


def test_the_gpus_are_a_multiple_of_the_fixed_degrees() -> None:
    assert Fix.from_text("tp=8,cp=3,ep=5,vpp=7").gpus_unit == 24
    assert Fix().gpus_unit == 1


def test_capacity_is_the_least_of_device_and_wish_without_the_margin() -> None:
    assert Wishes().capacity_bytes(80.0) == 80.0
    assert Wishes(max_memory_bytes=60.0, memory_margin=0.25).capacity_bytes(80.0) == 45.0
    assert Wishes(max_memory_bytes=100.0).capacity_bytes(80.0) == 80.0


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("tp", "fix", "write tp=8"),
        ("tp=", "fix", "write tp=8"),
        ("8", "fix", "write such as tp=8,pp=4"),
        ("microbach=1", "fix", "did you mean microbatch?"),
        ("replicas=2", "fix", "did you mean dp_replicate?"),
        ("colour=2", "fix", "use one of: cp, dp"),
        ("tp=8,tp=4", "fix", "keep one of the two"),
        ("tp=eight", "fix.tp", "give a whole number"),
        ("tp=0", "fix.tp", "at least 1"),
        ("tp=8.0", "fix.tp", "give a whole number"),
        ("tp=true", "fix.tp", "give a whole number"),
        ("zero=4", "fix.zero", "at most 3"),
        ("sp=yes", "fix.sp", "give true or false"),
        ("schedule=1f1", "fix.schedule", "did you mean 1f1b?"),
        ("order=tp-pp", "fix.order", "did you mean tp-pp-cp-dp?"),
        ("overlap=dp+tq", "fix.overlap", "use one of: dp, ep, none, pp, tp"),
        ("overlap=dp+", "fix.overlap", "use one of"),
        ("grad_dtype=fp31", "fix.grad_dtype", "did you mean fp32?"),
        ("tp=" + "9" * 5000, "fix.tp", "give a whole number"),
    ],
)
def test_a_wrong_text_is_told(text: str, key: str, remedy: str) -> None:
    with pytest.raises(PlannerError) as caught:
        Fix.from_text(text)
    assert caught.value.key == key
    assert remedy in caught.value.remedy
    assert caught.value.value is not None


@pytest.mark.parametrize(
    ("data", "key", "remedy"),
    [
        ({"fx": {}}, "fx", "did you mean fix?"),
        ({"fix": {"tpp": 8}}, "fix.tpp", "did you mean tp?"),
        ({"fix": {"tp": "8"}}, "fix.tp", "give a whole number"),
        ({"fix": {"order": "tp"}}, "fix.order", "did you mean"),
        ({"fix": 8}, "fix", "give Fix keys"),
        ({"max_memory_bytes": -1}, "max_memory_bytes", "at least 0"),
        ({"memory_margin": 1.0}, "memory_margin", "at most 0.95"),
        ({"recompute": []}, "recompute", "leave recompute out to allow all"),
        ({"recompute": ["none", "none"]}, "recompute", "leave recompute out to allow all"),
        ({"recompute": ["auto"]}, "recompute.0", "use one of"),
        ({"recompute": ["none"], "fix": {"recompute": "full"}}, "fix.recompute", "allow full"),
        ({"schedules": []}, "schedules", "leave schedules out"),
        ({"schedules": ["zb"], "fix": "schedule=1f1b"}, "fix.schedule", "allow 1f1b"),
        ({"minimize": "time"}, "minimize", "use one of"),
        ({"minimize": "gpus"}, "deadline_seconds", "give the longest step"),
        ({"deadline_seconds": 3.0}, "deadline_seconds", "set minimize to gpus"),
        ({"minimize": "cost_per_token"}, "price_per_gpu_hour", "give what a GPU costs"),
        ({"price_per_gpu_hour": float("inf")}, "price_per_gpu_hour", "give a finite number"),
        ({"time_limit_seconds": True}, "time_limit_seconds", "give a number"),
        ({"solver": "gurobi"}, "solver", "use one of: cbc, highs"),
    ],
)
def test_wrong_wishes_are_told(data: dict[str, Any], key: str, remedy: str) -> None:
    error = refused(data)
    assert error.key == key
    assert remedy in error.remedy


@pytest.mark.parametrize(
    "data",
    [
        {"minimize": "gpus", "deadline_seconds": 8.5},
        {"minimize": "cost_per_token", "price_per_gpu_hour": 2},
        {"price_per_gpu_hour": 2.0, "time_limit_seconds": 30, "solver": "cbc"},
        {"recompute": ["none"], "fix": {"recompute": "auto"}},
    ],
)
def test_wishes_that_go_together(data: dict[str, Any]) -> None:
    wishes = Wishes.from_dict(data)
    assert Wishes.from_dict(wishes.to_dict()) == wishes


@pytest.mark.parametrize(
    ("data", "recompute", "schedules"),
    [
        ({}, ("none", "full"), ("gpipe", "1f1b")),
        ({"recompute": ["none"], "schedules": ["1f1b", "zbv"]}, ("none",), ("1f1b",)),
        ({"recompute": ["selective"], "schedules": ["zbv"]}, ("selective",), ("zbv",)),
        ({"fix": "recompute=selective,schedule=zb"}, ("selective",), ("zb",)),
    ],
)
def test_what_the_executor_refuses_for_a_users_module_is_asked_for_or_not_chosen(
    data: dict[str, Any], recompute: tuple[str, ...], schedules: tuple[str, ...]
) -> None:
    own = Wishes.from_dict(data).of_own_module(mixes_whole=True)
    assert own.allowed_recompute == recompute
    assert own.allowed_schedules == schedules
    assert own.fix.sp is False


def test_virtual_stages_of_a_users_module_may_be_asked_for() -> None:
    assert Wishes.from_dict({"fix": "vpp=2"}).of_own_module(mixes_whole=False).allowed_schedules == SCHEDULES
