"""Kernels of a GPU for a run without values: what they keep and allocate, whatever this machine would run.

On a CPU attention with a window or a mask, RMS norm and dropout are written out or keep more than their fused
kernels do, so a dry run there would count memory that a GPU never needs.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from planner.execute.parameters import replaced
from planner.models import kernels
from planner.models.norms import RMSNorm, wide


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Attention, RMS norm and dropout keep what their fused kernels keep. Values are not computed."""
    with (
        replaced(F, "scaled_dot_product_attention", _of_parts(_attention, "scaled_dot_product_attention")),
        replaced(kernels, "attention", _special_attention),
        replaced(RMSNorm, "forward", _rms_norm),
        replaced(F, "rms_norm", _of_parts(_rms_norm_of_torch, "rms_norm")),
        replaced(F, "dropout", _of_parts(_dropout, "dropout")),
    ):
        yield


@torch.library.custom_op("planner::fused_attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What flash attention gives, without values: one operator, as recomputation sees it."""
    raise NotImplementedError("shapes only")


@fused_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # written in the layout of q: [b, s, h, d] behind a transpose, which the next product reads as it is
    out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=wide(q[:0]).dtype)


class _Attention(torch.autograd.Function):
    """Flash attention keeps q, k, v, its output and one log-sum per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        out: Tensor
        out, log_sums = fused_attention(q, k, v)
        ctx.save_for_backward(q, k, v, sinks, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, _, _ = ctx.saved_tensors
        to_sinks = torch.empty_like(sinks) if ctx.needs_input_grad[3] else None
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), to_sinks


def _of_parts(stand_in: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A stand-in that tensors with rules of their own know by the name of what it stands for."""

    @functools.wraps(stand_in)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(run, given, *args, **kwargs)
        return stand_in(*args, **kwargs)

    run.__name__ = name
    return run


def _attention(q: Any, k: Any, v: Any, attn_mask: Any = None, *_: Any, **__: Any) -> Any:
    return _Attention.apply(q, k, v, attn_mask)


def _special_attention(q: Any, k: Any, v: Any, slopes: Any, sinks: Any, *_: Any) -> Any:
    return _Attention.apply(q, k, v, sinks), None


class _RmsNorm(torch.autograd.Function):
    """Keeps the input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=wide(x[:0]).dtype))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def _rms_norm(norm: RMSNorm, x: Tensor) -> Any:
    return _RmsNorm.apply(x, norm.weight + 1.0 if norm.unit_offset else norm.weight)


def _rms_norm_of_torch(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
    return _RmsNorm.apply(x, weight)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """One byte per element is kept."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x
