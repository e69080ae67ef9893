"""A strategy applied to a stage: split, spread, recompute, compile, shard, in this order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

from planner.errors import PlannerError
from planner.execute.context import spread_over_context
from planner.execute.experts import spread_experts
from planner.execute.gradients import splits_backward
from planner.execute.mesh import ALONE, Meshes
from planner.execute.parameters import Summed
from planner.execute.recompute import recompute_blocks
from planner.execute.seeds import drop_by_head
from planner.execute.sharding import DTYPES, DataParallel, shard
from planner.execute.stage import DecoderStage, Stage
from planner.execute.styles import HeadsSide, SharedInput, SplitStyle
from planner.models.attention import Attention, LatentAttention
from planner.models.feedforward import Experts, MixtureOfExperts
from planner.spec.legality import require_word
from planner.spec.paths import Span, lookup, unmatched
from planner.spec.plan import Layout, ModuleSplit
from planner.spec.strategy import Recompute
from planner.spec.workload import Context, Precision

# all heads read the one latent: it is whole on every rank, and its gradient a sum over them
_LATENT_SIDES: dict[str, HeadsSide] = {"latent": "before", "latent_norm": "inside", "expand": "inside"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A stage that runs as its plan says."""

    stage: Stage
    meshes: Meshes
    sharding: DataParallel
    summed: tuple[Summed, ...]  # weights whose gradients are parts until a step ends
    logits: Layout  # of what the head gives
    compute_dtype: torch.dtype
    at_once: bool  # both parts of a backward, where torch cannot split it


def apply_strategy(
    stage: Stage,
    splits: Mapping[str, ModuleSplit],
    meshes: Meshes,
    *,
    recompute: Mapping[str, Recompute] | None = None,
    precision: Precision = "bf16",
    compiled: bool = False,
    context: Context = "gather",
) -> Applied:
    """Change a stage in place. `splits` and `recompute` are by path pattern, as a plan has them.

    Without `recompute` every block does what the strategy says.
    """
    strategy = meshes.strategy
    summed: list[Summed] = []
    if strategy.tp > 1 or meshes.experts is not None:
        _require_known(splits, stage)
        _split(stage, splits, meshes, summed)
        stage.tie_weights()
    spread_over_context(stage, meshes.cp, context)
    drop_by_head(stage, meshes, lambda path: meshes.tp.size > 1 and _by_heads(splits, stage.plan_path(path)))
    choices = _recompute_by_layer(stage, meshes, recompute)
    recompute_blocks(stage, choices, compiled=compiled)
    head = lookup(splits, "head.projection") if strategy.tp > 1 else None
    return Applied(
        stage=stage,
        meshes=meshes,
        sharding=shard(stage, meshes, precision),
        summed=tuple(summed),
        logits=head.output if head else "replicate",
        compute_dtype=DTYPES[precision],
        at_once=not splits_backward(),
    )


def _split(stage: Stage, splits: Mapping[str, ModuleSplit], meshes: Meshes, summed: list[Summed]) -> None:
    shared: dict[str, SharedInput] = {}
    for path, module in list(stage.named_modules()):
        parent_path, _, name = path.rpartition(".")
        parent = stage.get_submodule(parent_path)
        line = stage.plan_path(path)
        plan = lookup(splits, line) if path else None
        if isinstance(module, Experts) and isinstance(parent, MixtureOfExperts):
            spread_experts(parent, plan or _missing(line, meshes), meshes)
            continue
        has_weights = any(value is not None for value in module._parameters.values())
        if meshes.tp.size == 1 or not (plan or has_weights):
            continue
        plan = plan or _missing(line, meshes)
        if parent_path not in shared and plan.split in ("column", "vocab"):
            shared[parent_path] = SharedInput(parent)
        of_kv_heads = isinstance(parent, Attention) and line.endswith((".key", ".value"))
        fused = stage.fused_widths(path)
        if fused:
            _require_equal(splits, line)
        style = SplitStyle(
            plan,
            meshes.tp,
            shared=shared.get(parent_path),
            summed=summed,
            copies=meshes.same_kv_head if of_kv_heads else ALONE,
            heads=_latent_side(parent, parent_path, name, splits),
            path=line,
            fused=fused,
        )
        parallelize_module(module, meshes.dense["tp"], style)


def _require_equal(splits: Mapping[str, ModuleSplit], query: str) -> None:
    """One layer that gives queries, keys and values is cut in one way."""
    attention = query.rpartition(".")[0]
    lines = {name: lookup(splits, f"{attention}.{name}") for name in ("query", "key", "value")}
    if len(set(lines.values())) > 1:
        raise PlannerError(
            "query, key and value that one layer gives are split alike",
            value=", ".join(f"{name} {line.split if line else 'nothing'}" for name, line in lines.items()),
            remedy="give the three one line",
            key=f"modules.{query}",
        )


def _latent_side(parent: nn.Module, path: str, name: str, splits: Mapping[str, ModuleSplit]) -> HeadsSide:
    if not isinstance(parent, LatentAttention) or not _by_heads(splits, f"{path}.core"):
        return "apart"
    return _LATENT_SIDES.get(name, "apart")


def _by_heads(splits: Mapping[str, ModuleSplit], core: str) -> bool:
    """Whether each rank has some heads of an attention core, not all of them."""
    line = lookup(splits, core)
    return line is not None and line.split == "heads"


def _missing(path: str, meshes: Meshes) -> ModuleSplit:
    """What holds for a module that the plan does not name: with tp every module with weights is named."""
    if meshes.tp.size == 1:
        return ModuleSplit(split="expert")
    raise PlannerError(
        "with tp the plan says of every module with weights how it is split",
        value=f"nothing about {path}",
        remedy=f"add {path} under modules, or plan again",
        key="modules",
    )


def _require_known(splits: Mapping[str, ModuleSplit], stage: Stage) -> None:
    """A line that names no module of the whole model is a mistake; one of another stage is not."""
    unknown = _unmatched(splits, stage)
    if unknown:
        with torch.device("meta"):
            unknown = _unmatched(unknown, DecoderStage(stage.spec, Span(0, stage.spec.layers - 1)))
    if unknown:
        raise PlannerError(
            "each line of the plan names a module of the model",
            value=", ".join(unknown),
            remedy="mend the path, or plan again",
            key="modules",
        )


def _unmatched(patterns: Iterable[str], stage: Stage) -> list[str]:
    return unmatched(patterns, [stage.plan_path(path) for path, _ in stage.named_modules()])


def _recompute_by_layer(
    stage: Stage, meshes: Meshes, choices: Mapping[str, Recompute] | None
) -> dict[str, Recompute]:
    everywhere = meshes.strategy.recompute
    if choices is None and everywhere == "auto":
        raise PlannerError(
            "a plan says block by block what is recomputed",
            value="auto",
            remedy="give recompute by block, or none, selective or full",
            key="recompute",
        )
    found: dict[str, Recompute] = {}
    for layer in stage.blocks:
        if choices is not None:
            found[layer] = lookup(choices, f"blocks.{layer}") or "none"
        elif everywhere != "auto":
            found[layer] = everywhere
    for layer, word in found.items():
        require_word(meshes.strategy, word, key=f"recompute.blocks.{layer}")
    return found
