"""Sharded state and mixed precision: FSDP2 in the way each zero stage asks for, but where there is neither."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from planner.errors import PlannerError
from planner.execute.mesh import Meshes
from planner.execute.parameters import local
from planner.execute.phases import phase
from planner.execute.replicas import Replicas
from planner.execute.stage import Stage
from planner.models.feedforward import Experts
from planner.spec.strategy import Strategy
from planner.spec.workload import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DataParallel(Protocol):
    """What a step tells the data parallelism of a stage."""

    def before_backward(self, *, last: bool) -> None:
        """A microbatch's backward begins, of the step's last one or of an earlier one."""

    def after_weights(self) -> None:
        """A backward of weights alone is through."""

    def finish(self) -> None:
        """All microbatches are through: gradients are whole when this returns."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """The modules that gather and reduce together, and when they do."""

    groups: tuple[FSDPModule, ...]
    zero: int
    in_pipeline: bool

    def before_backward(self, *, last: bool) -> None:
        """Say what this backward does with gradients and weights.

        Zero 0 and 1 reduce gradients once, after the last microbatch; 2 and 3 after each, and copies of the
        sharded state meet once. Only 3 drops gathered weights before the last. In a pipeline neither happens
        before `finish`.
        """
        if self.in_pipeline:
            self._set(last=False, synchronise=False, drop=False)
        else:
            self._set(last=True, synchronise=last or self.zero >= 2, drop=last or self.zero == 3)
            for group in self.groups:
                group.set_requires_all_reduce(last, recurse=False)

    def prepare(self) -> None:
        """Once, before the first forward."""
        root: Any = self.groups[-1]
        if self.in_pipeline and hasattr(root, "set_manual_backward_finalization"):  # torch 2.15
            root.set_manual_backward_finalization(True)

    def after_weights(self) -> None:
        """Add gradients that a backward of weights alone has made to their sums: no hook of FSDP2 sees it.

        From torch 2.15 on gradients are summed up where they are made.
        """
        for group in self._parameter_groups():
            for parameter in group.fsdp_params:
                if hasattr(parameter, "accumulate_unsharded_grad_if_needed"):
                    parameter.accumulate_unsharded_grad_if_needed()
                    parameter.to_accumulated_grad_if_needed()

    def finish(self) -> None:
        """In a pipeline, reduce gradients and drop gathered weights now that all microbatches are through."""
        if not self.in_pipeline or not self.groups:
            return
        self._set(last=True, synchronise=True, drop=True)
        root: Any = self.groups[-1]
        with phase("gradient_sync"):
            if hasattr(root, "finalize_backward"):  # torch 2.15
                root.finalize_backward()
                return
            for group in self._parameter_groups():
                group.post_backward()
            fully_shard.state(root)._root_post_backward_final_callback()  # type: ignore[attr-defined]

    def _parameter_groups(self) -> Iterator[Any]:
        """FSDP2's own, by private names as torch's pipeline runtime has them."""
        if not self.groups:
            return
        for part in fully_shard.state(self.groups[-1])._state_ctx.all_states:  # type: ignore[attr-defined]
            if hasattr(part, "_fsdp_param_groups"):
                yield from part._fsdp_param_groups
            elif part._fsdp_param_group is not None:  # torch 2.11
                yield part._fsdp_param_group

    def _set(self, *, last: bool, synchronise: bool, drop: bool) -> None:
        for group in self.groups:
            group.set_is_last_backward(last)
            group.set_requires_gradient_sync(synchronise, recurse=False)
            group.set_reshard_after_backward(drop, recurse=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Modules whose weights are gathered together, and whether they are dropped again after forward."""

    modules: tuple[nn.Module, ...]
    reshard: bool
    experts: bool = False


def shard(stage: Stage, meshes: Meshes, precision: Precision) -> DataParallel:
    """Spread a stage's state over its data-parallel ranks; weights stay fp32, products run in `precision`."""
    sharding = shard_groups(stage, list(_groups_of(stage, meshes)), meshes, precision)
    if not _is_tied(stage):
        for table in stage.embedding_modules:
            if isinstance(table, FSDPModule):
                # the gradient of a look-up needs no table, that of a norm its weight
                table.set_unshard_in_backward(stage.spec.embedding_norm)
    return sharding


