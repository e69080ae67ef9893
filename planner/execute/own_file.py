"""The file that a plan names for its model: `FILE.py:FUNCTION` makes a module, and says how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.models.user_module import Example, loaded
from planner.spec.plan import Plan
from planner.spec.sources import UserModule, named_function


def named_by(plan: Plan) -> UserModule | None:
    """The function of a file that a plan was made for; None where it names none that is here."""
    named = named_function(plan.model)
    if named is None or not Path(named[0]).is_file():
        return None
    return UserModule(path=Path(named[0]), function=named[1])


def example_of(plan: Plan) -> Example | None:
    """How the file that a plan names calls its module."""
    named = named_by(plan)
    if named is None:
        return None

    def example(batch: int, seq_len: int) -> Mapping[str, Any]:
        with loaded(named.path, named.function) as (_, given, _):
            return given(batch, seq_len)

    return example
