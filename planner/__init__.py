"""tp-plan: which parallelism for this model on this cluster, will it fit, how fast, why, how sure.

The public names are imported when first used, so `import planner` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOMES, for type checkers and editors
    from planner.api import attention_seconds as attention_seconds
    from planner.api import collective_seconds as collective_seconds
    from planner.api import compare as compare
    from planner.api import estimate as estimate
    from planner.api import explain as explain
    from planner.api import explain_plan as explain_plan
    from planner.api import gemm_seconds as gemm_seconds
    from planner.api import list_hardware as list_hardware
    from planner.api import list_models as list_models
    from planner.api import load_hardware as load_hardware
    from planner.api import load_model as load_model
    from planner.api import parallelize as parallelize
    from planner.api import plan as plan
    from planner.api import profile as profile
    from planner.api import run as run
    from planner.api import sweep as sweep
    from planner.api import timeline as timeline
    from planner.api import trace as trace
    from planner.api import validate as validate
    from planner.api import verify as verify
    from planner.errors import PlannerError as PlannerError
    from planner.spec.estimate import Estimate as Estimate
    from planner.spec.graph import Graph as Graph
    from planner.spec.hardware import HardwareProfile as HardwareProfile
    from planner.spec.model import ModelSpec as ModelSpec
    from planner.spec.plan import Plan as Plan
    from planner.spec.plan import load_plan as load_plan

__version__ = "0.1.0"

_HOMES = {
    "PlannerError": "planner.errors",
    "Graph": "planner.spec.graph",
    "ModelSpec": "planner.spec.model",
    "Plan": "planner.spec.plan",
    "Estimate": "planner.spec.estimate",
    "load_plan": "planner.spec.plan",
    "HardwareProfile": "planner.spec.hardware",
    "attention_seconds": "planner.api",
    "collective_seconds": "planner.api",
    "compare": "planner.api",
    "estimate": "planner.api",
    "explain": "planner.api",
    "explain_plan": "planner.api",
    "gemm_seconds": "planner.api",
    "list_hardware": "planner.api",
    "load_hardware": "planner.api",
    "list_models": "planner.api",
    "load_model": "planner.api",
    "parallelize": "planner.api",
    "plan": "planner.api",
    "profile": "planner.api",
    "run": "planner.api",
    "sweep": "planner.api",
    "timeline": "planner.api",
    "trace": "planner.api",
    "validate": "planner.api",
    "verify": "planner.api",
}

__all__ = sorted([*_HOMES, "__version__"])


class _Package(types.ModuleType):
    """Two rooms bear the name of a verb (`planner.trace`, `planner.export`): as an attribute the verb wins.

    The import system binds a subpackage to its parent under its name; that binding is left out for those two.
    `from planner.trace.tracer import …` goes through `sys.modules` and works all the same.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # a checker that saw this would take every name for a public one

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'planner' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
