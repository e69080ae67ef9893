"""What a rank of a test does with a user's own module: a step of a plan, compared with the module's own step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.collectives import CollectiveCounter
from planner.execute.own_batches import loss_in
from planner.execute.parameters import local
from planner.execute.runner import parallelize
from planner.spec.plan import ModuleSplit, Plan
from tests.examples.own_model import Model
from tests.execute import own_models
from tests.execute.huggingface_runs import gradient_errors
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


def own_plan(keys: dict[str, Any], *, gpus: int = 2, precision: str = "fp32", **more: Any) -> Plan:
    """A plan for any module."""
    workload = {"seq_len": LENGTH, "global_batch": SEQUENCES, "precision": precision}
    given = {"layers": 2} | more
    return made_up_plan(model="own.py:make", strategy=keys, gpus=gpus, workload=workload, **given)


def named(kind: str, plan: Plan) -> Plan:
    """The plan, which says where its module comes from."""
    model = f"{own_models.__file__}:{kind}"
    return replace(plan, model=model, estimate=replace(plan.estimate, model=model))


def module_of(kind: str) -> tuple[nn.Module, Any]:
    """A module, the same on every rank, with its example. Every weight is drawn: a gradient that is lost shows."""
    torch.manual_seed(3)
    if kind == "mixers":
        return Model(VOCAB, 16).double(), own_models.tokens_and_labels
    if kind == "perceptron":
        return Perceptron().double(), None
    module, example = getattr(own_models, kind)()
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module, example


def batch_of(kind: str) -> dict[str, Tensor]:
    """Some labels do not count, and not equally many on each rank."""
    generator = torch.Generator().manual_seed(5)
    if kind == "perceptrons":
        return {"x": torch.randn(SEQUENCES, LENGTH, 6, generator=generator, dtype=torch.float64)}
    tokens, labels = torch.randint(own_models.VOCAB, (2, SEQUENCES, LENGTH), generator=generator)
    for row in range(SEQUENCES):
        labels[row, : row + 1] = -100
    return {"tokens": tokens} | (
        {} if kind in ("perceptron", "llama", "in_single", "one_head") else {"labels": labels}
    )


def squares(out: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """A loss that weighs tokens unequally."""
    given = batch["tokens"] if "tokens" in batch else batch["x"][..., 0].mul(7).long().abs()
    weights = (given % 3).to(out.dtype)
    return (out.square().mean(-1) * weights).sum(), int(weights.sum())


def errors_of(kind: str, plan: Plan) -> dict[str, float]:
    """Largest relative errors of the loss, of each gradient that this rank holds a part of, and of their norm."""
    alone, example = module_of(kind)
    batch = batch_of(kind)
    loss_fn = None if "labels" in batch else squares
    if loss_fn is None:
        wanted = loss_in(alone.eval()(**batch))
        assert wanted is not None
    else:
        total, count = loss_fn(alone(**batch), batch)
        wanted = total / count
    wanted.backward()
    runner = parallelize(module_of(kind)[0].eval(), plan, loss_fn=loss_fn, example=example)
    each = SEQUENCES // plan.strategy.dp
    first = runner.meshes.data_rank * each
    loss = runner.step({key: value[first : first + each] for key, value in batch.items()})
    errors = {"loss": float((loss - wanted.detach()).abs() / wanted.detach().abs())}
    every = dict(alone.named_parameters())
    expected = {path: value.grad for path, value in every.items() if value.grad is not None}
    here = dict(runner.named_parameters())
    assert here.keys() <= every.keys()
    assert plan.strategy.pp > 1 or here.keys() == every.keys()
    errors |= gradient_errors(runner, expected, tied={})
    norm = nn.utils.get_total_norm(list(expected.values()))
    errors["norm"] = float((runner.clip(1e9) - norm).abs() / norm)
    return errors | {f"held {path}": 0.0 for path in here}


def run_cases(cases: list[tuple[str, Plan]]) -> list[str]:
    """What went wrong in each of several cases."""
    wrong = []
    for kind, plan in cases:
        errors = errors_of(kind, plan)
        bad = {path: error for path, error in errors.items() if not error < 1e-10}
        if bad:
            wrong.append(f"{kind} {plan.strategy}: {bad}")
    return wrong


def refusals(plans: list[Plan]) -> list[str]:
    """What is said of plans that do not fit the module of mixers, of a batch, and of a module without a loss."""
    good, batch = own_plan({"zero": 3}), batch_of("mixers")
    calls = [partial(parallelize, module_of("mixers")[0], plan) for plan in plans]
    calls.append(lambda: parallelize(module_of("mixers")[0], good).step(batch))
    calls.append(lambda: parallelize(module_of("perceptron")[0], good).step({"tokens": batch["tokens"][:4]}))
    return [_refusal(call) for call in calls]


def _refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(PlannerError) as caught:
        call()
    return f"{caught.value.rule}: {caught.value.value}"


def counted_step(kind: str, plan: Plan) -> list[tuple[Any, ...]]:
    """What the tensor-parallel ranks of a second step send one another, in the plan's precision."""
    module, example = module_of(kind)
    runner = parallelize(module.float(), plan, example=example)
    runner.step(batch_of(kind))
    runner.zero_grad()
    with CollectiveCounter(runner.meshes.axes) as counter:
        runner.step(batch_of(kind))
    found = [(call.phase, call.kind, call.count, call.bytes) for call in counter.counted() if call.axis == "tp"]
    return sorted(found)


def slopes(kind: str, plan: Plan) -> dict[str, float]:
    """By how much the gradient of each weight that is whole here is longer than that of the module in fp32."""
    alone, example = module_of(kind)
    alone.float()
    batch = batch_of(kind)
    total, count = squares(alone(**batch), batch)
    (total / count).backward()
    runner = parallelize(module_of(kind)[0].float(), plan, loss_fn=squares, example=example)
    runner.step(batch)
    wanted = {path: value.grad.flatten() for path, value in alone.named_parameters() if value.grad is not None}
    found = {path: local(value.grad).flatten() for path, value in runner.named_parameters()}
    return {
        path: float(found[path] @ grad / (grad @ grad))
        for path, grad in wanted.items()
        if path in found and found[path].numel() == grad.numel()
    }


def cut_refusals(cases: list[tuple[str, Plan]]) -> list[str]:
    """What is said of modules that a plan cannot cut."""
    found = []
    for kind, plan in cases:
        module, example = module_of(kind)
        found.append(_refusal(partial(parallelize, module, plan, example=example)))
    return found
