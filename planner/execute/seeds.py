"""Random numbers of dropout: the same where ranks hold the same activation, different where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor  # no public test for a tensor without values exists

from planner.execute.mesh import Meshes
from planner.execute.parameters import replace_forward
from planner.execute.stage import Stage
from planner.models.attention import Core

_FAR = 2**31 - 1


def seed_rank(seed: int, meshes: Meshes, *, alike: bool = False) -> None:
    """Start this rank's generators. Ranks of one tp group agree, unless with sp each drops of its own tokens.

    Where a whole is dropped from under sp as well, they are to start `alike`.
    """
    strategy = meshes.strategy
    number = meshes.pp_rank * meshes.data_ranks + meshes.data_rank
    number = number * strategy.tp + (meshes.tp.rank if strategy.sp and not alike else 0)
    torch.manual_seed(seed + number)


def drop_by_head(stage: Stage, meshes: Meshes, is_cut: Callable[[str], bool]) -> None:
    """Inside attention that is cut each tp rank has other heads, and so other random numbers.

    They start from one drawn on the CPU, which all ranks of the group draw alike and which recompute restores.
    """
    if not stage.spec.attention_dropout or meshes.tp.size == 1:
        return
    for path, module in stage.named_modules():
        if isinstance(module, Core) and is_cut(path):
            replace_forward(module, lambda forward: apart(forward, meshes.tp.rank))


def apart(forward: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """A function that draws other random numbers on each rank of a group, from one that all of them draw."""

    def run(*args: Any, **kwargs: Any) -> Any:
        drawn = torch.randint(_FAR, (), device="cpu")
        start = 0 if isinstance(drawn, FakeTensor) else int(drawn)
        with torch.random.fork_rng():
            torch.manual_seed(start + rank)
            return forward(*args, **kwargs)

    eagerly: Callable[..., Any] = torch.compiler.disable(run)  # type: ignore[no-untyped-call]  # sets generators
    return eagerly
