"""Which part of a block is computed again in backward instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from planner.execute.compiled import compile_block
from planner.execute.kept import attention_core, compiled_contexts, selective_contexts
from planner.execute.parameters import replace_forward
from planner.execute.phases import phase
from planner.execute.stage import Stage
from planner.models.attention import Core
from planner.models.feedforward import Experts, Router
from planner.models.huggingface_modules import TransposedLinear
from planner.spec.model import ModelSpec
from planner.spec.strategy import Recompute

Forward = Callable[..., Any]


def recompute_blocks(stage: Stage, choices: dict[str, Recompute], *, compiled: bool = False) -> None:
    """`full` keeps a block's input alone.

    `selective` keeps the results of attention, of every second product (the first, the third, …) and of sums
    over ranks as well. `choices` are by layer number. The wrapped forward keeps class, path and parameter names.
    With `compiled` blocks are compiled on the way: the compiler has to see what is kept selectively, but need not
    know that a block runs again as a whole.
    """
    drops = bool(stage.spec.dropout or stage.spec.attention_dropout)
    for layer, block in stage.blocks.items():
        choice = choices.get(layer, "none")
        if choice == "selective" and compiled:
            replace_forward(block, partial(_checkpointed, same_dropout=drops, contexts=compiled_contexts))
        if compiled:
            compile_block(block, as_one_graph=choice == "selective")
        if choice == "full":
            replace_forward(block, partial(_checkpointed, same_dropout=drops, contexts=_nothing_kept))
        elif choice == "selective" and not compiled:
            for core in (module for module in block.modules() if isinstance(module, Core)):
                replace_forward(core, partial(_as_core, fused=core.fused))
            needs_last = needs_last_product(stage.spec, int(layer))
            kept = partial(selective_contexts, products_of(block), needs_last=needs_last)
            replace_forward(block, partial(_checkpointed, same_dropout=drops, contexts=kept))


def run_again(forward: Forward) -> Forward:
    """A block that keeps its input alone, whatever it drops."""
    return _checkpointed(forward, same_dropout=True, contexts=_nothing_kept)


def products_of(block: nn.Module) -> int:
    """Products that a block's forward runs; an attention core written out has two."""
    count = 0
    for module in block.modules():
        if isinstance(module, (nn.Linear, TransposedLinear, Router)):
            count += 1
        elif isinstance(module, Experts):
            count += 2 if module.gate is None else 3
        elif isinstance(module, Core) and not module.fused:
            count += 2
    return count


def needs_last_product(spec: ModelSpec, layer: int) -> bool:
    """Whether backward reads the last product's result: a norm, a mask or a weight stands behind it."""
    in_sequence = spec.parallel_block == "off"
    if spec.dropout or spec.norm_position == "sandwich" or (in_sequence and spec.norm_position == "post"):
        return True
    moe = spec.moe if spec.has_experts(layer) else None
    return moe is not None and (not moe.shared_ffn or moe.shared_expert_gate)


def _checkpointed(forward: Forward, *, same_dropout: bool, contexts: Callable[[], Any]) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=same_dropout, context_fn=contexts, **kwargs
        )

    return run


def _nothing_kept() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first forward and around the one in backward."""
    return nullcontext(), phase("recompute")


def _as_core(forward: Forward, *, fused: bool) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        with attention_core(fused=fused):
            return forward(*args, **kwargs)

    return run