def shard_groups(module: nn.Module, parts: Sequence[Group], meshes: Meshes, precision: Precision) -> DataParallel:
    """The same for a module of which some parts are groups, in this order, and the rest is one."""
    if precision not in DTYPES:
        raise PlannerError(
            "the executor runs " + ", ".join(DTYPES),
            value=precision,
            remedy="set precision to bf16",
            key="precision",
        )
    strategy = meshes.strategy
    own = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    dtype = None if own == {torch.float64} else DTYPES[precision]
    if meshes.data_ranks == 1 and dtype in (None, torch.float32) and meshes.experts is None:
        return Sharding((), strategy.zero, strategy.pp > 1)
    as_kept = dtype is None or (own == {dtype} == {torch.float32} and strategy.grad_dtype == "fp32")
    if strategy.zero == 0 and as_kept and meshes.experts is None:
        modules = [*(part.modules for part in parts), (module,)]
        return Replicas(modules, meshes.state_mesh.get_group("dp_replicate"), strategy.pp > 1)
    # kept whole: torch 2.11 takes each weight that it spreads for one that is trained
    whole_numbers = {parameter for parameter in module.parameters() if not parameter.is_floating_point()}
    groups: list[FSDPModule] = []
    for part in (*parts, Group(modules=(module,), reshard=False)):
        mesh = meshes.expert_state_mesh if part.experts else meshes.state_mesh
        fully_shard(
            part.modules[0] if len(part.modules) == 1 else list(part.modules),
            mesh=mesh,
            mp_policy=_policy(dtype, strategy),
            reshard_after_forward=part.reshard,
            shard_placement_fn=functools.partial(_placement, ranks=mesh.size(-1)),
            ignored_params=whole_numbers,
        )
        groups.extend(each for each in part.modules if isinstance(each, FSDPModule))
    for group in groups:
        # gradients are sums over ranks: the loss is divided by the tokens of all of them
        group.set_force_sum_reduction_for_comms(True)
        group.set_gradient_divide_factor(1.0)
    sharding = Sharding(tuple(groups), strategy.zero, strategy.pp > 1)
    sharding.prepare()
    return sharding


def _groups_of(stage: Stage, meshes: Meshes) -> Iterator[Group]:
    # in a pipeline weights stay between microbatches: to gather them for each is what a step would wait for
    again = meshes.strategy.zero == 3 and meshes.strategy.pp == 1
    for block in stage.blocks.values():
        if meshes.experts is not None:
            for experts in (module for module in block.modules() if isinstance(module, Experts)):
                yield Group(modules=(experts,), reshard=again, experts=True)
        yield Group(modules=(block,), reshard=again)
    if _is_tied(stage):
        return
    if stage.embedding_modules:
        yield Group(modules=tuple(stage.embedding_modules), reshard=again)
    ends = tuple(module for module in (stage.norm, stage.head) if module is not None)
    if ends:
        # backward starts with the last group: dropping it before would gather it twice in a row
        yield Group(modules=ends, reshard=False)


def _is_tied(stage: Stage) -> bool:
    return stage.spec.tied_embeddings and stage.embedding is not None and stage.head is not None


def _placement(parameter: nn.Parameter, *, ranks: int) -> Shard | None:
    """Matrices of experts fewer than ranks are spread along their width, that no shard is empty."""
    rows = local(parameter).shape
    if len(rows) < 3 or rows[0] % ranks == 0 or rows[1] % ranks:
        return None
    return None if _cut_again(parameter) else Shard(1)


def _cut_again(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and len(parameter.placements) > 1


def _policy(dtype: torch.dtype | None, strategy: Strategy) -> MixedPrecisionPolicy:
    if dtype is None:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=DTYPES[strategy.grad_dtype])
