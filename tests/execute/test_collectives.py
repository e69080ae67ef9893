"""What a real step of a pipeline issues is what its plan says: axis, phase, kind, how often, how many bytes."""

from __future__ import annotations

from typing import Any

import pytest

import planner
from planner.spec.strategy import Strategy
from tests.execute.cases import LENGTH
from tests.execute.plans import plan_of
from tests.execute.runs import counted_step
from tests.execute.world import run_world
from tests.tiny import tiny_spec

# model, GPUs, and the whole strategy; GPUs are slow, so that the planner cuts what it can
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tensors": ("llama", 4, {"tp": 2, "pp": 2}),
    "tied ends under sp, selective": ("gpt", 4, {"tp": 2, "pp": 2, "sp": True, "recompute": "selective"}),
    "tied ends, sharded": ("opt", 4, {"pp": 2, "zero": 1}),
    "virtual stages, full": ("qwen3", 4, {"tp": 2, "pp": 2, "vpp": 2, "recompute": "full"}),
    "split backward": ("llama", 4, {"pp": 2, "vpp": 2, "schedule": "zb", "zero": 3}),
    "in a V": ("llama", 4, {"tp": 2, "pp": 2, "vpp": 2, "schedule": "zbv"}),
    "tied ends in a V, sharded": ("gpt", 4, {"pp": 2, "vpp": 2, "schedule": "zbv", "zero": 1}),
    "context": ("llama", 4, {"cp": 2, "pp": 2, "zero": 1}),
    "experts": ("mixtral", 4, {"ep": 2, "pp": 2, "zero": 1}),
    "all": ("llama", 8, {"tp": 2, "pp": 2, "sp": True, "zero": 3}),
}
SEQUENCES = 8
SLOW = {"base": "dgx-h100", "set": {"device.peak_tflops.bf16": 0.002}}


@pytest.mark.parametrize("case", CASES)
def test_a_step_issues_what_its_plan_says(case: str) -> None:
    name, gpus, keys = CASES[case]
    spec = tiny_spec(name, layers=4)
    fix = {"cp": 1, "tp": 1, "ep": 1, "vpp": 1, "microbatch": 1, "zero": 0, "sp": False, "recompute": "none"}
    fix |= {"schedule": "interleaved" if keys.get("vpp") else "1f1b", "dp_replicate": 1} | keys
    workload = {"seq_len": LENGTH, "global_batch": SEQUENCES, "precision": "bf16"}
    plan = planner.plan(spec.to_dict(), SLOW, gpus, workload, fix)
    assert plan.strategy.tp == 1 or {"column", "row"} <= {line.split for line in plan.modules.values()}
    for stage, found in run_world(gpus, counted_step, plan, spec):
        promised = {
            (item.axis, item.phase, item.kind): (item.count, item.bytes)
            for item in plan.collectives
            if stage in item.stages
        }
        if spec.moe is not None:  # a plan takes an even load, a real router does not
            found, promised = (
                {key: value for key, value in each.items() if key[0] != "ep"} for each in (found, promised)
            )
        assert found == promised


def test_four_sums_a_layer() -> None:
    """Two forward and two backward for each microbatch, and one for the table and for the head."""
    spec = tiny_spec("llama", layers=4)
    plan = plan_of(spec, Strategy(tp=2, pp=2), 4)
    for stage, found in run_world(4, counted_step, plan, spec):
        forward, backward = (found["tp", phase, "all_reduce"][0] for phase in ("forward", "backward"))
        assert (forward, backward) == ((20, 16) if stage == 0 else (16, 20))
