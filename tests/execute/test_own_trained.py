"""A run of a user's own module: the same losses under every plan, and on from any checkpoint under another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.errors import PlannerError
from planner.execute.own_file import named_by
from planner.execute.own_trained import TrainedFile
from planner.spec.plan import ModuleSplit, Plan
from planner.spec.training_run import TrainingRun
from tests.execute.own_runs import LENGTH, named, own_plan
from tests.execute.test_own_module import all_cut
from tests.execute.training import continued, statistics, trained_each
from tests.execute.world import run_world


def cut(kind: str, gpus: int = 2, **keys: Any) -> Plan:
    return named(kind, all_cut(kind, gpus, **keys)[1])


def spread(kind: str, gpus: int = 2, **keys: Any) -> Plan:
    layers = 4 if keys.get("pp", 1) > 1 else 2
    return named(kind, own_plan({"schedule": "gpipe"} | keys, gpus=gpus, layers=layers))


def opened(kind: str, plan: Plan | None = None, **flags: Any) -> TrainedFile:
    plan = plan or spread(kind, 1)
    user = named_by(named(kind, plan))
    assert user is not None
    return TrainedFile.of(plan, TrainingRun.from_flags(flags), user)


LAYOUTS = {
    "gpt": [spread("gpt", zero=3, microbatch=2), cut("gpt", sp=True), spread("gpt", pp=2, microbatch=2)],
    "llama": [cut("llama"), spread("llama", pp=2)],
    "shifting": [spread("shifting", zero=1), cut("shifting", sp=True)],
    "asking": [
        spread("asking", pp=2, microbatch=2),
        spread("asking", pp=2, schedule="1f1b"),
        spread("asking", zero=3),
    ],
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_losses_are_those_of_one_process(kind: str, tmp_path: Path) -> None:
    """Fused layers and a tied table; scores without a loss; labels that the module shifts, tensors no buffers;
    weights that are not trained, or asked for no more than their dtype."""
    flags: dict[str, Any] = {"steps": 3, "seed": 4}
    (alone,) = run_world(1, trained_each, [spread(kind, 1)], tmp_path, flags)
    assert len(set(alone[0])) == 3
    for found in run_world(2, trained_each, LAYOUTS[kind], tmp_path, flags):
        for losses in found:
            assert losses == pytest.approx(alone[0], rel=1e-9, abs=0)


PAIRS = {
    "fused and cut → stages": (2, cut("gpt"), spread("gpt", pp=2)),
    "stages → fused and cut": (2, spread("gpt", pp=2), cut("gpt", sp=True)),
    "fused, cut and sharded → sharded": (4, cut("gpt", 4, zero=3), spread("gpt", 4, zero=3)),
    "copies of heads → half of them": (4, cut("llama", 4, tp=4), cut("llama", 4, zero=1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_loss_goes_on_under_another_plan(name: str, tmp_path: Path) -> None:
    ranks, first, second = PAIRS[name]
    for whole, resumed in run_world(ranks, continued, first, second, tmp_path):
        assert resumed == pytest.approx(whole, rel=1e-9, abs=0)


def test_statistics_of_a_norm_go_on(tmp_path: Path) -> None:
    """Each replica has its own, and those of the first are kept; a module without tokens reads made-up numbers."""
    plan, second = spread("normed", zero=1), spread("normed", zero=3)
    (first, resumed), (other, resumed_other) = run_world(
        2, statistics, plan, second, "norm.running_mean", tmp_path
    )
    assert resumed == resumed_other == first != other
    with pytest.raises(PlannerError, match="writes to a buffer that a checkpoint keeps") as refused:
        opened("normed", spread("normed", pp=2))
    assert refused.value.value == "norm.num_batches_tracked"


def test_arguments_are_fed_by_their_names() -> None:
    device = torch.device("cpu")
    batch = opened("gpt").batch(2, 3, device)
    assert batch.keys() == {"tokens", "labels"}
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1]), "the label of a token is the next one"
    scores = opened("llama").batch(2, 3, device)
    assert scores.keys() == {"tokens", "next_tokens"}
    assert torch.equal(scores["next_tokens"], batch["labels"])
    given = opened("shifting").batch(2, 3, device)
    assert torch.equal(given["labels"], given["input_ids"]), "the module shifts them"
    assert torch.equal(given["input_ids"], batch["tokens"])
    assert given["attention_mask"].shape == (3, LENGTH)
    assert given["position_ids"][2].tolist() == list(range(LENGTH))
    made = opened("normed", seed=1)
    whole, parts = made.batch(0, 4, device), [made.batch(first, 2, device) for first in (0, 2)]
    for name in ("pixels", "classes", "scale"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    assert set(made.batch(0, 60, device)["classes"].tolist()) == set(range(5))
    assert len(whole["pixels"].unique()) == whole["pixels"].numel()


@pytest.mark.parametrize(
    ("kind", "keys", "flags", "rule"),
    [
        ("gpt", {"cp": 2}, {}, "runs with dp, tp and pp"),
        ("gpt", {"zero": 1}, {"weights": "folder"}, "weights of Hugging Face are those"),
        ("gpt", {"zero": 1}, {"export": "folder"}, "weights of Hugging Face are those"),
        ("gpt", {"pp": 2}, {"compile": True}, "compiled under dp alone"),
        ("normed", {"zero": 1}, {"data": "tokens.bin"}, "goes to a module that takes tokens"),
        ("perceptrons", {"zero": 1}, {}, "returns its loss, one number, or takes tokens alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_before_ranks_start(
    kind: str, keys: dict[str, Any], flags: dict[str, Any], rule: str
) -> None:
    with pytest.raises(PlannerError, match=rule) as refused:
        opened(kind, spread(kind, **keys), **flags)
    assert refused.value.exit_code == 2
    assert refused.value.remedy


def test_a_plan_of_another_module_is_refused() -> None:
    lines = {"layers.0.mlp": ModuleSplit(split="replicate")}
    with pytest.raises(PlannerError, match="names a module of the model"):
        opened("gpt", replace(spread("gpt", zero=1), modules=lines).sealed())


def test_tokens_are_those_that_the_module_knows(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    torch.arange(60, dtype=torch.int16).numpy().tofile(path)
    with pytest.raises(PlannerError, match="a token is one of the model's 48"):
        opened("gpt", data=str(path))
