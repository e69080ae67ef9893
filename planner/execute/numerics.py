"""A small plan on local processes against one process: loss, every gradient, every weight after a step."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.execute.huggingface_build import build_huggingface, in_double
from planner.execute.local_world import run_locally
from planner.execute.loss import IGNORED
from planner.execute.parameters import local, pieces_of
from planner.execute.runner import Runner, parallelize
from planner.execute.weights import own_shard, owner_of
from planner.models.build import build_model, generator_for
from planner.models.embedding import token_loss
from planner.spec.huggingface_config import config_from_spec
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from planner.spec.verification import Parity, ValueCheck

TOLERANCE = 1e-10  # of fp64, relative to the largest value
_LEARNING_RATE = 1e-3
LONGEST_SECONDS = 600.0


def verify_numerics(small_plan: Plan, small: ModelSpec, *, model_type: str = "") -> Parity:
    """Run a plan that was made small, a process for each rank, and name everything that is not one process's.

    The model is the bundled decoder, or with `model_type` a module of transformers, beside its own step.
    """
    config = config_from_spec(small, model_type) if model_type else None
    ranks = small_plan.strategy.gpus
    answers = run_locally(ranks, errors_of_step, small_plan, small, config, seconds=LONGEST_SECONDS)
    return Parity(
        processes=ranks,
        strategy=small_plan.strategy,
        layers=small.layers,
        tolerance=TOLERANCE,
        values=worst_of(answers, _built(small, config, "meta")),
    )


def worst_of(answers: Sequence[dict[str, float]], model: nn.Module) -> tuple[ValueCheck, ...]:
    """The largest errors of all ranks: the loss, then the weights of the model in its order."""
    worst: dict[str, float] = {}
    for errors in answers:
        for what, error in errors.items():
            worst[what] = max(worst.get(what, 0.0), error)
    names = model.named_parameters(remove_duplicate=False)
    order = {path: place for place, (path, _) in enumerate(names)}
    ordered = sorted(
        worst, key=lambda what: (what.rpartition(" ")[0] != "loss", order.get(what.split(" ")[-1], -1))
    )
    return tuple(ValueCheck(what=what, error=worst[what]) for what in ordered)


def errors_of_step(plan: Plan, spec: ModelSpec, config: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Largest relative errors on this rank, by what is compared: `loss`, `gradient of …`, `AdamW's step of …`."""
    with in_double() if config else nullcontext():
        model = _model(spec, config)
        tokens, labels = _batch(spec, plan)
        if config:  # the library shifts labels itself, and tells tokens from what is not counted
            labels = torch.where(labels == IGNORED, labels, tokens)

        def alone() -> Tensor:
            if config:
                loss: Tensor = model(input_ids=tokens, labels=labels, use_cache=False).loss
                return loss
            return token_loss(model(tokens), labels)

        runner = parallelize(model, plan)
        return errors_beside(model, alone, runner, {"tokens": tokens, "labels": labels})


