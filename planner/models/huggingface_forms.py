"""How Hugging Face stores what we keep apart or the other way round, and back again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Form:
    """One of their tensors as some of ours, and the inverse. Where it can be, what is split is a view."""

    split: Callable[[Tensor, ModelSpec], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], ModelSpec], Tensor]


def _as_it_is(x: Tensor, spec: ModelSpec) -> list[Tensor]:
    return [x]


def _alone(parts: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    (part,) = parts
    return part


def _transposed(x: Tensor, spec: ModelSpec) -> list[Tensor]:
    return [x.mT if x.ndim > 1 else x]


def _transposed_back(parts: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    return _transposed(_alone(parts, spec), spec)[0]


def _stacked_qkv(x: Tensor, spec: ModelSpec) -> Sequence[Tensor]:
    return x.split([heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)])


def _stack(parts: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    return torch.cat(tuple(parts))


def _transposed_qkv(x: Tensor, spec: ModelSpec) -> Sequence[Tensor]:
    return _stacked_qkv(_transposed(x, spec)[0], spec)


def _transposed_qkv_back(parts: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    return _transposed(_stack(parts, spec), spec)[0]


def _grouped_qkv(x: Tensor, spec: ModelSpec) -> list[Tensor]:
    groups = x.unflatten(0, (spec.kv_heads, spec.heads // spec.kv_heads + 2, spec.head_dim))
    return [part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]


def _grouped_back(parts: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    heads = [part.unflatten(0, (spec.kv_heads, -1, spec.head_dim)) for part in parts]
    return torch.cat(heads, 1).flatten(0, 2)


def _halves(x: Tensor, spec: ModelSpec) -> Sequence[Tensor]:
    return x.chunk(2)


def _expert_halves(x: Tensor, spec: ModelSpec) -> Sequence[Tensor]:
    return x.mT.chunk(2, -1)


def _expert_halves_back(parts: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    return torch.cat(tuple(parts), -1).mT


def _alternating(x: Tensor, spec: ModelSpec) -> list[Tensor]:
    return [x[..., 0::2], x[..., 1::2]]


def _alternating_back(parts: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    return torch.stack(tuple(parts), -1).flatten(-2)


AS_IT_IS = Form(_as_it_is, _alone)
TRANSPOSED = Form(_transposed, _transposed_back)  # matrices stored the other way round
STACKED_QKV = Form(_stacked_qkv, _stack)  # all queries, then all keys, then all values
TRANSPOSED_QKV = Form(_transposed_qkv, _transposed_qkv_back)  # GPT-2: the same, as a Conv1D
GROUPED_QKV = Form(_grouped_qkv, _grouped_back)  # group by group: its query heads, its key head, its value head
HALVES = Form(_halves, _stack)  # gate on top of up
EXPERT_HALVES = Form(_expert_halves, _expert_halves_back)  # experts as [experts, gate and up, in]
ALTERNATING = Form(_alternating, _alternating_back)  # gpt-oss: gate and up take turns in the last dim
