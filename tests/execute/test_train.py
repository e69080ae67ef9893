"""A run's steps: a rank that waits for others is watched, and weights that are no numbers end it."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.execute.checkpoint_folder import Facts, whole_step
from planner.execute.failure import RunFailed
from planner.execute.gradients import whole_backward
from planner.execute.train import beginning, require_finite
from tests.execute.training import patience, plan_for, with_a_lost_gradient
from tests.execute.world import run_world
from tests.tiny import tiny_spec


def test_a_rank_is_watched_while_it_hears_whether_to_go_on_and_of_a_gradient_that_is_no_number(
    tmp_path: Path,
) -> None:
    plan = plan_for(tiny_spec("llama", layers=2, vocab=99), 4, gpus=2, dp_replicate=2)
    for watched, told in run_world(2, with_a_lost_gradient, plan, tmp_path):
        assert len(watched) >= 2, "each of two steps ends with the ranks' word whether to go on"
        assert all(watched)
        assert "error[gradients]: the sum of each rank's gradients is a number" in told
        assert "at step 2" in told
    assert whole_step(tmp_path / "kept") == 1


def test_no_group_gives_up_before_a_step_does(tmp_path: Path) -> None:
    plan = plan_for(tiny_spec("llama", layers=2, vocab=99), 4, gpus=2, tp=2)
    for found in run_world(2, patience, plan, tmp_path, 5000.0):
        assert found == {"tp": 5000.0, "checkpoint": 5000.0}


def test_a_run_that_was_to_go_on_says_from_where_and_whether_its_data_is_another() -> None:
    assert beginning(None, "synthetic") == ["no checkpoint yet: starting at step 1"]
    facts = Facts(model="m", layout="l", optimizer="sgd", step=7, sequences=56, seed=1, data="/a.bin, 90 tokens")
    assert beginning(facts, "/a.bin, 90 tokens") == ["resumed after step 7"]
    assert beginning(facts, "/a.bin, 91 tokens") == [
        "resumed after step 7",
        "the data is another: /a.bin, 91 tokens; before it was /a.bin, 90 tokens",
    ]


def test_a_schedule_that_torch_cannot_run_as_planned_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.execute.gradients.splits_backward", lambda: False)
    assert "zbv waits longer than planned" in whole_backward("zbv")
    assert whole_backward("interleaved") == ""


def test_weights_that_are_no_numbers_end_a_run_before_they_are_kept() -> None:
    require_finite(2.0, 1.0, 3)
    require_finite(2.0, None, 3)
    for loss, norm, said in (
        (float("nan"), 1.0, "the loss is"),
        (2.0, float("inf"), "the norm of the gradients is"),
    ):
        with pytest.raises(RunFailed, match=f"{said} a number") as caught:
            require_finite(loss, norm, 3)
        assert "at step 3" in str(caught.value)
        assert caught.value.exit_code == 1
