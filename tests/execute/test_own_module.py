"""A user's own module under plans: loss and every gradient are those of the module alone, in fp64."""

from __future__ import annotations

from planner.spec.plan import ModuleSplit
from tests.execute.own_runs import WHOLE, own_plan, refusals, run_cases
from tests.execute.world import run_world

MIXERS = {"tokens": WHOLE, "layers.*.gate": WHOLE}


def test_data_parallel() -> None:
    """Copies and shards, several microbatches, blocks that run again, ties and a buffer."""
    cases = [("mixers", own_plan({"zero": zero}, modules=MIXERS)) for zero in (0, 1, 2, 3)]
    cases += [("perceptron", own_plan({"zero": zero})) for zero in (0, 3)]
    cases += [("mixers", own_plan({"zero": 3, "microbatch": 2}, recompute={"layers.*": "full"}))]
    for wrong in run_world(2, run_cases, cases):
        assert not wrong, "\n".join(wrong)


def test_copies_of_shards() -> None:
    cases = [("mixers", own_plan({"zero": 3, "dp_replicate": 2}, gpus=4))]
    for wrong in run_world(4, run_cases, cases):
        assert not wrong, "\n".join(wrong)


def test_refused() -> None:
    plans = [
        own_plan({"tp": 2}),
        own_plan({"pp": 2}),
        own_plan({"zero": 1}, modules={"layers.0-5.mlp": ModuleSplit(split="replicate")}),
        own_plan({"zero": 1}, recompute={"layers.2": "selective"}),
    ]
    for found in run_world(2, refusals, plans):
        assert found == [
            "a module of one's own runs data parallel: its forward is not ours to cut: tp 2",
            "a module of one's own runs data parallel: its forward is not ours to cut: pp 2",
            "each line of the plan names a module of the model: layers.0-5.mlp",
            "of a module of one's own a block is kept, or runs again as a whole: layers.2: selective",
            "each tensor of a batch has global_batch/dp = 4 rows: tokens [8, 12]",
            "without a loss function the module returns its loss, one number: Tensor [1, 12, 50]",
        ]
