"""The optimizer updates as torch's does, and its learning rate rises, falls and ends where asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner.execute.optimizer import LocalOptimizer, decays, learning_rate
from planner.models.build import build_model
from planner.spec.training_run import TrainingRun
from tests.tiny import tiny_spec

RUN = TrainingRun(lr=1e-2, min_lr=1e-3, warmup=4, steps=24, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_equal_those_of_torch(kind: str) -> None:
    ours, theirs = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    theirs.load_state_dict(ours.state_dict())
    optimizer = LocalOptimizer(kind, ours.named_parameters(), ours, RUN)  # type: ignore[arg-type]
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}]
    kinds = {"adamw": lambda: torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95)),
             "sgd": lambda: torch.optim.SGD(groups, lr=1.0)}  # fmt: skip
    reference = kinds[kind]()
    for step in range(5):
        rate = learning_rate(RUN, step)
        for module in (ours, theirs):
            module.zero_grad()
            (module(torch.full((2, 3), step + 1.0, dtype=torch.float64)) ** 2).sum().backward()
        optimizer.step(rate)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=1e-12, atol=0)
    assert set(optimizer.moments()) == ({"exp_avg", "exp_avg_sq"} if kind == "adamw" else set())


def test_norms_and_biases_do_not_decay() -> None:
    model = build_model(tiny_spec("gpt_oss"), device="meta")
    kept = {
        path.split(".")[-2] + "." + path.split(".")[-1]
        for path, _ in model.named_parameters()
        if not decays(model, path)
    }
    assert {"attention_norm.weight", "query.bias", "experts.up_bias", "core.sinks"} <= kept
    assert not {"query.weight", "experts.up", "tokens.weight", "projection.weight", "router.weight"} & kept


def test_the_rate_warms_up_and_follows_a_cosine() -> None:
    rates = [learning_rate(RUN, step) for step in range(RUN.steps)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(TrainingRun(steps=1), 0) == TrainingRun().lr
