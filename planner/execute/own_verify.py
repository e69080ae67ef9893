"""A plan of a user's own module, dry-run at its full size beside what it promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from planner.execute.own_dry import DryOwnRank
from planner.execute.own_module import require_runnable
from planner.execute.verify import training_of, verify_ranks
from planner.models.user_module import loaded
from planner.spec.paths import lookup
from planner.spec.plan import Plan
from planner.spec.sources import UserModule
from planner.spec.verification import Verification


def verify_own_layout(
    plan: Plan,
    user: UserModule,
    blocks: Sequence[tuple[str, str]],
    *,
    told: Callable[[str], None] | None = None,
) -> Verification:
    """Dry-run a plan's ranks; `blocks` names path and kind of each layer, equal ones alike."""
    training_of(plan)
    require_runnable(plan)
    with loaded(user.path, user.function) as (module, example, _):
        layers = [_layer(plan, module, path, kind) for path, kind in blocks]
        return verify_ranks(plan, layers.__getitem__, lambda rank: DryOwnRank(module, example, plan, rank), told)


def _layer(plan: Plan, module: nn.Module, path: str, kind: str) -> Any:
    """Equal for layers that run alike: their kind, their splits, what they run again."""
    inside = (name for name, _ in module.get_submodule(path).named_modules() if name)
    splits = tuple(lookup(plan.modules, f"{path}.{name}") for name in inside)
    return kind, splits, plan.recompute_of(path)
