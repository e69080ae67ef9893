"""Flags to a request and back: defaults, the batch that is chosen, what is said of a wrong one."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from planner.cli import cli
from planner.errors import PlannerError
from planner.spec.legality import violations
from planner.spec.requests import TrainingRequest, changed_flags, command_line, overlap_of, training_request
from planner.spec.strategy import Overlap, Strategy
from planner.spec.workload import TrainWorkload
from tests.tiny import tiny_spec

MODEL = tiny_spec("llama", max_positions=512)


def asked(gpus: int = 8, **given: Any) -> TrainingRequest:
    return training_request(MODEL, gpus, given)


def test_what_is_left_out_stands_at_its_default() -> None:
    found = asked(tp=None, global_batch=None, sp=None)
    assert found.strategy == Strategy(dp=8)
    assert found.workload == TrainWorkload(seq_len=512, global_batch=256, precision="bf16")
    assert found.note == ""


def test_virtual_stages_bring_their_schedule() -> None:
    assert asked(pp=2, vpp=2).strategy.schedule == "interleaved"


@pytest.mark.parametrize(
    ("gpus", "given", "chosen"),
    [
        (3, {}, 255),
        (96, {}, 288),
        (512, {}, 512),
        (5, {"microbatch": 3}, 255),
        (640, {"pp": 2}, 640),
        (8, {"pp": 2, "vpp": 2, "microbatch": 64}, 256),
        (12, {"pp": 2, "vpp": 2}, 252),
    ],
)
def test_a_batch_left_out_is_the_nearest_that_runs(gpus: int, given: dict[str, Any], chosen: int) -> None:
    found = asked(gpus, **given)
    assert found.workload.global_batch == chosen
    keys = {item.key for item in violations(MODEL, found.workload, found.strategy, gpus)}
    assert "global_batch" not in keys
    assert (f"global batch {chosen}" in found.note) == (chosen != 256)


def test_a_batch_that_was_given_is_left_alone() -> None:
    found = asked(3, global_batch=256)
    assert (found.workload.global_batch, found.note) == (256, "")


def test_overlaps_are_exactly_those_named() -> None:
    assert asked(overlap="tp, dp").strategy.overlap == Overlap(tp=True, dp=True)
    assert asked(overlap="tp").strategy.overlap == Overlap(tp=True, dp=False)
    assert asked(overlap="none").strategy.overlap == Overlap(dp=False)
    with pytest.raises(PlannerError) as caught:
        overlap_of("tp,cp")
    assert caught.value.key == "overlap"


REQUESTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (8, {}),
    (16, {"tp": 2, "pp": 2, "vpp": 2, "sp": True, "recompute": "full", "seq_len": 128, "stack": "compiled"}),
    (8, {"zero": 3, "overlap": "none", "precision": "fp8", "imbalance": 1.25, "global_batch": 64}),
    (8, {"cp": 2, "order": "cp-tp-dp-pp", "grad_dtype": "bf16", "dp_replicate": 2, "zero": 1}),
)


@pytest.mark.parametrize(("gpus", "given"), REQUESTS)
def test_a_command_asks_for_the_same_again(gpus: int, given: dict[str, Any]) -> None:
    request = asked(gpus, **given)
    program, verb, *words = shlex.split(command_line("my model.yaml", "dgx-h100", request))
    assert (program, verb) == ("tp-plan", "estimate")
    flags = dict(cli.commands["estimate"].make_context("estimate", words).params)
    assert (flags["model"], flags["hardware"], flags["gpus"]) == ("my model.yaml", "dgx-h100", gpus)
    again = training_request(MODEL, gpus, {key: flags[key] for key in flags if key not in ("model", "hardware")})
    assert (again.workload, again.strategy) == (request.workload, request.strategy)


def test_changes_are_told_as_flags() -> None:
    before = Strategy(tp=2, dp=4)
    assert changed_flags(before, before) == ""
    assert changed_flags(before, Strategy(tp=4, dp=2, sp=True)) == "--tp 4 --dp 2 --sp"
    assert changed_flags(before, Strategy(tp=2, dp=8, zero=3)) == "--gpus 16 --dp 8 --zero 3"
    assert changed_flags(Strategy(sp=True), Strategy()) == "--no-sp"
    assert changed_flags(Strategy(), Strategy(overlap=Overlap(dp=False))) == "--overlap none"
