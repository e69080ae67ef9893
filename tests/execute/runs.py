"""What a rank of a test of the runner does: a step of a plan, and how it differs from that of one process."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from planner.errors import PlannerError
from planner.execute.collectives import CollectiveCounter
from planner.execute.parameters import local
from planner.execute.runner import Runner, build_runner, parallelize
from planner.models.build import build_model
from planner.models.decoder import Decoder
from planner.models.embedding import token_loss
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from tests.execute.cases import global_batch, whole_gradient, whole_stage

LEARNING_RATE = 1e-3


@functools.cache
def whole_model(spec: ModelSpec) -> Decoder:
    """Every parameter at random, as `cases.whole_stage` draws them. Nothing changes it."""
    model = build_model(spec, dtype=torch.float64)
    assert isinstance(model, Decoder)
    model.load_state_dict(whole_stage(spec).state_dict())
    return model


def own_batch(runner: Runner, sequences: int) -> dict[str, Tensor]:
    """The sequences of this dp rank."""
    spec, strategy = runner.applied[0].stage.spec, runner.plan.strategy
    tokens, labels = global_batch(spec, sequences)
    dp_rank = runner.meshes.data_rank // strategy.cp
    rows = slice(dp_rank * (sequences // strategy.dp), (dp_rank + 1) * (sequences // strategy.dp))
    return {"tokens": tokens[rows], "labels": labels[rows]}


@functools.cache
def reference(spec: ModelSpec, sequences: int) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients, and weights after a step of AdamW, in one process."""
    model = copy.deepcopy(whole_model(spec))
    tokens, labels = global_batch(spec, sequences)
    loss = token_loss(model(tokens), labels)
    loss.backward()
    grads = {path: value.grad for path, value in model.named_parameters() if value.grad is not None}
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE).step()
    return float(loss.detach()), grads, {path: value.detach() for path, value in model.named_parameters()}


def run_errors(plan: Plan, spec: ModelSpec) -> dict[str, float]:
    """Largest relative errors of loss, norm, each gradient here and each weight after a step of AdamW."""
    sequences = plan.workload.global_batch
    runner = parallelize(whole_model(spec), plan)
    loss = runner.step(own_batch(runner, sequences))
    wanted_loss, grads, weights = reference(spec, sequences)
    errors = {"loss": abs(float(loss) - wanted_loss) / abs(wanted_loss)}
    # a bias of keys without rotation moves no score: its gradient is rounding alone
    floor = 1e-4 * max(float(grad.abs().max()) for grad in grads.values())
    found = dict(runner.named_parameters())
    for path, parameter in found.items():
        assert parameter.grad is not None, f"{path} has no gradient"
        wanted = grads[_first(spec, path)]
        difference = whole_gradient(spec, path, parameter.grad) - wanted
        errors[path] = float(difference.abs().max() / max(float(wanted.abs().max()), floor))
    norm = runner.clip(1e9)
    total = float(torch.nn.utils.get_total_norm(grads.values()))
    errors["norm"] = abs(float(norm) - total) / total
    if found:  # a stage may have no weights
        torch.optim.AdamW(found.values(), lr=LEARNING_RATE).step()
    for path, parameter in found.items():
        wanted = weights[_first(spec, path)]
        difference = whole_gradient(spec, path, parameter.detach()) - wanted
        errors[f"{path} after a step"] = float(difference.abs().max() / wanted.abs().max())
    return errors | {f"held {path}": 0.0 for path in found}


def _first(spec: ModelSpec, path: str) -> str:
    """The path of a tied table in one process."""
    tied = spec.tied_embeddings and path == "head.projection.weight"
    return "embedding.tokens.weight" if tied else path


def refusal(plan: Plan, spec: ModelSpec) -> tuple[str, str]:
    """Rule and value of the error that building a runner, or a step with the whole batch, ends in."""
    try:
        build_runner(plan, spec).step(global_batch(spec, plan.workload.global_batch))
    except PlannerError as error:
        return error.rule, str(error.value)
    raise AssertionError("nothing was refused")


def own_loss_errors(plan: Plan, spec: ModelSpec) -> float:
    """Two steps with a loss of the caller's against the gradients of one with ours, doubled."""

    def loss_fn(logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"].flatten()
        assert logits.shape[:2] == batch["labels"].shape
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
        return total, (labels != -100).sum()

    model = whole_model(spec)
    ours, own = parallelize(model, plan), parallelize(model, plan, loss_fn=loss_fn)
    batch = own_batch(ours, plan.workload.global_batch)
    worst = abs(float(ours.step(batch) - own.step(batch)))
    own.step(batch)
    for mine, other in zip(ours.parameters(), own.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        difference = 2 * local(mine.grad) - local(other.grad)
        worst = max(worst, float(difference.abs().max()) if difference.numel() else 0.0)
    return worst


def drawn_loss(plan: Plan, spec: ModelSpec) -> float:
    """The loss of a model that is drawn from a seed, without the whole of it ever being built."""
    runner = build_runner(plan, spec, dtype=torch.float64, seed=5)
    assert not any(parameter.is_meta for parameter in runner.parameters())
    return float(runner.step(own_batch(runner, plan.workload.global_batch)))


def counted_step(plan: Plan, spec: ModelSpec) -> tuple[int, dict[tuple[str, str, str], tuple[int, int]]]:
    """This rank's stage, and what a second step issues: axis, phase and kind → calls and bytes."""
    runner = build_runner(plan, spec)
    batch = own_batch(runner, plan.workload.global_batch)
    runner.step(batch)
    runner.zero_grad()
    with CollectiveCounter(runner.meshes.axes) as counter:
        runner.step(batch)
        runner.clip(1.0)
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for call in counter.counted():
        key = call.axis, call.phase, call.kind
        count, size = found.get(key, (0, 0))
        found[key] = count + call.count, size + call.bytes
    return runner.meshes.pp_rank, found
