"""A plan checked before anything is rented: its executor dry-run at full size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.api.planning import OpenedPlan, PlanLike, open_plan
from planner.errors import PlannerError
from planner.spec.huggingface_config import config_at
from planner.spec.model import ModelSpec

if TYPE_CHECKING:
    from planner.spec.verification import Verification

USUAL_PROCESSES = 8


def verify(
    plan: PlanLike,
    *,
    numerics: bool = False,
    transformers: bool = False,
    nproc: int = USUAL_PROCESSES,
    told: Callable[[str], None] | None = None,
    use_cache: bool = True,
) -> Verification:
    """Dry-run every pipeline rank of a plan in this process, and set beside the plan what it would do.

    Collectives are equal in kind, number and bytes, peak memory lies within the plan's interval; an edited plan
    is checked as it stands. With `numerics` a small copy of it runs on up to `nproc` local processes as well, and
    its loss, gradients and first step of AdamW are those of one process. With `transformers` the model is not the
    bundled one, which `run` trains, but the library's module, as `parallelize` spreads it. `told` hears what runs.
    """
    if numerics and nproc < 1:
        raise PlannerError("numerics take a process", value=nproc, remedy="give --nproc 1 or more", key="nproc")
    from planner.execute.verify import runnable, verify_layout

    opened = open_plan(plan, use_cache=use_cache)
    kinds = [placement.block for placement in opened.graph.sequence if placement.path]
    spec = spec_of(opened)
    config = config_at((opened.plan.model,), spec) if transformers else {}
    if not numerics:
        return verify_layout(opened.plan, spec, kinds, told=told, config=config)
    from planner.execute.numerics import verify_numerics
    from planner.execute.shrink import shrunk

    runnable(opened.plan, spec)
    small, model = shrunk(opened.plan, spec, nproc)  # what it refuses needs no dry run, which may take a minute
    found = verify_layout(opened.plan, spec, kinds, told=told, config=config)
    if told is not None:
        told(f"a small copy on {small.gpus} processes")
    return replace(found, parity=verify_numerics(small, model, model_type=config.get("model_type", "")))


def spec_of(opened: OpenedPlan) -> ModelSpec:
    """The spec of a plan's model, which the executor builds it from."""
    if opened.spec is None:
        raise PlannerError(
            "a dry run builds the model from its spec",
            value=f"{opened.plan.model}, which has none",
            remedy="explain, estimate and compare take this plan; to verify one, plan a bundled model or a spec",
            key="model",
        )
    return opened.spec
