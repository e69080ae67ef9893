"""Attention: multi-head, grouped or single key/value heads, causal, sliding, cross; fused or written out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.models import kernels
from planner.models.norms import make_norm
from planner.models.positions import NO_POSITIONS, Positions, rotate
from planner.spec.model import ModelSpec


@dataclass(slots=True)
class LayerCache:
    """Keys and values of the tokens that one layer has seen, [batch, kv heads, tokens, head dim]."""

    keys: Tensor
    values: Tensor

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember new tokens; return all."""
        self.keys = torch.cat((self.keys, keys), 2)
        self.values = torch.cat((self.values, values), 2)
        return self.keys, self.values


class Core(nn.Module):
    """softmax(q·kᵀ·scale + bias)·v, without weights but for the sinks. The tracer reads its attributes."""

    def __init__(self, spec: ModelSpec, *, causal: bool, window: int) -> None:
        super().__init__()
        self.is_causal = causal
        self.sliding_window = window
        self.fused = spec.attention == "flash"
        self.scale = spec.softmax_scale
        self.softcap = spec.attention_softcap
        self.dropout = spec.attention_dropout
        self.sinks = nn.Parameter(torch.zeros(spec.heads)) if spec.attention_sinks else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """q [b, h, s, d]; k, v [b, g, t, d] → [b, h, s, d of v]."""
        if not self.fused:
            return self._written_out(q, k, v, positions)
        causal = self.is_causal and positions.bias is None
        special = self.sliding_window or self.softcap or self.sinks is not None or positions.slopes is not None
        several_behind_a_cache = 1 < q.shape[2] != k.shape[2]
        if causal and (special or several_behind_a_cache):
            sinks = self.sinks
            out: Tensor = kernels.attention(
                q, k, v, positions.slopes, sinks, self.scale, self.sliding_window, self.softcap
            )[0]
            return out
        return F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=positions.bias,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal and q.shape[2] > 1,  # one new token sees every key of the cache
            scale=self.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )  # fmt: skip

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        """Scores, mask, softmax, dropout and product as separate kernels, as software before flash ran them."""
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        scores = torch.matmul(q * self.scale, k.transpose(-1, -2))
        if positions.slopes is not None:
            # softmax ignores what is equal along a row, so slope·(j − i) may be written slope·j
            scores = scores + positions.slopes.to(q.dtype)[:, None, None] * torch.arange(
                k.shape[2], device=q.device
            )
        if positions.bias is not None:
            scores = scores + positions.bias
        elif self.is_causal:
            scores = scores.masked_fill(_hidden(q.shape[2], k.shape[2], self.sliding_window, q.device), -1e4)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return torch.matmul(weights, v)


def _hidden(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (behind < 0) | (behind >= window) if window else behind < 0


class Attention(nn.Module):
    """Projections around the core. `heads` and `kv_heads` are those of this module: a shard has fewer."""

    def __init__(self, spec: ModelSpec, *, causal: bool = True, window: int = 0) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.rope_interleaved = spec.rope.interleaved
        self.query = nn.Linear(spec.hidden, spec.heads * spec.head_dim, bias=spec.qkv_bias)
        self.key = nn.Linear(spec.hidden, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.value = nn.Linear(spec.hidden, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.query_norm = make_norm(spec, spec.head_dim) if spec.qk_norm else None
        self.key_norm = make_norm(spec, spec.head_dim) if spec.qk_norm else None
        self.core = Core(spec, causal=causal, window=window)
        self.output = nn.Linear(spec.heads * spec.head_dim, spec.hidden, bias=spec.output_bias)

    def forward(
        self,
        x: Tensor,
        positions: Positions = NO_POSITIONS,
        *,
        memory: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Self-attention over x, or cross-attention from x to `memory`."""
        source = x if memory is None else memory
        q, k, v = self.project(x, source)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if positions.cos is not None and positions.sin is not None:
            q = rotate(q, positions.cos, positions.sin, self.rope_interleaved)
            k = rotate(k, positions.cos, positions.sin, self.rope_interleaved)
        if cache is not None:
            k, v = cache.extended(k, v)
        out: Tensor = self.output(self.core(q, k, v, positions).transpose(1, 2).flatten(2))
        return out

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of `source`, [b, s, heads, head dim]."""
        return self._heads(self.query(x)), self._heads(self.key(source)), self._heads(self.value(source))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): low-rank queries, one latent for keys and values."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.mla is not None
        mla = self.mla = spec.mla
        self.rope_interleaved = spec.rope.interleaved
        head = mla.nope_head_dim + mla.rope_head_dim
        if mla.query_rank:
            self.query_down: nn.Linear | None = nn.Linear(spec.hidden, mla.query_rank, bias=spec.qkv_bias)
            self.query_norm: nn.Module | None = make_norm(spec, mla.query_rank)
        else:
            self.query_down = self.query_norm = None
        self.query_up = nn.Linear(mla.query_rank or spec.hidden, spec.heads * head, bias=False)
        self.latent = nn.Linear(spec.hidden, mla.kv_rank + mla.rope_head_dim, bias=spec.qkv_bias)
        self.latent_norm = make_norm(spec, mla.kv_rank)
        self.expand = nn.Linear(mla.kv_rank, spec.heads * (mla.nope_head_dim + mla.value_head_dim), bias=False)
        self.core = Core(spec, causal=True, window=0)
        self.output = nn.Linear(spec.heads * mla.value_head_dim, spec.hidden, bias=spec.output_bias)

    def forward(
        self, x: Tensor, positions: Positions = NO_POSITIONS, *, cache: LayerCache | None = None
    ) -> Tensor:
        mla = self.mla
        assert positions.cos is not None
        assert positions.sin is not None
        if self.query_down is not None and self.query_norm is not None:
            q = self.query_up(self.query_norm(self.query_down(x)))
        else:
            q = self.query_up(x)
        q = q.unflatten(-1, (-1, mla.nope_head_dim + mla.rope_head_dim)).transpose(1, 2)
        latent, k_rope = self.latent(x).split((mla.kv_rank, mla.rope_head_dim), -1)
        expanded = self.expand(self.latent_norm(latent))
        expanded = expanded.unflatten(-1, (-1, mla.nope_head_dim + mla.value_head_dim)).transpose(1, 2)
        k_nope, v = expanded.split((mla.nope_head_dim, mla.value_head_dim), -1)
        q_nope, q_rope = q.split((mla.nope_head_dim, mla.rope_head_dim), -1)
        q_rope = rotate(q_rope, positions.cos, positions.sin, self.rope_interleaved)
        k_rope = rotate(k_rope[:, None], positions.cos, positions.sin, self.rope_interleaved)
        q = torch.cat((q_nope, q_rope), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), -1)
        if cache is not None:
            k, v = cache.extended(k, v)
        out: Tensor = self.output(self.core(q, k, v, positions).transpose(1, 2).flatten(2))
        return out
