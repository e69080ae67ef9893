"""What a rank of a test does: run a step as a strategy says, and compare it with the same step on one rank."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planner.errors import PlannerError
from planner.execute.apply import Applied, apply_strategy
from planner.execute.collectives import CollectiveCounter, CountedCollective
from planner.execute.context import own_tokens
from planner.execute.gradients import clip_gradients
from planner.execute.mesh import Meshes, build_meshes
from planner.execute.seeds import seed_rank
from planner.execute.sharding import Sharding
from planner.execute.stage import DecoderStage, build_stage
from planner.execute.step import Microbatch, run_step
from planner.models.attention import Core
from planner.models.embedding import token_loss
from planner.models.positions import NO_POSITIONS
from planner.spec.model import ModelSpec
from planner.spec.paths import Span
from planner.spec.plan import ModuleSplit
from planner.spec.strategy import Recompute, Strategy
from tests.execute.layouts import decoder_splits

LENGTH = 16


def whole_stage(spec: ModelSpec) -> DecoderStage:
    """Every parameter drawn at random, norms and biases too: a gradient that is lost shows."""
    stage = build_stage(spec, Span(0, spec.layers - 1), dtype=torch.float64)
    with torch.no_grad():
        for path, parameter in stage.named_parameters():
            digest = hashlib.sha256(path.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
        for buffer in stage.buffers():
            buffer.zero_()
    return stage


def global_batch(spec: ModelSpec, sequences: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels; some labels do not count, and not equally many in each sequence."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(spec.vocab, (sequences, LENGTH), generator=generator)
    labels = torch.randint(spec.vocab, (sequences, LENGTH), generator=generator)
    for row in range(sequences):
        labels[row, : row + 1] = -100
    return tokens, labels


def reference(spec: ModelSpec, sequences: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole batch in one process."""
    stage = whole_stage(spec)
    tokens, labels = global_batch(spec, sequences)
    loss = token_loss(stage(tokens, LENGTH), labels)
    loss.backward()
    return float(loss.detach()), {path: p.grad for path, p in stage.named_parameters() if p.grad is not None}


def applied_on_this_rank(
    spec: ModelSpec, strategy: Strategy, recompute: dict[str, Recompute] | None = None, **layout: Any
) -> Applied:
    """A whole decoder under a strategy."""
    meshes = build_meshes(strategy, kv_heads=spec.kv_heads, experts=spec.moe is not None)
    splits = decoder_splits(spec, sp=strategy.sp, **layout)
    return apply_strategy(whole_stage(spec), splits, meshes, recompute=recompute)


