"""What a rank of a test does with a user's own module: a step of a plan, compared with the module's own step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planner.errors import PlannerError
from planner.execute.runner import parallelize
from planner.spec.plan import ModuleSplit, Plan
from tests.examples.own_model import Model
from tests.report.plans import made_up_plan

SEQUENCES, LENGTH, VOCAB = 8, 12, 50
WHOLE = ModuleSplit(split="replicate")


class Perceptron(nn.Module):
    """Tied, with a buffer, and without a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Buffer(torch.full((), 0.5, dtype=torch.float64), persistent=False)
        self.table = nn.Embedding(VOCAB, 16)
        self.inner = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        self.out = nn.Linear(16, VOCAB, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.out(x + self.inner(x) * self.scale)


def own_plan(keys: dict[str, Any], *, gpus: int = 2, **more: Any) -> Plan:
    """A plan for any module."""
    workload = {"seq_len": LENGTH, "global_batch": SEQUENCES, "precision": "fp32"}
    return made_up_plan(model="own.py:make", strategy=keys, gpus=gpus, workload=workload, layers=2, **more)


def module_of(kind: str) -> nn.Module:
    """One of two, the same on every rank."""
    torch.manual_seed(3)
    return (Model(VOCAB, 16) if kind == "mixers" else Perceptron()).double()


def batch_of(kind: str) -> dict[str, Tensor]:
    """Some labels do not count, and not equally many on each rank."""
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(VOCAB, (2, SEQUENCES, LENGTH), generator=generator)
    for row in range(SEQUENCES):
        labels[row, : row + 1] = -100
    return {"tokens": tokens} | ({"labels": labels} if kind == "mixers" else {})


def squares(out: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """A loss that weighs tokens unequally."""
    weights = (batch["tokens"] % 3).to(out.dtype)
    return (out.square().mean(-1) * weights).sum(), int(weights.sum())


def errors_of(kind: str, plan: Plan) -> dict[str, float]:
    """Largest relative errors of the loss and of each gradient."""
    loss_fn = None if kind == "mixers" else squares
    alone, batch = module_of(kind), batch_of(kind)
    if loss_fn is None:
        wanted = alone(**batch)
    else:
        total, count = loss_fn(alone(**batch), batch)
        wanted = total / count
    wanted.backward()
    runner = parallelize(module_of(kind), plan, loss_fn=loss_fn)
    each = SEQUENCES // plan.strategy.dp
    first = runner.meshes.data_rank * each
    loss = runner.step({key: value[first : first + each] for key, value in batch.items()})
    errors = {"loss": float((loss - wanted.detach()).abs() / wanted.detach().abs())}
    here = dict(runner.named_parameters())
    assert here.keys() == dict(alone.named_parameters()).keys()
    for path, parameter in alone.named_parameters():
        found = here[path].grad
        assert found is not None, path
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        errors[path] = float((whole - parameter.grad).abs().max() / parameter.grad.abs().max())
    norm = nn.utils.get_total_norm([p.grad for p in alone.parameters()])
    errors["norm"] = float((runner.clip(1e9) - norm).abs() / norm)
    return errors


def run_cases(cases: list[tuple[str, Plan]]) -> list[str]:
    """What went wrong in each of several cases."""
    wrong = []
    for kind, plan in cases:
        bad = {path: error for path, error in errors_of(kind, plan).items() if not error < 1e-12}
        if bad:
            wrong.append(f"{kind} {plan.strategy}: {bad}")
    return wrong


def refusals(plans: list[Plan]) -> list[str]:
    """What is said of plans that do not fit the module of mixers, of a batch, and of a module without a loss."""
    good, batch = own_plan({"zero": 3}), batch_of("mixers")
    calls = [partial(parallelize, module_of("mixers"), plan) for plan in plans]
    calls.append(lambda: parallelize(module_of("mixers"), good).step(batch))
    calls.append(lambda: parallelize(module_of("perceptron"), good).step({"tokens": batch["tokens"][:4]}))
    return [_refusal(call) for call in calls]


def _refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(PlannerError) as caught:
        call()
    return f"{caught.value.rule}: {caught.value.value}"
