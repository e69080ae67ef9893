"""A plan and its model made small enough for a few processes, laid out in the same way.

Every axis above 1 stays above 1 as far as there are processes; every kind of layer, split and recomputation that
the plan has stays in the model at least once. Widths are the least that the degrees divide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from planner.errors import PlannerError
from planner.models.decoder import Decoder
from planner.spec.legality import violations
from planner.spec.model import MlaSpec, ModelSpec, MoeSpec
from planner.spec.orders import stage_ranks
from planner.spec.paths import Span, lookup
from planner.spec.plan import ModuleSplit, Plan, Stage, content_digest
from planner.spec.strategy import Recompute, Strategy
from planner.spec.workload import TrainWorkload

_AXES = ("tp", "pp", "ep", "cp", "dp", "etp", "dp_replicate")  # that are kept first
_HEAD_DIM = 8
_MOST_LAYERS = 16
_WINDOW = 5  # tokens: less than the sequence, so that the window hides some


def shrunk(plan: Plan, spec: ModelSpec, processes: int) -> tuple[Plan, ModelSpec]:
    """The small plan and its model. A plan of no more ranks than processes keeps its degrees."""
    assert isinstance(plan.workload, TrainWorkload), "checked before"
    strategy = small_strategy(plan.strategy, processes, partial(_runs, plan, spec))
    layers = _layers(plan, spec, strategy)
    small = _model(spec, plan.strategy, strategy, layers)
    made = replace(
        laid_out(plan, strategy, _workload(plan.workload, strategy), small.layers),
        modules=_modules(plan, spec, small, layers, strategy),
        recompute=_recompute(plan, layers),
        model_spec=small,
        digests=replace(plan.digests, model=content_digest(small)),
    )
    return made.sealed(), small


def laid_out(plan: Plan, strategy: Strategy, workload: TrainWorkload, layers: int) -> Plan:
    """A plan with other degrees, other work and so many layers; it promises nothing."""
    return replace(
        plan,
        gpus=strategy.gpus,
        strategy=strategy,
        workload=workload,
        estimate=_estimate_keys(plan, strategy, workload),
        stages=_stages(strategy, layers),
        collectives=(),
        certificate=None,
        runners_up=(),
    )


def small_strategy(
    given: Strategy, processes: int, runs: Callable[[Strategy], bool], *, sizes: Sequence[int] = (1, 2, 4)
) -> Strategy:
    """The degrees: as they are where they fit, else those that run and keep the most axes above 1.

    `sizes` are degrees of tp that may be tried.
    """
    if given.gpus <= processes:
        return replace(given, microbatch=min(given.microbatch, 2))
    best: tuple[Any, ...] | None = None
    found = given
    for tried in _smaller(given, sizes):
        if tried.gpus > processes or not runs(tried):
            continue
        axes = (*_AXES, "dp_shard") if given.dp_replicate > 1 else _AXES
        kept = [getattr(tried, axis) > 1 for axis in axes if getattr(given, axis) > 1]
        rank = (sum(kept), kept, -tried.gpus)
        if best is None or rank > best:
            best, found = rank, tried
    if best is None:
        raise PlannerError(
            "a small copy of the plan keeps its layout",
            value=f"{given.label} on {processes} processes",
            remedy="give more processes with --nproc",
            key="nproc",
        )
    return found


def _smaller(given: Strategy, sizes: Sequence[int]) -> Iterator[Strategy]:
    """With degrees of 1, 2 and, where one divides another, 4; one stage alone has no schedule."""
    given = replace(given, microbatch=min(given.microbatch, 2), vpp=min(given.vpp, 2))
    choices = {axis: [size for size in (1, 2, 4) if size <= getattr(given, axis)] for axis in _AXES}
    choices["tp"] = [size for size in sizes if size <= given.tp]
    for degrees in itertools.product(*choices.values()):
        changed: dict[str, Any] = dict(zip(choices, degrees, strict=True))
        tried = replace(given, **changed)
        yield replace(tried, vpp=1, schedule="1f1b") if tried.pp == 1 else tried


def _runs(plan: Plan, spec: ModelSpec, strategy: Strategy) -> bool:
    assert isinstance(plan.workload, TrainWorkload)
    layers = max(spec.layers, strategy.pp * strategy.vpp)
    small = _model(spec, plan.strategy, strategy, list(range(layers)))
    return not violations(small, _workload(plan.workload, strategy), strategy, strategy.gpus)


def _workload(given: TrainWorkload, strategy: Strategy) -> TrainWorkload:
    return small_workload(given, strategy, 2 * math.lcm(2 * strategy.cp, strategy.cp * strategy.tp, 8))


def small_workload(given: TrainWorkload, strategy: Strategy, length: int) -> TrainWorkload:
    """A few tokens, and the fewest microbatches of which the schedule has a steady state."""
    count = 2 * strategy.pp if strategy.pp > 1 else 2
    batch = count * strategy.dp * strategy.microbatch
    return replace(given, seq_len=length, global_batch=batch, precision="fp32")


def _layers(plan: Plan, spec: ModelSpec, strategy: Strategy) -> list[int]:
    """The layer of the plan that each small layer is laid out as.

    The small model has its kinds of layers (dense or experts, window or none) in an order of its own; each takes
    in turn the distinct layouts that layers of its kind have in the plan.
    """
    distinct: dict[Any, list[int]] = {}
    seen = set()
    for layer in range(spec.layers):
        path = f"blocks.{layer}"
        splits = tuple((key, lookup(plan.modules, f"{path}.{key}")) for key in _keys_below_blocks(plan))
        layout = (_kind(spec, layer), splits, plan.recompute_of(path))
        if layout not in seen:
            seen.add(layout)
            distinct.setdefault(_kind(spec, layer), []).append(layer)
    chosen: list[int] = []
    most = max(_MOST_LAYERS, strategy.pp * strategy.vpp)
    small = _model(spec, plan.strategy, strategy, [0] * most)
    wanted = {kind: len(layers) for kind, layers in distinct.items()}
    used = dict.fromkeys(distinct, 0)
    for layer in range(most):
        enough = all(used[kind] >= wanted[kind] for kind in distinct)
        if enough and len(chosen) >= strategy.pp * strategy.vpp:
            break
        kind = _kind(small, layer)
        if kind not in distinct:
            kind = next(iter(distinct))
        chosen.append(distinct[kind][used[kind] % wanted[kind]])
        used[kind] += 1
    return chosen


def _keys_below_blocks(plan: Plan) -> list[str]:
    """Paths inside a block of which the plan says something."""
    patterns = (pattern.split(".", 2) for pattern in plan.modules)
    return list(dict.fromkeys(parts[2] for parts in patterns if parts[0] == "blocks" and len(parts) == 3))


def _kind(spec: ModelSpec, layer: int) -> tuple[bool, bool]:
    return spec.has_experts(layer), spec.window_of(layer) > 0


def _model(spec: ModelSpec, given: Strategy, strategy: Strategy, layers: list[int]) -> ModelSpec:
    """The least widths that every degree divides; a kv head for several ranks where the plan has it so."""
    tp = strategy.tp
    copied = spec.kv_heads < given.tp and tp > 1
    heads = 2 * tp
    # where the heads make up the width, and experts are as wide as a dense layer, some architectures need it so
    hidden = heads * _HEAD_DIM if spec.heads * spec.head_dim == spec.hidden else 4 * _HEAD_DIM
    kv_heads = 1 if copied else heads if spec.heads == spec.kv_heads else tp
    moe = _experts(spec.moe, strategy) if spec.moe is not None else None
    return replace(
        spec,
        name=f"{spec.name} shrunk",
        layers=len(layers),
        hidden=hidden,
        embedding_scale=hidden**0.5 if spec.embedding_scale == spec.hidden**0.5 else spec.embedding_scale,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_HEAD_DIM if spec.rope.fraction == 1.0 else 2 * _HEAD_DIM,
        ffn=moe.expert_ffn if moe and spec.moe and spec.ffn == spec.moe.expert_ffn else 8 * math.lcm(tp, 2),
        vocab=16 * tp if spec.vocab % given.tp == 0 else 16 * tp - 1,
        max_positions=256,
        sliding_window=_WINDOW if spec.sliding_window else 0,
        full_attention_every=min(spec.full_attention_every, 2),
        dropout=0.0,
        attention_dropout=0.0,
        mla=_latent(spec.mla) if spec.mla is not None else None,
        moe=moe,
        parameters=0,
    )


def _experts(moe: MoeSpec, strategy: Strategy) -> MoeSpec:
    groups = min(moe.groups, 2)
    width = 8 * math.lcm(strategy.etp, strategy.tp)
    top_k = min(moe.top_k, 2)
    return replace(
        moe,
        experts=math.lcm(strategy.ep, groups) * (4 if groups > 1 or strategy.ep == 1 else 2),
        top_k=top_k,
        expert_ffn=width,
        shared_experts=min(moe.shared_experts, 1),
        shared_expert_ffn=width if moe.shared_expert_ffn else 0,
        first_dense_layers=min(moe.first_dense_layers, 1),
        every=min(moe.every, 2),
        groups=groups,
        groups_kept=min(moe.groups_kept, groups),
    )


def _latent(mla: MlaSpec) -> MlaSpec:
    return replace(
        mla,
        query_rank=2 * _HEAD_DIM if mla.query_rank else 0,
        kv_rank=2 * _HEAD_DIM,
        nope_head_dim=_HEAD_DIM,
        rope_head_dim=_HEAD_DIM // 2,
        value_head_dim=_HEAD_DIM,
    )


def _estimate_keys(plan: Plan, strategy: Strategy, workload: TrainWorkload) -> Any:
    """The plan's own figures under the small plan's keys: nobody reads them, but a plan has some."""
    memory = plan.estimate.memory_per_stage
    return replace(
        plan.estimate,
        gpus=strategy.gpus,
        strategy=strategy,
        workload=workload,
        memory_per_stage=(memory * strategy.pp)[: strategy.pp],
    )


def _stages(strategy: Strategy, layers: int) -> tuple[Stage, ...]:
    """Layers by virtual stage, the first ones one more where they do not divide: uneven stages are tried too."""
    count = strategy.pp * strategy.vpp
    each, more = divmod(layers, count)
    held: list[list[Span]] = [[] for _ in range(strategy.pp)]
    first = 0
    for number, rank in enumerate(stage_ranks(strategy.schedule, strategy.pp, strategy.vpp)):
        size = each + (number < more)
        held[rank].append(Span(first, first + size - 1))
        first += size
    return tuple(Stage(layers=tuple(spans)) for spans in held)


def _modules(
    plan: Plan, spec: ModelSpec, small: ModelSpec, layers: list[int], strategy: Strategy
) -> dict[str, ModuleSplit]:
    """The line of every module, each small layer's as those of the layer it stands for."""
    with torch.device("meta"):
        paths = [path for path, _ in Decoder(small).named_modules() if path]
    found = {}
    for path in paths:
        head, _, rest = path.partition(".")
        number, _, inside = rest.partition(".")
        like = f"blocks.{layers[int(number)]}.{inside}" if head == "blocks" and number and inside else path
        line = lookup(plan.modules, like)
        if line is not None and (strategy.tp > 1 or line.split == "expert"):
            found[path] = line
    return found


def _recompute(plan: Plan, layers: list[int]) -> dict[str, Recompute]:
    if plan.strategy.recompute != "auto" and not plan.recompute:
        return {}
    words = {f"blocks.{place}": plan.recompute_of(f"blocks.{layer}") for place, layer in enumerate(layers)}
    return {path: word for path, word in words.items() if word != "none"}
