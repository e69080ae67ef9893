"""Checkpoints: any layout goes on from any other's, whatever is padded, copied, tied or spread."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.execute.checkpoint_reader import sums_agree
from planner.spec.plan import Plan
from tests.execute.training import after_altered_bits, continued, on_a_full_disk, plan_for
from tests.execute.world import run_world
from tests.tiny import tiny_spec


def pair(model: str, first: dict[str, Any], second: dict[str, Any], **model_keys: Any) -> tuple[Plan, Plan]:
    """Two plans of four ranks for a tiny model whose vocabulary no degree divides."""
    spec = tiny_spec(model, **{"layers": 2, "vocab": 99} | model_keys)
    return plan_for(spec, 8, gpus=4, **first), plan_for(spec, 8, gpus=4, **second)


PAIRS = {
    "split and sharded → pipeline": pair("llama", {"tp": 2, "zero": 3, "sp": True}, {"pp": 2, "tp": 2}),
    "pipeline → sharded": pair("llama", {"pp": 2, "zero": 1}, {"zero": 3}),
    "kv heads with copies": pair("qwen3", {"tp": 4}, {"tp": 2, "zero": 3}),
    "tied ends in a pipeline": pair("gpt", {"pp": 2, "tp": 2}, {"tp": 2, "zero": 2}),
    "tied ends into a pipeline": pair("gemma2", {"zero": 3}, {"pp": 2, "tp": 2, "sp": True}),
    "experts": pair("mixtral", {"tp": 2, "ep": 2, "zero": 1}, {"ep": 4, "zero": 3}),
    "experts cut inside": pair("mixtral", {"tp": 2, "etp": 2, "ep": 2, "zero": 3}, {"cp": 2, "ep": 2}),
    "virtual stages": pair("llama", {"pp": 2, "vpp": 2, "tp": 2}, {"dp_replicate": 2, "zero": 3}, layers=4),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_loss_goes_on_under_another_plan(name: str, tmp_path: Path) -> None:
    for whole, resumed in run_world(4, continued, *PAIRS[name], tmp_path):
        assert resumed == pytest.approx(whole, rel=1e-9, abs=0)


def test_a_tensor_with_other_bits_is_refused_and_the_checkpoint_before_named(tmp_path: Path) -> None:
    plan = plan_for(tiny_spec("gpt", layers=2), 4, gpus=2, zero=1)
    for told in run_world(2, after_altered_bits, plan, tmp_path):
        assert "error[checkpoint]: the checkpoint that a run goes on from is whole" in told
        assert "step-00000002/__1_0.distcp: not what was written" in told
        assert "write step-00000001 into" in told


def test_no_altered_bit_of_a_tensor_changes_a_value() -> None:
    content = io.BytesIO()
    torch.save(torch.arange(7.0), content)
    written = content.getvalue()
    assert sums_agree(io.BytesIO(written))
    seen = 0
    for place in range(len(written)):
        altered = io.BytesIO(written[:place] + bytes([written[place] ^ 1 << place % 8]) + written[place + 1 :])
        if not sums_agree(altered):
            seen += 1
            continue
        with contextlib.suppress(RuntimeError, UnicodeDecodeError):  # of what torch alone looks at
            assert torch.load(altered).tolist() == list(range(7)), place
    assert seen > len(written) / 4  # the rest is padding


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    plan = plan_for(tiny_spec("gpt", layers=2), 4, gpus=2, zero=1)
    for told in run_world(2, on_a_full_disk, plan, tmp_path):
        assert "No space left on device" in told
        assert "the one of step 1 is whole" in told
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000001"]
