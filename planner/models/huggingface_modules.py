"""Modules of Hugging Face that run as ours do: the same weights at the same paths, our kernels around them.

A module takes a class of ours in front of its own. What that class reads by our names are further names of the
module's own parts, which no path shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from planner.models.attention import Attention, Core
from planner.models.feedforward import Activation, Experts, MixtureOfExperts, Router
from planner.models.kernels import grouped_matmul
from planner.models.positions import NO_POSITIONS, Positions
from planner.spec.model import ModelSpec


class TransposedLinear(nn.Module):
    """A linear layer whose weight is stored [in, out], as a Conv1D of GPT-2."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.mT, self.bias)


class HuggingFaceAttention(Attention):
    """Attention that is called, and answers, as theirs. `fused` gives query, key and value at once."""

    fused: nn.Module | None
    shares: Sequence[int]  # of the heads in what the fused layer gives
    dropped: nn.Module | None

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_embeddings: Positions = NO_POSITIONS, **_: Any
    ) -> tuple[Tensor, None]:
        out = super().forward(hidden_states, position_embeddings)
        return out if self.dropped is None else self.dropped(out), None

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused is None:
            return super().project(x, source)
        every: Tensor = self.fused(x)
        unit = every.shape[-1] // sum(self.shares)
        q, k, v = every.split([share * unit for share in self.shares], -1)
        return self._heads(q), self._heads(k), self._heads(v)


class HuggingFaceExperts(Experts):
    """Experts stored as [experts, gate and up, in] and [experts, out, inner]."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def forward(self, rows: Tensor, expert: Tensor, counts: Tensor) -> Tensor:
        gate, up = grouped_matmul(rows, self.gate_up_proj.mT, counts).chunk(2, -1)
        out: Tensor = grouped_matmul(self.activation(up, gate), self.down_proj.mT, counts)
        return out


def adopt_linear(module: nn.Module) -> None:
    """A Conv1D."""
    _adopt(module, TransposedLinear)


def adopt_attention(module: nn.Module, spec: ModelSpec, window: int, parts: dict[str, nn.Module]) -> None:
    """Attention whose parts are given by our names, `fused` for three in one and `dropped` for what follows."""
    absent: dict[str, Any] = dict.fromkeys(("fused", "dropped", "query_norm", "key_norm"))
    sizes = {
        "head_dim": spec.head_dim,
        "rope_interleaved": spec.rope.interleaved,
        "shares": (spec.heads, spec.kv_heads, spec.kv_heads),
    }
    _adopt(module, HuggingFaceAttention, **absent | sizes | parts)
    module.core = Core(spec, causal=True, window=window)


def adopt_experts(mixture: nn.Module, router: nn.Module, experts: nn.Module, spec: ModelSpec) -> None:
    """A mixture with its router and its experts."""
    moe = spec.moe
    _adopt(mixture, MixtureOfExperts, moe=moe, router=router, experts=experts, shared=None, shared_gate=None)
    _adopt(router, Router, moe=moe, bias=None)
    _adopt(experts, HuggingFaceExperts, gate=None)
    experts.__dict__["activation"] = Activation(spec)


def _adopt(module: nn.Module, ours: type[nn.Module], **names: Any) -> None:
    theirs = type(module)
    module.__class__ = type(theirs.__name__, (ours, theirs), {"__module__": theirs.__module__})
    module.__dict__.update(names)  # not through nn.Module, which would show these parts at a second path
