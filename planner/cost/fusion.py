"""Which memory-bound operators of a block run as one kernel, and what such a kernel reads, writes and keeps.

Plain eager torch launches each operator alone. A compiler fuses whatever stands between two products; it is given
the layers and not the loss, as torchtitan does. Megatron's hand-written kernels fuse pointwise chains, also into a
softmax, but end at a norm, a softmax or a dropout's mask. Inside a fused kernel nothing is kept for backward: it
is computed again from the kernel's inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from planner.spec.graph import PRODUCTS, Block, Operator
from planner.spec.sizes import Tensor
from planner.spec.workload import Stack

_FREE_BACKWARD = ("add", "add_", "iadd")  # hands the same gradient to both inputs
_POINTWISE = ("elementwise", "copy")
_COMPILED = ("elementwise", "copy", "norm", "softmax", "dropout", "reduction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A kernel that memory bounds: one operator, or several fused."""

    operators: tuple[Operator, ...]
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    keeps: tuple[Tensor, ...]  # for backward
    own: tuple[Tensor, ...]  # of those, what is neither read nor handed on
    launches: int
    needs_grad: bool
    backward_moves: bool  # whether backward touches memory at all

    @property
    def backward_reads(self) -> tuple[Tensor, ...]:
        """What backward reads: gradients of the results, and what was kept."""
        return (*_floating(self.writes), *self.keeps)

    @property
    def backward_writes(self) -> tuple[Tensor, ...]:
        """What backward writes: gradients of the inputs."""
        return tuple(_floating(self.reads))


def passes(block: Block, stack: Stack) -> tuple[Pass, ...]:
    """The memory-bound kernels of a block under a software stack, in order."""
    groups: dict[int, list[Operator]] = {}
    home: dict[str, int] = {}  # group that makes a storage
    depth = _depths(block)
    for place, operator in enumerate(block.operators):
        if is_heavy(operator):
            continue
        groups[place] = [operator]
        for other in _joined(operator, groups, home, depth, stack):
            groups[place] = groups.pop(other) + groups[place]
            home |= {tensor.name: place for member in groups[place] for tensor in member.outputs}
        home |= {tensor.name: place for tensor in operator.outputs}
    return tuple(_pass(block, group) for group in groups.values())


def is_heavy(operator: Operator) -> bool:
    """Products and fused attention have cost functions of their own."""
    return operator.kind in PRODUCTS or operator.kind == "attention"


def _joined(
    operator: Operator,
    groups: dict[int, list[Operator]],
    home: dict[str, int],
    depth: dict[str, int],
    stack: Stack,
) -> list[int]:
    """The kernels that an operator joins and thereby joins to one: those that make its inputs, if they may."""
    makers = sorted({home[tensor.name] for tensor in operator.inputs if tensor.name in home})
    return [
        place
        for place in makers
        if depth[groups[place][-1].name] == depth[operator.name] and _fuse(groups[place][-1], operator, stack)
    ]


def _fuse(before: Operator, after: Operator, stack: Stack) -> bool:
    if stack in ("compiled", "cuda_graph"):
        return before.kind in _COMPILED and after.kind in _COMPILED
    if stack == "megatron":
        starts = before.kind in _POINTWISE or (before.kind == "dropout" and after.kind == "elementwise")
        return starts and after.kind in (*_POINTWISE, "softmax")
    return False


def _depths(block: Block) -> dict[str, int]:
    """Kernels that nothing joins on the longest way to each operator: those of unequal depth cannot be one."""
    made: dict[str, int] = {}
    depths: dict[str, int] = {}
    for operator in block.operators:
        depth = max((made.get(tensor.name, 0) for tensor in operator.inputs), default=0)
        depths[operator.name] = depth
        after = depth + (operator.kind not in _COMPILED)
        made |= {tensor.name: after for tensor in operator.outputs}
    return depths


def _pass(block: Block, group: list[Operator]) -> Pass:
    inside = {tensor.name for operator in group for tensor in operator.outputs}
    names = {operator.name for operator in group}
    outside = [operator for operator in block.operators if operator.name not in names]
    wanted = {tensor.name for operator in outside for tensor in (*operator.inputs, *operator.keeps)}
    wanted |= set(block.outputs)
    reads = _reads(block, [tensor for op in group for tensor in op.inputs if tensor.name not in inside])
    writes = _unique(tensor for operator in group for tensor in operator.outputs if tensor.name in wanted)
    writes = writes or _unique(group[-1].outputs)
    keeps = _unique(tensor for operator in group for tensor in operator.keeps)
    if len(group) > 1:
        keeps = _kept_by_fused(keeps, reads, writes)
    known = {tensor.name for tensor in (*reads, *writes)}
    own = tuple(tensor for tensor in keeps if tensor.name not in known)  # statistics, masks
    alone = len(group) == 1 and not keeps and group[0].call in _FREE_BACKWARD
    return Pass(
        operators=tuple(group),
        reads=reads,
        writes=writes,
        keeps=keeps,
        own=own,
        launches=1 if len(group) > 1 else max(1, group[0].kernels),
        needs_grad=any(operator.needs_grad for operator in group),
        backward_moves=not alone,
    )


def _reads(block: Block, views: list[Tensor]) -> tuple[Tensor, ...]:
    """What a kernel reads; storages that it looks into more than once are read whole."""
    whole = {tensor.name: tensor for operator in block.operators for tensor in operator.outputs}
    times = Counter(view.name for view in views)
    return _unique(whole.get(view.name, view) if times[view.name] > 1 else view for view in views)


def _kept_by_fused(
    keeps: tuple[Tensor, ...], reads: tuple[Tensor, ...], writes: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """What never leaves the kernel is computed again from its inputs; small statistics and masks are kept."""
    sources = _floating(reads)
    largest = max((_size(tensor) for tensor in sources), default=0)
    known = {tensor.name for tensor in (*reads, *writes)}
    lost = [tensor for tensor in _floating(keeps) if tensor.name not in known and _size(tensor) * 2 > largest]
    kept = [tensor for tensor in keeps if tensor not in lost]
    return _unique([*kept, *(sources if lost else ())])


def _size(tensor: Tensor) -> int:
    """Elements at a probe, to tell statistics from activations."""
    size: int = tensor.elements(2, 256)
    return size


def _unique(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Each storage once, seen as its first reader sees it."""
    found: dict[str, Tensor] = {}
    for tensor in tensors:
        found.setdefault(tensor.name, tensor)
    return tuple(found.values())


def _floating(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if not tensor.dtype.startswith(("int", "bool"))]
