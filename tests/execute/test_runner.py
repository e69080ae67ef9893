"""A plan that runs: its step equals that of one process, and what cannot run is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest

from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from planner.spec.strategy import Recompute, Strategy
from tests.execute import runs
from tests.execute.plans import plan_of
from tests.execute.test_parity import TOLERANCE
from tests.execute.world import run_world
from tests.tiny import tiny_spec


def check(
    model_name: str,
    gpus: int,
    *,
    sequences: int = 4,
    layers: tuple[int, ...] = (),
    blocks: dict[str, Recompute] | None = None,
    model: dict[str, Any] | None = None,
    **keys: Any,
) -> None:
    """Loss, norm, every gradient and every weight after a step, of all ranks; together they hold the model.

    `keys` are those of the strategy, `model` further ones of the model.
    """
    spec = tiny_spec(model_name, **{"layers": 4, "vocab": 99} | (model or {}))
    strategy = Strategy.from_dict(keys, gpus=gpus)
    check_plan(plan_of(spec, strategy, sequences, layers=layers, recompute=blocks), spec)


def check_plan(plan: Plan, spec: ModelSpec) -> None:
    """The same of a plan."""
    held: set[str] = set()
    for errors in run_world(plan.gpus, runs.run_errors, plan, spec):
        held |= {path.removeprefix("held ") for path in errors if path.startswith("held ")}
        assert not {path: error for path, error in errors.items() if not error < TOLERANCE}
    assert held >= {path for path, _ in runs.whole_model(spec).named_parameters()}


def test_one_rank_and_cut_weights() -> None:
    check("llama", 1)
    check("llama", 2, tp=2, sp=True)
    check("gpt", 2, zero=3)


def test_stages() -> None:
    check("llama", 2, pp=2)
    check("gpt", 2, pp=2, layers=(3, 1))


@pytest.mark.parametrize("refused", ["world", "layers", "batch"])
def test_refused_before_any_work(refused: str) -> None:
    spec = tiny_spec("llama", layers=2 if refused == "layers" else 4)
    plan = plan_of(tiny_spec("llama", layers=4), Strategy(dp=1 if refused == "world" else 2), 4)
    wanted = {
        "world": ("the strategy's degrees take 1 ranks", "2 ranks"),
        "layers": ("the stages of the plan hold the 2 layers of the model", "4"),
        "batch": ("tokens of one dp rank are global_batch/dp sequences of seq_len: [2, 16]", "[4, 16]"),
    }
    assert run_world(2, runs.refusal, plan, spec) == [wanted[refused]] * 2


def test_a_loss_of_ones_own_and_gradients_that_add_up() -> None:
    spec = tiny_spec("llama", layers=4, vocab=99)
    for keys in ({"tp": 2, "pp": 2}, {"dp": 2, "zero": 2, "cp": 2}):
        plan = plan_of(spec, Strategy.from_dict(keys, gpus=4), 4)
        for error in run_world(4, runs.own_loss_errors, plan, spec):
            assert error < TOLERANCE


def test_weights_do_not_depend_on_the_layout() -> None:
    spec = tiny_spec("gpt", layers=4, vocab=99)
    losses = set()
    for keys in ({}, {"tp": 2, "pp": 2}, {"dp": 4, "zero": 3}):
        strategy = Strategy.from_dict(keys)
        losses |= set(run_world(strategy.gpus, runs.drawn_loss, plan_of(spec, strategy, 4), spec))
    assert max(losses) - min(losses) < TOLERANCE
