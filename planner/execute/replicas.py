"""Plain data parallelism: every rank has all of its weights in the precision it computes in, and sums gradients.

Nothing is sharded and nothing cast, so that nothing needs FSDP2, which would copy each gradient three times.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.execute.parameters import like, local
from planner.execute.phases import phase


@dataclass(eq=False)
class Bucket:
    """Weights whose gradients are sent together."""

    weights: tuple[nn.Parameter, ...]
    missing: int = 0  # gradients that the last backward has not made yet
    sent: tuple[Tensor, Any] | None = None  # all gradients in one, and what tells when they are summed

    @torch.no_grad()
    def send(self, group: dist.ProcessGroup) -> None:
        """Pack the gradients and let them be summed beside what comes next; what has none here adds zeros."""
        with phase("gradient_sync"):
            packed = torch.cat([_flat_gradient(weight) for weight in self.weights])
            for weight, part in zip(self.weights, self._unpacked(packed), strict=True):
                if weight.grad is not None:
                    weight.grad = like(weight, part)
            self.sent = packed, dist.all_reduce(packed, group=group, async_op=True)

    @torch.no_grad()
    def receive(self) -> None:
        """Wait until the gradients are sums. A weight without one here gets it where another rank has one."""
        assert self.sent is not None, "every group is sent before"
        packed, work = self.sent
        work.wait()
        self.sent = None
        for weight, part in zip(self.weights, self._unpacked(packed), strict=True):
            if weight.grad is None and not part.is_meta and part.any():
                weight.grad = like(weight, part)

    def _unpacked(self, packed: Tensor) -> list[Tensor]:
        wholes = [local(weight) for weight in self.weights]
        parts = packed.split([whole.numel() for whole in wholes])
        return [part.view(whole.shape) for part, whole in zip(parts, wholes, strict=True)]


def _flat_gradient(weight: nn.Parameter) -> Tensor:
    if weight.grad is not None:
        return local(weight.grad).reshape(-1)
    whole = local(weight)
    return whole.new_zeros(whole.numel())


@dataclass(eq=False)
class Replicas:
    """Copies of modules, with the interface of `Sharding`: groups of modules are summed together.

    All ranks send the groups in one order, from the last of the module to the first, whatever order their
    gradients come in: a rank may take another branch than its peers.
    """

    groups: Sequence[Sequence[nn.Module]]  # of a module and a part of it the part comes first; the last is all
    group: dist.ProcessGroup
    in_pipeline: bool
    buckets: list[Bucket] = field(default_factory=list)  # in the order in which they are sent
    handles: list[Any] = field(default_factory=list)
    next: int = 0  # of the buckets to be sent
    beside: bool = False  # whether they are sent as backward makes their gradients

    def before_backward(self, *, last: bool) -> None:
        """Gradients are summed in the last microbatch's backward, each group as soon as it has all."""
        self.beside = last and not self.in_pipeline
        if self.beside:
            self._begin()

    def after_weights(self) -> None:
        """A backward of weights alone adds to gradients as any other."""

    def finish(self) -> None:
        """All gradients are sums: those of a pipeline, whose last microbatch nobody knows before, are sent now."""
        if not self.beside:
            self._begin()
        self.beside = False
        for bucket in self.buckets[self.next :]:
            bucket.send(self.group)
        for bucket in self.buckets:
            bucket.receive()

    def _begin(self) -> None:
        """No group is sent yet."""
        self._fill_buckets()
        self.next = 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.weights)

    def _fill_buckets(self) -> None:
        """Now, for weights are made anew when they get their values, and may be frozen or thawed later."""
        trained = [weight for module in self.groups[-1] for weight in module.parameters() if weight.requires_grad]
        place = {id(weight): number for number, weight in enumerate(trained)}
        if place.keys() == {id(weight) for bucket in self.buckets for weight in bucket.weights}:
            return
        for handle in self.handles:
            handle.remove()
        left, firsts = dict(place), {}
        for modules in self.groups:
            own = [weight for module in modules for weight in module.parameters() if left.pop(id(weight), -1) >= 0]
            if own:
                firsts[min(place[id(weight)] for weight in own)] = Bucket(tuple(own))
        self.buckets = [firsts[number] for number in sorted(firsts, reverse=True)]
        self.handles = [
            weight.register_post_accumulate_grad_hook(partial(self._made, bucket))
            for bucket in self.buckets
            for weight in bucket.weights
        ]

    def _made(self, bucket: Bucket, weight: nn.Parameter) -> None:
        """A gradient is there: what can be sent is sent."""
        bucket.missing -= 1
        while self.beside and self.next < len(self.buckets) and self.buckets[self.next].missing <= 0:
            self.buckets[self.next].send(self.group)
            self.next += 1
