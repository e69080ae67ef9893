"""A plan checked before anything is rented: its executor dry-run at full size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from planner.api.planning import OpenedPlan, PlanLike, open_plan
from planner.errors import PlannerError
from planner.spec.huggingface_config import config_at
from planner.spec.model import ModelSpec
from planner.spec.sources import UserModule, resolve_model

if TYPE_CHECKING:
    from planner.spec.verification import Verification

USUAL_PROCESSES = 8

Told = Callable[[str], None]


def verify(
    plan: PlanLike,
    *,
    numerics: bool = False,
    transformers: bool = False,
    nproc: int = USUAL_PROCESSES,
    told: Told | None = None,
    use_cache: bool = True,
) -> Verification:
    """Dry-run every pipeline rank of a plan in this process, and set beside the plan what it would do.

    Collectives are equal in kind, number and bytes, peak memory lies within the plan's interval; an edited plan
    is checked as it stands. With `numerics` a small copy of it runs on up to `nproc` local processes as well, and
    its loss, gradients and first step of AdamW are those of one process. With `transformers` the model is not the
    bundled one, which `run` trains, but the library's module, as `parallelize` spreads it. Of a module of one's
    own, `FILE.py:FUNCTION`, both are as `parallelize` spreads it, and its small copy is the module as it is.
    `told` hears what runs.
    """
    if numerics and nproc < 1:
        raise PlannerError("numerics take a process", value=nproc, remedy="give --nproc 1 or more", key="nproc")
    opened, processes = open_plan(plan, use_cache=use_cache), nproc if numerics else 0
    if opened.spec is not None:
        config = config_at((opened.plan.model,), opened.spec) if transformers else {}
        return _of_spec(opened, opened.spec, config, processes, told)
    return _of_user(opened, _user_module(opened, transformers=transformers), processes, told)


def _of_spec(
    opened: OpenedPlan, spec: ModelSpec, config: dict[str, Any], processes: int, told: Told | None
) -> Verification:
    """What a spec describes: the bundled decoder, or by its configuration a module of transformers."""
    from planner.execute.verify import runnable, verify_layout

    kinds = [placement.block for placement in opened.graph.sequence if placement.path]
    if not processes:
        return verify_layout(opened.plan, spec, kinds, told=told, config=config)
    from planner.execute.numerics import verify_numerics
    from planner.execute.shrink import shrunk

    runnable(opened.plan, spec)
    small, model = shrunk(opened.plan, spec, processes)  # before a dry run, which may take a minute
    found = verify_layout(opened.plan, spec, kinds, told=told, config=config)
    if told is not None:
        told(f"a small copy on {small.gpus} processes")
    return replace(found, parity=verify_numerics(small, model, model_type=config.get("model_type", "")))


def _of_user(opened: OpenedPlan, user: UserModule, processes: int, told: Told | None) -> Verification:
    """What a function of a file makes."""
    from planner.execute.own_verify import verify_own_layout

    blocks = [(placement.path, placement.block) for placement in opened.graph.sequence if placement.path]
    found = verify_own_layout(opened.plan, user, blocks, told=told)
    if not processes:
        return found
    from planner.execute.own_numerics import verify_own_numerics

    if told is not None:
        told(f"the module on up to {processes} processes")
    return replace(found, parity=verify_own_numerics(opened.plan, user, processes))


def _user_module(opened: OpenedPlan, *, transformers: bool) -> UserModule:
    """The function that makes a model which has no spec."""
    found = resolve_model(opened.plan.model)
    if not isinstance(found, UserModule):
        raise PlannerError(
            "a dry run builds the model, from its spec or by a function of a file",
            value=f"{opened.plan.model}, a graph alone",
            remedy="explain, estimate and compare take this plan; to verify one, plan a bundled model, a spec or "
            "FILE.py:FUNCTION",
            key="model",
        )
    if transformers:
        raise PlannerError(
            "--transformers checks a module of the library, which a config.json describes",
            value=opened.plan.model,
            remedy="leave --transformers out: a module of one's own is checked as parallelize spreads it",
            key="transformers",
        )
    return found
