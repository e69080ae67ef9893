"""What selective recomputation keeps of a block: every second product, attention, and sums over ranks.

Products and attention are kept below autograd, by torch's selective contexts. Those sum in place and hand
buffers around, so a collective is kept here instead: the sum itself, not the summands that went into it.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from planner.execute.phases import phase

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "planner::grouped_matmul")
_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "planner::attention",
    "planner::ring_attention",
    "planner::fused_attention",
)
_SUMS = ("all_reduce", "reduce_scatter")
_KNOWN = frozenset((*_PRODUCTS, *_ATTENTION))


class _Kept:
    """The choices of one run of a block, the same in forward and when it runs again."""

    def __init__(self, products: int, *, needs_last: bool) -> None:
        self.products = products
        self.needs_last = needs_last
        self.sums: deque[Tensor] = deque()
        self.products_before_sum = 0  # of the last sum
        self.again = False
        self.counted: dict[bool, int] = {False: 0, True: 0}
        self.core: Literal["fused", "unfused"] | None = None
        self.in_core = 0
        self.partial = False

    def policy(self, context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        """For torch: whether to keep what an operator makes."""
        save = operator.name() in _ATTENTION or self._keeps_product(context.is_recompute)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def _keeps_product(self, again: bool) -> bool:
        if self.core == "fused":
            return False  # a kernel of this machine, written out: the core is one operator, no product
        number = self.counted[again]
        if self.core == "unfused":  # two products, however many pieces they come in
            number += self.in_core % 2
            self.in_core += 1
        else:
            self.counted[again] += 1
        last = number == self.products - 1 and not self.needs_last
        return number % 2 == 0 and not self.partial and not last

    @contextmanager
    def running(self, mode: AbstractContextManager[Any], *, again: bool) -> Iterator[None]:
        """Around the block's forward, and around its second run."""
        _now.append(self)
        self.again = again
        try:
            with mode:
                yield
        finally:
            _now.pop()
        if not again and self.sums and not self.needs_last and self.products_before_sum == self.products:
            self.sums.pop()


_now: list[_Kept] = []


def selective_contexts(products: int, *, needs_last: bool) -> tuple[Any, Any]:
    """Around a block's forward and its second run, which ends before what follows the last value needed.

    `products` is their number in the block. Without `needs_last` nothing reads the result of the last one but
    a sum that backward passes through.
    """
    kept = _Kept(products, needs_last=needs_last)
    first, second = create_selective_checkpoint_contexts(kept.policy)
    return kept.running(_Heavy(first), again=False), _second(kept, _Heavy(second))


def compiled_contexts() -> Any:
    """The same for torch.compile, which keeps nothing that backward does not read: whose operators these are."""
    numbers = itertools.count()  # of products, as torch traces the block

    def policy(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        name = operator.name()
        save = name in _ATTENTION or (name == "planner::exchange" and args[1] in _SUMS)
        save = save or (name in _PRODUCTS and next(numbers) % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class _Heavy(TorchDispatchMode):
    """Shows torch's selective mode products and attention alone.

    The rest is never kept, and need not be the same when a block runs again: gathering of sharded experts in
    the middle of it depends on what is gathered already.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name() in _KNOWN:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


@contextmanager
def _second(kept: _Kept, mode: AbstractContextManager[Any]) -> Iterator[None]:
    with phase("recompute"), kept.running(mode, again=True):
        yield


@contextmanager
def attention_core(*, fused: bool) -> Iterator[None]:
    """What runs inside is the attention core."""
    kept = _now[-1] if _now else None
    if kept is None:
        yield
        return
    kept.core, kept.in_core = "fused" if fused else "unfused", 0
    try:
        yield
    finally:
        kept.counted[kept.again] += 0 if fused else 2
        kept.core = None


@contextmanager
def partial_product() -> Iterator[None]:
    """The product inside is a part of a sum over ranks: the sum is kept instead."""
    kept = _now[-1] if _now else None
    if kept is not None:
        kept.partial = True
    try:
        yield
    finally:
        if kept is not None:
            kept.partial = False


def kept_sum(make: Callable[[], Tensor]) -> Tensor:
    """A sum over ranks: made and remembered in forward, remembered when a block runs again."""
    if not _now:
        return make()
    kept = _now[-1]
    if kept.again:
        return kept.sums.popleft()
    made = make()
    kept.sums.append(made.detach())
    kept.products_before_sum = kept.counted[False]
    return made