def own_microbatches(spec: ModelSpec, meshes: Meshes, sequences: int) -> list[Microbatch]:
    """This rank's share of the global batch."""
    strategy = meshes.strategy
    tokens, labels = global_batch(spec, sequences)
    dp_rank = meshes.data_rank // strategy.cp
    mine = range(dp_rank * (sequences // strategy.dp), (dp_rank + 1) * (sequences // strategy.dp))
    rows = torch.tensor(list(mine)).split(strategy.microbatch)
    return [
        Microbatch(
            x=own_tokens(tokens[part], meshes.cp),
            labels=own_tokens(labels[part], meshes.cp),
            length=LENGTH // strategy.cp,
        )
        for part in rows
    ]


def whole_gradient(spec: ModelSpec, path: str, grad: Tensor) -> Tensor:
    """A gradient as one process has it: copies of kv heads compared and dropped, padding found zero."""
    whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
    if path.split(".")[-2] in ("key", "value"):
        size = spec.kv_heads * spec.head_dim
        copies = whole.reshape(spec.kv_heads, -1, spec.head_dim, *whole.shape[1:])
        assert torch.equal(copies, copies[:, :1].expand_as(copies)), f"copies of {path} differ"
        return copies[:, 0].reshape(size, *whole.shape[1:])
    if path in ("embedding.tokens.weight", "head.projection.weight", "head.projection.bias"):
        assert not whole[spec.vocab :].any(), f"padding of {path} has a gradient"
        return whole[: spec.vocab]
    return whole


def step_errors(
    spec: ModelSpec,
    strategy: Strategy,
    sequences: int,
    *,
    blocks: dict[str, Recompute] | None = None,
    as_in_pipeline: bool = False,
    layout: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Largest relative error of the loss, of each gradient and of the gradients' norm."""
    applied = applied_on_this_rank(spec, strategy, blocks, **(layout or {}))
    if as_in_pipeline:
        sharding = dataclasses.replace(applied.sharding, in_pipeline=True)
        if isinstance(sharding, Sharding):
            sharding.prepare()
        applied = dataclasses.replace(applied, sharding=sharding)
    loss = run_step(applied, own_microbatches(spec, applied.meshes, sequences))
    expected_loss, expected = reference(spec, sequences)
    errors = {"loss": abs(float(loss) - expected_loss) / abs(expected_loss)}
    found = dict(applied.stage.named_parameters())
    # a bias of keys without rotation moves no score: its gradient is rounding alone
    floor = 1e-4 * max(float(grad.abs().max()) for grad in expected.values())
    assert found.keys() == expected.keys()
    for path, parameter in found.items():
        assert parameter.grad is not None, f"{path} has no gradient"
        difference = whole_gradient(spec, path, parameter.grad) - expected[path]
        errors[path] = float(difference.abs().max() / max(float(expected[path].abs().max()), floor))
    norm = clip_gradients(applied.stage, applied.meshes, applied.summed, 1e9)
    expected_norm = nn.utils.get_total_norm(expected.values())
    errors["norm"] = abs(float(norm) - float(expected_norm)) / float(expected_norm)
    return errors


def counted_step(spec: ModelSpec, strategy: Strategy, sequences: int) -> tuple[CountedCollective, ...]:
    """Collectives of a second real step in mixed precision, as the dry run counts them."""
    meshes = build_meshes(strategy, kv_heads=spec.kv_heads, experts=spec.moe is not None)
    stage = whole_stage(spec).float()
    applied = apply_strategy(stage, decoder_splits(spec, sp=strategy.sp), meshes, precision="bf16")
    batches = own_microbatches(spec, meshes, sequences)
    run_step(applied, batches)
    stage.zero_grad()
    with CollectiveCounter(meshes.axes) as counter:
        run_step(applied, batches)
        clip_gradients(stage, meshes, applied.summed, 1.0)
    return counter.counted()


def masks_of_dropout(spec: ModelSpec, strategy: Strategy) -> tuple[float, list[float]]:
    """The loss with dropout, and what this rank draws next inside attention."""
    applied = applied_on_this_rank(spec, strategy)
    seed_rank(3, applied.meshes)
    loss = run_step(applied, own_microbatches(spec, applied.meshes, 2 * strategy.dp))
    core = next(module for module in applied.stage.modules() if isinstance(module, Core))
    q = torch.ones(1, spec.heads // strategy.tp, 4, spec.head_dim, dtype=torch.float64)
    seen = core(q, q, torch.eye(4, spec.head_dim, dtype=torch.float64).expand_as(q), NO_POSITIONS)
    return float(loss), seen.flatten().tolist()


def refusal(spec: ModelSpec, strategy: Strategy, changed: dict[str, ModuleSplit | None]) -> tuple[str, str]:
    """Rule and value of the error when some lines of a plan are changed or, at None, left out."""
    meshes = build_meshes(strategy, kv_heads=spec.kv_heads)
    splits = {path: split for path, split in (decoder_splits(spec) | changed).items() if split is not None}
    try:
        apply_strategy(whole_stage(spec), splits, meshes)
    except PlannerError as error:
        return error.rule, str(error.value)
    raise AssertionError("nothing was refused")
