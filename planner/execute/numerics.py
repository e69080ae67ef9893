"""A shrunk plan on local processes against one process: loss, every gradient, every weight after a step."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from planner.errors import PlannerError
from planner.execute.local_world import run_locally
from planner.execute.loss import IGNORED
from planner.execute.runner import Runner, parallelize
from planner.execute.shrink import shrunk
from planner.models.build import build_model, generator_for
from planner.models.decoder import Decoder
from planner.models.embedding import token_loss
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from planner.spec.verification import Parity, ValueCheck

TOLERANCE = 1e-10  # of fp64, relative to the largest value
_LEARNING_RATE = 1e-3
_LONGEST_SECONDS = 600.0


def verify_numerics(plan: Plan, spec: ModelSpec, processes: int) -> Parity:
    """Run a small copy of a plan on so many processes at most, and name everything that is not one process's."""
    if processes < 1:
        raise PlannerError(
            "numerics take a process", value=processes, remedy="give --nproc 1 or more", key="nproc"
        )
    small_plan, small = shrunk(plan, spec, processes)
    ranks = small_plan.strategy.gpus
    answers = run_locally(ranks, errors_of_step, small_plan, small, seconds=_LONGEST_SECONDS)
    worst: dict[str, float] = {}
    for errors in answers:
        for what, error in errors.items():
            worst[what] = max(worst.get(what, 0.0), error)
    order = {path: place for place, path in enumerate(_paths(small))}
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


def errors_of_step(plan: Plan, spec: ModelSpec) -> dict[str, float]:
    """Largest relative errors on this rank, by what is compared: `loss`, `gradient of …`, `AdamW's step of …`."""
    model = _model(spec)
    tokens, labels = _batch(spec, plan)
    runner = parallelize(model, plan)
    optimizer = torch.optim.AdamW(runner.parameters(), lr=_LEARNING_RATE)
    loss = float(runner.step(_own(runner, tokens, labels)))
    alone = token_loss(model(tokens), labels)
    alone.backward()
    wanted = {path: value.grad for path, value in model.named_parameters() if value.grad is not None}
    errors = {"loss": abs(loss - float(alone.detach())) / abs(float(alone.detach()))}
    found = dict(runner.named_parameters())
    # a bias of keys without rotation moves no score: its gradient is rounding alone
    floor = 1e-4 * max(float(grad.abs().max()) for grad in wanted.values())
    for path, parameter in found.items():
        expected = wanted[_first(spec, path)]
        if parameter.grad is None:
            errors[f"gradient of {path}"] = float("inf")
        else:
            errors[f"gradient of {path}"] = _apart(spec, path, parameter.grad, expected, floor)
    optimizer.step()
    torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE).step()
    after = dict(model.named_parameters())
    for path, parameter in found.items():
        expected = after[_first(spec, path)].detach()
        errors[f"AdamW's step of {path}"] = _apart(spec, path, parameter.detach(), expected, 0.0)
    return errors


def _model(spec: ModelSpec) -> Decoder:
    """Every parameter at random, norms and biases too: a gradient that is lost shows."""
    model = build_model(spec, dtype=torch.float64)
    assert isinstance(model, Decoder)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator_for(path), dtype=torch.float64)
            parameter.copy_(drawn * 0.1)
    return model


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


def _apart(spec: ModelSpec, path: str, found: Tensor, wanted: Tensor, floor: float) -> float:
    """The largest difference, over the largest value; copies of a kv head each count."""
    whole = found.full_tensor() if isinstance(found, DTensor) else found
    whole, target = whole.detach(), wanted
    if path in ("embedding.tokens.weight", "head.projection.weight", "head.projection.bias"):
        whole = whole[: spec.vocab]  # rows that fill up the vocabulary are never read
    elif path.split(".")[-2] in ("key", "value") and len(whole) > len(wanted):
        heads = target.reshape(spec.kv_heads, 1, spec.head_dim, *target.shape[1:])
        whole = whole.reshape(spec.kv_heads, -1, spec.head_dim, *target.shape[1:])
        target = heads.expand_as(whole)
    return float((whole - target).abs().max() / max(float(target.abs().max()), floor, 1e-30))


def _first(spec: ModelSpec, path: str) -> str:
    """The path of a tied table in one process."""
    tied = spec.tied_embeddings and path == "head.projection.weight"
    return "embedding.tokens.weight" if tied else path


def _paths(spec: ModelSpec) -> list[str]:
    with torch.device("meta"):
        return [path for path, _ in Decoder(spec).named_parameters()]
