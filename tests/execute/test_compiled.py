"""Compiled blocks: a step equals that of one process in fp64, equal blocks share a graph, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import PlannerError
from planner.execute.compiled import COMPILING_SECONDS, require_compilable, require_compiler
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from planner.spec.strategy import Strategy
from tests.execute import compiled_runs
from tests.execute.own_runs import WHOLE, own_plan
from tests.execute.plans import plan_of
from tests.execute.test_parity import TOLERANCE
from tests.execute.world import run_world
from tests.tiny import tiny_spec


def case(model: str, sequences: int = 4, **keys: Any) -> tuple[Plan, ModelSpec]:
    spec = tiny_spec(model, layers=2, vocab=99)
    return plan_of(spec, Strategy.from_dict(keys, gpus=2), sequences), spec


def test_a_step_is_that_of_one_process() -> None:
    """Sums kept or run again, sharded state, stages, and experts, at whose exchange of rows a graph breaks."""
    dense = [
        case("llama", tp=2, sp=True, recompute="selective"),
        case("gpt", pp=2, recompute="full"),
    ]
    cases = [*dense, case("mixtral", ep=2, zero=1)]
    for rank in run_world(2, compiled_runs.step_errors, cases):
        for (plan, _), (errors, graphs, breaks) in zip(cases, rank, strict=True):
            assert not {path: error for path, error in errors.items() if not error < TOLERANCE}, plan.strategy
            assert graphs
            if plan.strategy.ep == 1:
                assert (graphs, breaks) == (1, 0), plan.strategy


def test_other_peoples_modules() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    modules = {"tokens": WHOLE, "layers.*.gate": WHOLE}
    own = [("mixers", own_plan({"zero": 3, "microbatch": 2}, modules=modules, recompute={"layers.*": "full"}))]
    for wrong, graphs in run_world(2, compiled_runs.wrong_with_others, own, [("gpt2", {}, {"tp": 2})]):
        assert not wrong, "\n".join(wrong)
        assert graphs >= 2


@pytest.mark.parametrize(
    ("model", "keys", "rule"),
    [
        ("llama", {"pp": 2, "vpp": 2, "schedule": "zb"}, "a compiled backward cannot be split in two"),
        ("mixtral", {"recompute": "selective"}, "a compiled block with experts runs again whole or not at all"),
        ("dropout", {"tp": 2, "recompute": "selective"}, "a compiled block with dropout of heads"),
    ],
)
def test_refused(model: str, keys: dict[str, Any], rule: str) -> None:
    changed = {"attention_dropout": 0.1} if model == "dropout" else {}
    spec = tiny_spec("llama" if model == "dropout" else model, layers=4, **changed)
    with pytest.raises(PlannerError, match=rule):
        require_compilable(plan_of(spec, Strategy.from_dict(keys, gpus=2), 4), spec)


@pytest.mark.parametrize("keys", [{"tp": 2}, {"pp": 2}])
def test_modules_of_ones_own_are_compiled_whole(keys: dict[str, Any]) -> None:
    require_compilable(own_plan({"zero": 3}), None)
    with pytest.raises(PlannerError, match="compiled under dp alone"):
        require_compilable(own_plan(keys, layers=4), None)


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    with pytest.raises(PlannerError, match="/nowhere/c") as caught:
        require_compiler("cpu")
    assert caught.value.exit_code == 2


def test_ranks_wait_for_others_that_compile() -> None:
    for before, during, after in run_world(2, compiled_runs.timeouts):
        assert before == after
        assert during == [COMPILING_SECONDS] > before
