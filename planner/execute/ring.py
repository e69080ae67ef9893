"""Context parallelism whose keys and values travel: torch's ring attention, as operators of our own.

A rank computes attention over the keys that are with it while those of the rank before it arrive: it holds its own
and those that come by, never all. Backward sends keys around once more, their gradients one hop behind. The chunks
of a rank (`context`) are those by which torch balances causal work: one from either end of the sequence.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

# The public `context_parallel` replaces F.scaled_dot_product_attention for a whole process, and raises on a CPU.
# What stands under it takes any kernel that tells the logarithms of its sums.
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

from planner.errors import PlannerError
from planner.execute.mesh import Peers
from planner.spec.codec import nearest
from planner.spec.model import ModelSpec
from planner.spec.strategy import Strategy
from planner.spec.workload import Context

_SEQUENCE = 2  # dim of [b, h, s, d]
_ALIGNED = 8  # flash kernels of a GPU take heads whose width is a multiple
_REMEDY = "run with --context gather, which has every kind of attention"

aten = torch.ops.aten


def attention_in_ring(q: Tensor, k: Tensor, v: Tensor, scale: float, peers: Peers) -> Tensor:
    """Causal attention of this rank's q [b, h, s, d] over k, v [b, g, s, d] of all ranks → [b, h, s, d of v]."""
    out: Tensor = ring_attention(q, k, v, scale, peers.name)[0]
    return out


def require_context(context: Context, spec: ModelSpec, strategy: Strategy, length: int) -> None:
    """Refuse a word that means nothing, and for a ring the attention that torch's does not compute."""
    words = get_args(Context)
    if context not in words:
        raise PlannerError(
            f"one of {', '.join(words)} is needed",
            value=context,
            remedy=nearest(str(context), words),
            key="context",
        )
    if context == "gather" or strategy.cp == 1:
        return
    hiding = (window for window in map(spec.window_of, range(spec.layers)) if 0 < window < length)
    window = next(hiding, 0)
    for lacks, key, value, unfit in (
        ("scores written out", "attention", spec.attention, spec.attention != "flash"),
        ("windows", "sliding_window", window, window),
        ("soft caps", "attention_softcap", spec.attention_softcap, spec.attention_softcap),
        ("sinks", "attention_sinks", spec.attention_sinks, spec.attention_sinks),
        ("slopes", "positions", spec.positions, spec.positions == "alibi"),
        ("dropout", "attention_dropout", spec.attention_dropout, spec.attention_dropout),
    ):
        if unfit:
            raise PlannerError(
                f"torch's ring attention has no {lacks}", value=f"{key} {value}", remedy=_REMEDY, key="context"
            )


def require_ring_kernel(context: Context, strategy: Strategy, precision: str, device: str) -> None:
    """Refuse what the flash kernels of a GPU do not compute; that of a CPU computes in every precision."""
    in_ring = context == "ring" and strategy.cp > 1
    if in_ring and device != "cpu" and precision not in ("bf16", "fp16"):
        raise PlannerError(
            "on a GPU torch's ring attention runs flash kernels, which compute in bf16 or fp16",
            value=precision,
            remedy=f"plan with --precision bf16, or {_REMEDY}",
            key="context",
        )


@torch.library.custom_op("planner::ring_attention", mutates_args=())
def ring_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, group: str) -> tuple[Tensor, Tensor]:
    """What a rank's queries get, and the logarithm of each row's sum: one operator, kept or compiled whole."""
    out, log_sums = around(q, k, v, scale, group)
    return out.transpose(1, 2).contiguous().transpose(1, 2), log_sums.contiguous()


@ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, group: str) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((batch, heads, length), dtype=exact)


@torch.library.custom_op("planner::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, scale: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's queries, keys and values."""
    to_q, to_k, to_v = around_again(grad, q, k, v, out, log_sums, scale, group)
    return to_q.contiguous(), to_k.clone(), to_v.clone()  # the last two arrived in one message


@ring_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, scale: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.group = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *ring_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.group), None, None


ring_attention.register_autograd(_backward, setup_context=_keep)


def around(q: Tensor, k: Tensor, v: Tensor, scale: float, group: str) -> tuple[Tensor, Tensor]:
    """A turn of the ring: each rank's queries over the keys that come by."""
    with _options(q.dtype):
        out, log_sums = torch_ring._templated_ring_attention(
            _resolve_process_group(group),  # type: ignore[arg-type]  # as torch's own collectives do with names
            _SEQUENCE,
            _over_piece,  # type: ignore[arg-type]  # it takes no keyword but those below
            query=q,
            key=k,
            value=v,
            is_causal=True,
            scale=scale,
        )
    return out, log_sums


def around_again(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, scale: float, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The turn of backward."""
    with _options(q.dtype):
        to_q, to_k, to_v = torch_ring._templated_ring_attention_backward(
            _resolve_process_group(group),  # type: ignore[arg-type]
            _SEQUENCE,
            _over_piece_backward,  # type: ignore[arg-type]
            grad_out=grad,
            grad_out_name="grad",
            query=q,
            key=k,
            value=v,
            out=out,
            logsumexp=log_sums,
            is_causal=True,
            scale=scale,
        )
    return to_q, to_k, to_v


@contextmanager
def _options(dtype: torch.dtype) -> Iterator[None]:
    """Torch's options, which are those of the process, as our chunks and a ring need them."""
    options = torch_ring._cp_options
    ours = {
        "convert_to_f32": dtype != torch.float64,  # what is summed over ranks
        "enable_load_balance": True,
        "rotate_method": torch_ring._RotateMethod.ALL_TO_ALL,
    }
    before = {name: getattr(options, name) for name in ours}
    vars(options).update(ours)
    try:
        yield
    finally:
        vars(options).update(before)


def _over_piece(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the keys at hand. Flash kernels take fewer heads of keys than of queries as they are."""
    q, k, v = _of_one_width(query, key, value)
    if q.is_cuda:
        out, log_sums, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
    else:
        out, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    return out.narrow(-1, 0, value.shape[-1]), log_sums


def _over_piece_backward(
    *,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, grad = _of_one_width(query, key, value, out, grad)
    if q.is_cuda:
        seed, offset = (q.new_empty(size, dtype=torch.uint64) for size in ((2,), ()))  # of dropout: not read
        to_q, to_k, to_v = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, logsumexp, None, None, q.shape[2], k.shape[2], 0.0, is_causal, seed, offset,
            scale=scale,
        )  # fmt: skip
    else:
        to_q, to_k, to_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, logsumexp, 0.0, is_causal, scale=scale
        )
    depth = query.shape[-1]
    return to_q.narrow(-1, 0, depth), to_k.narrow(-1, 0, depth), to_v.narrow(-1, 0, value.shape[-1])


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    """Heads filled up with zeros, which change no score, to the width that a flash kernel takes.

    It takes one: latent attention's values are narrower than its keys. The zeros do not travel.
    """
    widest = max(x.shape[-1] for x in tensors)
    width = widest + -widest % _ALIGNED
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]
