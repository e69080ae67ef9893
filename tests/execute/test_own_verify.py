"""Plans of a user's own module, dry-run and run small: what agrees is said to, and what does not is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import planner
from planner.api.verifying import verify
from planner.errors import PlannerError
from planner.execute import own_shrink
from planner.execute.numerics import worst_of
from planner.execute.own_inputs import bounds_of, drawn
from planner.execute.own_numerics import errors_of_own_step, verify_own_numerics
from planner.execute.own_shrink import SmallOwn, shrunk_own
from planner.execute.own_verify import verify_own_layout
from planner.spec.plan import Plan
from planner.spec.sources import UserModule
from tests.execute import own_models
from tests.execute.own_runs import named, own_plan
from tests.execute.test_mixed_splits import CASTS_AT_ONCE
from tests.execute.test_own_module import all_cut, emitted
from tests.execute.world import run_world

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "heads, scales, scores read whole": ("llama", 4, {"tp": 2, "dp": 2, "zero": 1, "recompute": "full"}),
    "scores beside a loss": ("pair", 4, {"tp": 2, "dp": 2, "zero": 3, "sp": True, "microbatch": 1}),
    "stages": ("llama", 4, {"pp": 2, "dp": 2, "zero": 1, "microbatch": 1, "schedule": "1f1b", "vpp": 1}),
    "a table at both ends": ("gpt", 2, {"pp": 2, "schedule": "gpipe", "vpp": 1}),
    "no layers": ("perceptrons", 2, {"dp": 2, "zero": 3}),
    "attention in one module": ("encoder", 2, {"tp": 2}),
}


def own_module(kind: str) -> UserModule:
    return UserModule(path=Path(own_models.__file__), function=kind)


def small_of(kind: str, plan: Plan, processes: int) -> SmallOwn:
    with torch.device("meta"):
        module, example = getattr(own_models, kind)()
    return shrunk_own(named(kind, plan), module, example, processes)


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_issues_what_the_plan_lists(case: str) -> None:
    kind, gpus, fix = CASES[case]
    _, plan = emitted(kind, gpus, **fix)
    found = verify(plan)
    assert found.agrees, found.differences
    assert {item.found_count > 0 for stage in found.stages for item in stage.collectives} == {True}


ENDS: dict[str, tuple[int, dict[str, Any]]] = {  # sequences of 64 tokens of each rank, and the strategy
    "few tokens": (1, {"zero": 3}),
    "many tokens": (8, {"zero": 3}),
    "several microbatches": (4, {"zero": 3, "microbatch": 1}),
    "kept between microbatches": (4, {"zero": 2, "microbatch": 1}),
    "reduced at the end": (4, {"zero": 1, "microbatch": 1}),
    "copies": (1, {"zero": 0}),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_large_table_and_head_take_what_the_plan_says(case: str) -> None:
    """They are one group, whose gradients are reduced when all are there; the loss is the module's own."""
    sequences, fix = ENDS[case]
    hardware = {"base": "dgx-h100", "set": {"memory.workspace_gib": 0.0}}  # which no tensor of a dry run is
    workload = {"seq_len": 64, "global_batch": 4 * sequences, "precision": "bf16"}
    plan = planner.plan(f"{own_models.__file__}:large_ends", hardware, 4, workload, {"dp": 4, **fix})
    (stage,) = verify(plan).stages
    planned = stage.memory.planned_tensor_bytes
    if case == "copies" and CASTS_AT_ONCE:
        # a dry run of torch 2.15's FSDP2 takes one buffer of gradients less
        planned -= plan.estimate.memory_per_stage[0].gradients_bytes
    assert planned == pytest.approx(stage.memory.found_tensor_bytes, rel=0.04)


def test_what_a_plan_lists_wrongly_is_named() -> None:
    _, plan = emitted("gpt", 2, tp=2)
    first, *others = plan.collectives
    wrong = replace(plan, collectives=(replace(first, bytes=first.bytes + 4), *others))
    (told,) = verify(wrong).differences
    assert told.startswith(f"stage 0: {first.axis} {first.kind} in {first.phase}")
    with pytest.raises(PlannerError, match="which a config"):
        verify(plan, transformers=True)


def test_a_module_that_decides_by_values_is_refused_with_its_line() -> None:
    layers = [("h.0", "h.0"), ("h.1", "h.0")]
    with pytest.raises(PlannerError, match="without values") as refused:
        verify_own_layout(own_plan({"dp": 2}), own_module("deciding"), layers)
    assert "own_models.py:" in str(refused.value.value)


def test_a_small_copy_computes_what_one_process_does() -> None:
    """Degrees and work become less, the module does not; what is wrong with its loss is named."""
    _, plan = emitted("pair", 16, tp=4, pp=2, dp=2, sp=True, zero=1, microbatch=2, vpp=1, schedule="1f1b")
    small = small_of("pair", plan, 4)
    assert (small.plan.strategy.label, small.returns_loss) == ("tp2 pp2 zero1 sp", True)
    assert small.batch["labels"].unique().numel() > 1, "an example of zeros is drawn anew"
    assert "18,016 weights, tp2 pp2 zero1 sp for tp4 pp2 dp2 zero1 sp" in small.told
    answers = run_world(4, errors_of_own_step, small, own_module("pair"))
    values = worst_of(answers, own_models.pair()[0])
    assert [value.what for value in values[:2]] == ["loss", "gradient of wte.weight"]
    assert max(value.error for value in values) < 1e-10
    assert len(values) == 1 + 2 * len(list(own_models.pair()[0].named_parameters()))
    _, plan = all_cut("summing", 2, tp=1, dp=2)
    answers = run_world(2, errors_of_own_step, small_of("summing", plan, 2), own_module("summing"))
    first = worst_of(answers, own_models.summing()[0])[0]
    assert (first.what, round(first.error, 9)) == ("loss", 0.75)


@pytest.mark.slow
def test_a_module_that_returns_no_loss() -> None:
    _, plan = all_cut("llama", sp=True)
    found = verify_own_numerics(named("llama", plan), own_module("llama"), 2)
    assert found.differences == ()
    assert (found.processes, found.layers) == (2, 2)


def test_a_module_too_large_for_this_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = all_cut("gpt", 8, tp=2, dp=4)
    monkeypatch.setattr(own_shrink, "free_bytes", lambda: 2.0 * 2**30)
    assert small_of("gpt", plan, 8).plan.strategy.label == "tp2 dp2", "fewer processes, as many axes"
    monkeypatch.setattr(own_shrink, "free_bytes", lambda: 1.0 * 2**30)
    with pytest.raises(PlannerError, match="18,016 weights on 8 processes take") as refused:
        small_of("gpt", plan, 8)
    assert "--nproc" in refused.value.remedy


def test_an_example_of_zeros_is_drawn_anew_as_far_as_its_bounds_are_known() -> None:
    table = torch.zeros(5, 3)
    given = {"a": torch.zeros(40, dtype=torch.long), "b": torch.zeros(40, dtype=torch.long), "x": torch.ones(40)}
    bounds, _ = bounds_of(lambda: torch.nn.functional.embedding(given["a"][1:].view(-1, 1), table), given)
    assert bounds == {"a": 5}
    found = drawn(given, bounds)
    assert set(found["a"].tolist()) == set(range(5))
    assert found["b"].eq(0).all()
    assert found["x"].unique().numel() == 40