def errors_beside(
    model: nn.Module, alone: Callable[[], Tensor], runner: Runner, batch: Mapping[str, Any]
) -> dict[str, float]:
    """The same of a runner's step with a whole batch, beside the step of one process: that of rank 0.

    `alone` is the loss of `model`, which the runner was made of and which other ranks need no more. Each of its
    values is sent when it is compared, so that no other rank holds all of them.
    """
    shapes = {path: value.shape for path, value in model.named_parameters()}
    first = {id(value): path for path, value in model.named_parameters()}  # one for a tied pair
    firsts = {path: first[id(value)] for path, value in model.named_parameters(remove_duplicate=False)}
    weights = dict(model.named_parameters())
    leads = dist.get_rank() == 0
    if not leads:
        for value in weights.values():
            value.data = torch.empty(0, dtype=value.dtype)
    loss = float(runner.step(_own(runner, batch)))
    told: list[Any] = [None]
    if leads:
        whole = alone()
        whole.backward()
        largest = {
            path: float(value.grad.abs().max()) for path, value in weights.items() if value.grad is not None
        }
        told = [(float(whole.detach()), largest)]
    dist.broadcast_object_list(told)
    wanted_loss, largest = told[0]
    errors = {"loss": _finite(abs(loss - wanted_loss) / max(abs(wanted_loss), 1e-30))}
    # a bias of keys without rotation moves no score: its gradient is rounding alone
    floor = 1e-4 * max(largest.values())
    found: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for path, parameter in runner.named_parameters():
        found.setdefault(firsts[path], []).append((path, parameter))
    for path, shape in shapes.items():
        if path not in largest:  # it moves nothing
            continue
        weight = weights[path]
        wanted = _from_first(weight.grad, shape)
        for place, parameter in found.get(path, ()):
            error = float("inf")
            if parameter.grad is not None:
                error = _apart(runner, place, parameter.grad, wanted, floor)
            errors[f"gradient of {place}"] = error
            _stepped(parameter, floor)
        if leads:
            _stepped(weight, floor)
        wanted = _from_first(weight if leads else None, shape)
        for place, parameter in found.get(path, ()):
            errors[f"AdamW's step of {place}"] = _apart(runner, place, parameter, wanted, 0.0)
    return errors


def _from_first(value: Tensor | None, shape: torch.Size) -> Tensor:
    """A value of rank 0 on every rank."""
    sent = torch.empty(shape, dtype=torch.float64) if value is None else value.detach().contiguous()
    dist.broadcast(sent, 0)
    return sent


def _stepped(parameter: nn.Parameter, floor: float) -> None:
    """A first step of AdamW, which knows no other weight; its moments and the gradient are dropped.

    It divides a gradient by its size: with an epsilon that is small beside gradients their rounding alone would
    move a weight.
    """
    torch.optim.AdamW([parameter], lr=_LEARNING_RATE, eps=max(1e-8, floor)).step()
    parameter.grad = None


def _model(spec: ModelSpec, config: Mapping[str, Any] | None) -> nn.Module:
    """Every parameter at random, norms and biases too: a gradient that is lost shows."""
    model = _built(spec, config, "cpu")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator_for(path), dtype=torch.float64)
            parameter.copy_(drawn * 0.1)
    return model


def _built(spec: ModelSpec, config: Mapping[str, Any] | None, device: str) -> nn.Module:
    if config is not None:
        return build_huggingface(config, dtype=torch.float64, device=device)
    return build_model(spec, dtype=torch.float64, device=device)


def _batch(spec: ModelSpec, plan: Plan) -> tuple[Tensor, Tensor]:
    """Tokens and labels; some do not count, and not equally many in each sequence."""
    shape = (plan.workload.global_batch, plan.workload.seq_len)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(spec.vocab, shape, generator=generator)
    labels = torch.randint(spec.vocab, shape, generator=generator)
    for row in range(shape[0]):
        labels[row, : 1 + row % (shape[1] - 1)] = IGNORED
    return tokens, labels


def _own(runner: Runner, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The sequences of this dp rank."""
    strategy, work = runner.plan.strategy, runner.workload
    each = work.global_batch // strategy.dp
    first = runner.meshes.data_rank // strategy.cp * each
    return {
        key: value[first : first + each] if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def _apart(runner: Runner, path: str, found: Tensor, wanted: Tensor, floor: float) -> float:
    """The largest difference of this rank's part from that part of one process's, over its largest value."""
    owner, name = owner_of(runner.module, path)
    part = wanted
    for piece in pieces_of(owner, name):
        part = piece.of(part)
    part = own_shard(getattr(owner, name), part)
    difference = (local(found.detach()) - part).abs()
    largest = max(float(wanted.abs().max()), floor, 1e-30)
    return _finite(float(difference.max()) / largest) if difference.numel() else 0.0


def _finite(error: float) -> float:
    """Infinite where it is no number, which compares with nothing."""
    return float("inf") if math.isnan(error) else error
