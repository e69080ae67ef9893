"""A small plan on local processes against one process: loss, every gradient, every weight after a step."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
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
_LONGEST_SECONDS = 600.0


def verify_numerics(small_plan: Plan, small: ModelSpec, *, model_type: str = "") -> Parity:
    """Run a plan that was made small, a process for each rank, and name everything that is not one process's.

    The model is the bundled decoder, or with `model_type` a module of transformers, beside its own step.
    """
    config = config_from_spec(small, model_type) if model_type else None
    ranks = small_plan.strategy.gpus
    answers = run_locally(ranks, errors_of_step, small_plan, small, config, seconds=_LONGEST_SECONDS)
    worst: dict[str, float] = {}
    for errors in answers:
        for what, error in errors.items():
            worst[what] = max(worst.get(what, 0.0), error)
    names = _built(small, config, "meta").named_parameters(remove_duplicate=False)
    order = {path: place for place, (path, _) in enumerate(names)}
    ordered = sorted(
        worst, key=lambda what: (what.rpartition(" ")[0] != "loss", order.get(what.split(" ")[-1], -1))
    )
    return Parity(
        processes=ranks,
        strategy=small_plan.strategy,
        layers=small.layers,
        tolerance=TOLERANCE,
        values=tuple(ValueCheck(what=what, error=worst[what]) for what in ordered),
    )


def errors_of_step(plan: Plan, spec: ModelSpec, config: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Largest relative errors on this rank, by what is compared: `loss`, `gradient of …`, `AdamW's step of …`."""
    with in_double() if config else nullcontext():
        return _errors(plan, spec, config)


def _errors(plan: Plan, spec: ModelSpec, config: Mapping[str, Any] | None) -> dict[str, float]:
    model = _model(spec, config)
    tokens, labels = _batch(spec, plan)
    if config:  # the library shifts labels itself, and tells tokens from what is not counted
        labels = torch.where(labels == IGNORED, labels, tokens)
    runner = parallelize(model, plan)
    optimizer = torch.optim.AdamW(runner.parameters(), lr=_LEARNING_RATE)
    loss = float(runner.step(_own(runner, tokens, labels)))
    alone = (
        model(input_ids=tokens, labels=labels, use_cache=False).loss
        if config
        else token_loss(model(tokens), labels)
    )
    alone.backward()
    first = {id(value): path for path, value in model.named_parameters()}  # one for a tied pair
    firsts = {path: first[id(value)] for path, value in model.named_parameters(remove_duplicate=False)}
    wanted = {path: value.grad for path, value in model.named_parameters() if value.grad is not None}
    errors = {"loss": abs(loss - float(alone.detach())) / abs(float(alone.detach()))}
    found = dict(runner.named_parameters())
    # a bias of keys without rotation moves no score: its gradient is rounding alone
    floor = 1e-4 * max(float(grad.abs().max()) for grad in wanted.values())
    for path, parameter in found.items():
        if parameter.grad is None:
            errors[f"gradient of {path}"] = float("inf")
        else:
            errors[f"gradient of {path}"] = _apart(runner, path, parameter.grad, wanted[firsts[path]], floor)
    optimizer.step()
    torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE).step()
    after = dict(model.named_parameters())
    for path, parameter in found.items():
        errors[f"AdamW's step of {path}"] = _apart(runner, path, parameter, after[firsts[path]], 0.0)
    return errors


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


def _own(runner: Runner, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The sequences of this dp rank."""
    strategy = runner.plan.strategy
    each = len(tokens) // strategy.dp
    first = runner.meshes.data_rank // strategy.cp * each
    return {"tokens": tokens[first : first + each], "labels": labels[first : first + each]}


def _apart(runner: Runner, path: str, found: Tensor, wanted: Tensor, floor: float) -> float:
    """The largest difference of this rank's part from that part of one process's, over its largest value."""
    owner, name = owner_of(runner.module, path)
    part = wanted.detach()
    for piece in pieces_of(owner, name):
        part = piece.of(part)
    part = own_shard(getattr(owner, name), part)
    difference = (local(found.detach()) - part).abs()
    largest = max(float(wanted.detach().abs().max()), floor, 1e-30)
    return float(difference.max()) / largest if difference.numel() else 0.0
