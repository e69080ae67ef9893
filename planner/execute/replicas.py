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
    missing: int = 0  # gradients that this backward has not made yet
    sent: tuple[Tensor, Any] | None = None  # all gradients in one, and what tells when they are summed

    def send(self, group: dist.ProcessGroup) -> None:
        """Pack the gradients and let them be summed beside what comes next."""
        made = [weight for weight in self.weights if weight.grad is not None]
        if not made or self.sent is not None:
            return
        with phase("gradient_sync"):
            packed = torch.cat([local(weight.grad).reshape(-1) for weight in made])
            for weight, part in zip(made, packed.split([local(weight).numel() for weight in made]), strict=True):
                weight.grad = like(weight, part.view(local(weight).shape))
            self.sent = packed, dist.all_reduce(packed, group=group, async_op=True)

    def receive(self) -> None:
        """Wait until the gradients are sums."""
        if self.sent is not None:
            self.sent[1].wait()
        self.sent = None


@dataclass(eq=False)
class Replicas:
    """Copies of modules, with the interface of `Sharding`: groups of modules are summed together."""

    groups: Sequence[Sequence[nn.Module]]  # of a module and a part of it the part comes first
    group: dist.ProcessGroup
    in_pipeline: bool
    buckets: list[Bucket] = field(default_factory=list)

    def before_backward(self, *, last: bool) -> None:
        """Gradients are summed in the last microbatch's backward, each group as soon as it has all."""
        if not self.buckets:
            self._fill_buckets()
        for bucket in self.buckets:
            bucket.missing = len(bucket.weights) if last and not self.in_pipeline else 0

    def after_weights(self) -> None:
        """A backward of weights alone adds to gradients as any other."""

    def finish(self) -> None:
        """All gradients are sums: those of a pipeline, whose last microbatch nobody knows before, are sent now."""
        for bucket in self.buckets:
            bucket.send(self.group)
        for bucket in self.buckets:
            bucket.receive()

    def _fill_buckets(self) -> None:
        """Now, for weights are made anew when they get their values."""
        seen: set[int] = set()
        for modules in self.groups:
            weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
            own = tuple({id(weight): weight for weight in weights if id(weight) not in seen}.values())
            seen.update(map(id, own))
            if own:
                self.buckets.append(Bucket(own))
        for bucket in self.buckets:
            for weight in bucket.weights:
                weight.register_post_accumulate_grad_hook(partial(self._made, bucket))

    def _made(self, bucket: Bucket, weight: nn.Parameter) -> None:
        """A gradient is there."""
        bucket.missing -= 1
        if bucket.missing == 0:
            bucket.send(self.group)
