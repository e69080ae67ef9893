"""Counts the collectives that a rank issues: axis, phase, kind, how often, how many bytes."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from planner.execute.phases import StepPhase, current_phase
from planner.spec.plan import CollectiveAxis, CollectiveKind

_KINDS: dict[str, CollectiveKind] = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "p2p",
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}
# a message counts where it is sent; the last wraps what a collective gave
_SILENT = ("barrier", "wait_tensor", "monitored_barrier_", "recv_", "_wrap_tensor_autograd")


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedCollective:
    """Calls of one kind in one phase over one axis; `bytes` is the sum over all of them."""

    axis: CollectiveAxis
    ranks: int
    phase: StepPhase
    kind: CollectiveKind
    count: int
    bytes: int


class CollectiveCounter(TorchDispatchMode):
    """Sees every collective inside it; `axes` says which group is which. Metadata is left out."""

    def __init__(self, axes: dict[str, CollectiveAxis]) -> None:
        super().__init__()
        self.axes = axes
        self.microbatch: int | None = None  # which one runs, where somebody says so
        self.calls: Counter[tuple[Any, ...]] = Counter()
        self.bytes: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to local tensors comes by again
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func, args, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        name = func._schema.name.split("::")[1]
        if name in _SILENT or current_phase() == "metadata":
            return
        kind = _KINDS[name]
        group = _group_of(args)
        if group.size() == 1:
            return
        call = (self._axis(group), group.size(), _phase(self._axis(group), kind), kind)
        for key in ((None, *call), (self.microbatch, *call))[: 1 if self.microbatch is None else 2]:
            self.calls[key] += 1
            self.bytes[key] += _bytes(func.namespace, kind, args, out)

    def _axis(self, group: dist.ProcessGroup) -> CollectiveAxis:
        # where one axis spans all ranks its group may be the world's
        return "world" if current_phase() == "clip" else self.axes[group.group_name]

    def counted(self, microbatch: int | None = None) -> tuple[CountedCollective, ...]:
        """All calls so far in a fixed order, or only those of one microbatch."""
        return tuple(
            CountedCollective(
                axis=axis, ranks=ranks, phase=phase, kind=kind, count=self.calls[key], bytes=self.bytes[key]
            )
            for key in sorted((key for key in self.calls if key[0] == microbatch), key=lambda key: key[1:])
            for _, axis, ranks, phase, kind in [key]
        )


def _group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    for value in args:
        if isinstance(value, torch.ScriptObject) and str(value._type()).endswith(".ProcessGroup"):
            return dist.ProcessGroup.unbox(value)
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            return _resolve_process_group(value)  # type: ignore[arg-type]
    raise AssertionError("a collective has a group")


def _phase(axis: CollectiveAxis, kind: CollectiveKind) -> StepPhase:
    """Gradients that dp ranks reduce while backward runs are gradient synchronisation; messages are apart."""
    now = current_phase()
    if kind == "p2p":
        return "p2p"
    reduces = kind in ("reduce_scatter", "all_reduce") and axis in ("dp", "dp_replicate")
    return "gradient_sync" if reduces and now == "backward" else now


def _bytes(namespace: str, kind: CollectiveKind, args: tuple[Any, ...], out: Any) -> int:
    """all_gather its output, the others what a rank puts in."""
    if namespace == "_c10d_functional":
        return _size(out if kind == "all_gather" else args[0])
    puts_in = {"all_gather": 0, "reduce_scatter": 1, "all_to_all": 1}  # outputs come first
    return _size(args[puts_in.get(kind, 0)])


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))
