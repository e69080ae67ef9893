"""Blocks by torch.compile: what is compiled, what a plan must not ask for then, and what the machine needs.

A block is compiled with its splits and what it keeps selectively, before its state is sharded: hooks that gather
and reduce stand outside. Collectives are single operators (`moves.exchange`), so that a dense block is one graph,
and equal blocks share it. Rows that travel to experts break the graph: their number is known when they arrive.
"""

from __future__ import annotations

import datetime
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.distributed_c10d import _world

from planner.errors import PlannerError
from planner.spec.model import ModelSpec
from planner.spec.orders import in_two_parts
from planner.spec.plan import Plan

COMPILING_SECONDS = 3600.0  # that ranks wait while others compile: stages of a pipeline one after another
_DIFFERENT = 64  # graphs of one piece of code: a block's code runs in each of its forms, by layer


def compile_block(block: nn.Module, *, as_one_graph: bool = False) -> None:
    """Let torch.compile see a block's forward; hooks, path and class stay as they are.

    Sizes are the same at every microbatch, so none is a variable. `as_one_graph` refuses to run any of it eagerly.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _DIFFERENT)
    # prepared inputs are noted while a block runs, and forgotten when it ends: running it again needs no notes
    config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    block.forward = torch.compile(block.forward, dynamic=False, fullgraph=as_one_graph)


def require_compilable(plan: Plan, spec: ModelSpec | None) -> None:
    """Refuse what a compiled block cannot do. A module of one's own has no spec."""
    strategy = plan.strategy
    if in_two_parts(strategy.schedule, strategy.pp):
        raise PlannerError(
            "a compiled backward cannot be split in two as zb and zbv need",
            value=strategy.schedule,
            remedy="run without --compile, or plan with --fix schedule=interleaved",
            key="compile",
        )
    if spec is None:
        cut = [f"{axis} {getattr(strategy, axis)}" for axis in ("tp", "pp") if getattr(strategy, axis) > 1]
        if cut:  # parts of tensors are no plain ones, and layers of other stages hand on what they get
            raise PlannerError(
                "blocks of a module of one's own are compiled under dp alone",
                value=", ".join(cut),
                remedy="leave compile out, or plan with --fix tp=1,pp=1",
                key="compile",
            )
        return
    kept = [layer for layer in range(spec.layers) if plan.recompute_of(f"blocks.{layer}") == "selective"]
    reasons: Mapping[str, Callable[[int], bool]] = {
        "experts": spec.has_experts,
        "dropout of heads that tp ranks share": lambda _: bool(spec.attention_dropout) and strategy.tp > 1,
    }
    for reason, holds in reasons.items():
        for layer in filter(holds, kept):
            raise PlannerError(
                f"a compiled block with {reason} runs again whole or not at all: it is more than one graph",
                value=f"blocks.{layer}: selective",
                remedy="run without --compile, or plan with --fix recompute=full or recompute=none",
                key="compile",
            )


def require_compiler(device: str) -> None:
    """Refuse to start where the kernels that torch.compile writes could not be built. Takes a second or two."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # no public name says what torch would call

    missing = ""
    if device == "cuda":
        from torch.utils._triton import has_triton_package

        missing = "" if has_triton_package() else "no Triton"
    else:
        try:
            get_cpp_compiler()
        except Exception as error:  # its class is not public
            missing = str(error).strip().splitlines()[0]
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not missing and not header.is_file():
            missing = f"no {header}"
    if missing:
        raise PlannerError(
            "compiled blocks are built on this machine: on a CPU by a C++ compiler with Python's headers,"
            " on a GPU by Triton",
            value=missing,
            remedy="install it (CXX names another compiler), or run without --compile",
            key="compile",
        )


@contextmanager
def waiting_for_compilers() -> Iterator[None]:
    """Ranks wait long for one another: they compile at different speeds, and a stage while the others wait."""
    before = [(backend, backend.options._timeout) for backend in _backends()]
    wait_at_least(COMPILING_SECONDS)
    try:
        yield
    finally:
        for backend, usual in before:
            backend._set_default_timeout(usual)


def wait_at_least(seconds: float) -> None:
    """No group of this rank gives up sooner: torch makes those of NCCL for ten minutes, those of gloo for thirty.

    What gloo sends from one rank to another keeps to the timeout that its group was made with.
    """
    for backend in _backends():
        backend._set_default_timeout(max(backend.options._timeout, datetime.timedelta(seconds=seconds)))


def _backends() -> Iterator[Any]:
    """What carries the collectives of each group of this rank; torch sets their timeouts by these names itself."""
    for group in _world.pg_map:
        for device in group._device_types:
            backend = group._get_backend(device)
            if hasattr(backend, "_set_default_timeout"):
                yield backend
