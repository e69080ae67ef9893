"""What a rank of a test does in a ring: a turn of it, and steps whose keys and values go around."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from planner.execute import ring
from planner.execute.collectives import CollectiveCounter, CountedCollective
from planner.execute.context import own_positions
from planner.execute.mesh import Peers
from planner.execute.parameters import replaced
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from tests.execute import huggingface_runs, runs

SCALE = 0.3


class Turns(TorchDispatchMode):
    """Counts the turns of a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def told(self) -> tuple[int, int]:
        """Forward and backward."""
        return self.counts["planner::ring_attention"], self.counts["planner::ring_attention_backward"]


@contextmanager
def in_ring() -> Iterator[Turns]:
    """Runners pass keys and values around."""
    with ExitStack() as stack:
        for user in (runs, huggingface_runs):
            passing = functools.partial(user.parallelize, context="ring")
            stack.enter_context(replaced(user, "parallelize", passing))
        yield stack.enter_context(Turns())


def step_errors(cases: list[tuple[Plan, ModelSpec]]) -> list[tuple[dict[str, float], tuple[int, int]]]:
    """Of each case the errors, and how many turns there were."""
    found = []
    for plan, spec in cases:
        with in_ring() as turns:
            found.append((runs.run_errors(plan, spec), turns.told))
    return found


def wrong_with_theirs(cases: list[Any]) -> tuple[list[str], tuple[int, int]]:
    """What went wrong with modules of Hugging Face, and how many turns there were."""
    with in_ring() as turns:
        return huggingface_runs.run_cases(cases, dist.get_world_size()), turns.told


def turn_errors(heads: int, kv_heads: int, width: int, value_width: int) -> dict[str, float]:
    """Largest errors of a turn and of its backward, with 4 tokens a rank."""
    peers, tokens = _world(), 4
    wholes = _drawn(heads, kv_heads, width, value_width, tokens * peers.size, torch.float64)
    mine = own_positions(tokens, peers)
    q, k, v, grad = (whole[:, :, mine] for whole in wholes)
    out, log_sums = ring.around(q, k, v, SCALE, peers.name)
    grads = ring.around_again(grad, q, k, v, out, log_sums, SCALE, peers.name)
    given = [whole.requires_grad_() for whole in wholes[:3]]
    wanted = F.scaled_dot_product_attention(*given, is_causal=True, scale=SCALE, enable_gqa=True)
    wanted.backward(wholes[3])
    pairs = {"out": (out, wanted.detach())}
    pairs |= {name: (own, x.grad) for name, own, x in zip("qkv", grads, given, strict=True)}
    return {name: float((own - whole[:, :, mine]).abs().max()) for name, (own, whole) in pairs.items()}


def sent(dtype: torch.dtype) -> tuple[tuple[CountedCollective, ...], tuple[CountedCollective, ...]]:
    """What a turn and its backward send: 3 sequences of 4 tokens, 2 heads of 8 keys and values."""
    peers = _world()
    q, k, v, grad = _drawn(4, 2, 8, 8, 4, dtype)
    with CollectiveCounter({peers.name: "cp"}) as forward:
        out, log_sums = ring.around(q, k, v, SCALE, peers.name)
    with CollectiveCounter({peers.name: "cp"}) as backward:
        ring.around_again(grad, q, k, v, out, log_sums, SCALE, peers.name)
    return forward.counted(), backward.counted()


def _world() -> Peers:
    group = dist.group.WORLD
    assert group is not None
    return Peers(group, dist.get_rank(), dist.get_world_size(), group.group_name)


def _drawn(
    heads: int, kv_heads: int, width: int, value_width: int, tokens: int, dtype: torch.dtype
) -> list[Tensor]:
    """Queries, keys, values and a gradient of whole sequences, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width))
    return [
        torch.randn(3, tokens, count, each, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for count, each in shapes
    ]


def refusal(plan: Plan, spec: ModelSpec) -> tuple[str, str]:
    """Rule and value of the error that building a runner ends in."""
    with replaced(runs, "build_runner", functools.partial(runs.build_runner, context="ring")):
        return runs.refusal(plan, spec)
