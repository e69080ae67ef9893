"""What a rank of a test does with compiled blocks: a step, how it differs, and how many graphs it took."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from planner.execute import runner
from planner.execute.compiled import waiting_for_compilers
from planner.execute.parameters import replaced
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from tests.execute import huggingface_runs, own_runs, runs

Errors = tuple[dict[str, float], int, int]


@contextmanager
def compiled(**keys: Any) -> Iterator[Any]:
    """Runners compile their blocks: traced, differentiated and cut in two, but not made into machine code.

    `keys` are further ones of `parallelize`.
    """
    counters: Any = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    traced = functools.partial(torch.compile, backend="aot_eager")
    compiling = functools.partial(runner.parallelize, compile=True, **keys)
    with ExitStack() as stack:
        stack.enter_context(replaced(torch, "compile", traced))
        for user in (runs, own_runs, huggingface_runs):
            stack.enter_context(replaced(user, "parallelize", compiling))
        yield counters


def step_errors(cases: list[tuple[Plan, ModelSpec]], **keys: Any) -> list[Errors]:
    """Of each case the errors, how many graphs there were, and how often one broke."""
    found = []
    for plan, spec in cases:
        with compiled(**keys) as counters:
            errors = runs.run_errors(plan, spec)
            found.append((errors, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    return found


def wrong_with_others(own: list[Any], theirs: list[Any]) -> tuple[list[str], int]:
    """What went wrong with modules of a user's and of Hugging Face, and how many graphs there were."""
    with compiled() as counters:
        wrong = own_runs.run_cases(own) + huggingface_runs.run_cases(theirs, dist.get_world_size())
        return wrong, counters["stats"]["unique_graphs"]


def timeouts() -> list[list[float]]:
    """Seconds that the groups of a rank wait before, while and after blocks are compiled."""
    dist.new_group([0])

    def now() -> list[float]:
        backends = [group._get_backend(torch.device("cpu")) for group in _world.pg_map]
        return [backend.options._timeout.total_seconds() for backend in backends[-1:]]

    before = now()
    with waiting_for_compilers():
        during = now()
    return [before, during, now()]
