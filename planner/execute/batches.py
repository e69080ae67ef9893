"""A step's batch as this rank's microbatches: sequences by microbatch, tokens by context-parallel rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from planner.errors import PlannerError
from planner.execute.context import own_tokens
from planner.execute.loss import IGNORED
from planner.execute.mesh import Meshes
from planner.execute.step import Microbatch
from planner.spec.workload import TrainWorkload

_FORMS = "give a dict with tokens (or input_ids) and labels, or a pair (tokens, labels)"


def microbatches_of(
    batch: Any, workload: TrainWorkload, meshes: Meshes, device: torch.device, *, shifts: bool = False
) -> list[Microbatch]:
    """`batch` is what this dp rank reads; its tp, cp and pp peers have the same.

    A microbatch keeps its part of the batch in the form in which it was given: a loss function reads it. With
    `shifts` the label of a token is what the next one is labelled with.
    """
    strategy = meshes.strategy
    tokens, labels = _read(batch)
    _require_shape(tokens, (workload.global_batch // strategy.dp, workload.seq_len), "tokens")
    if labels is not None:
        _require_shape(labels, tuple(tokens.shape), "labels")

    if isinstance(batch, Mapping):
        require_no_left_padding(batch.get("attention_mask"))
    following = _shifted(labels) if shifts and labels is not None else labels

    def own(value: Any, rows: slice) -> Any:
        if not isinstance(value, Tensor) or value.shape[:1] != tokens.shape[:1]:
            return value
        part = value[rows].to(device, non_blocking=True)
        return own_tokens(part, meshes.cp) if part.shape[1:2] == tokens.shape[1:2] else part

    found = []
    for start in range(0, tokens.shape[0], strategy.microbatch):
        rows = slice(start, start + strategy.microbatch)
        if isinstance(batch, Mapping):
            part: Any = {key: own(value, rows) for key, value in batch.items()}
        else:
            part = tuple(own(value, rows) for value in batch)
        x, _ = _read(part)
        own_labels = own(following, rows)
        found.append(Microbatch(x=x, labels=own_labels, length=workload.seq_len // strategy.cp, batch=part))
    return found


def _read(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Mapping):
        tokens, labels = batch.get("tokens", batch.get("input_ids")), batch.get("labels")
    elif isinstance(batch, Sequence) and len(batch) == 2:
        tokens, labels = batch
    else:
        raise PlannerError("a batch has tokens and labels", value=type(batch).__name__, remedy=_FORMS, key="batch")
    if not isinstance(tokens, Tensor) or not isinstance(labels, Tensor | None):
        raise PlannerError("tokens and labels are tensors", value=_kinds(batch), remedy=_FORMS, key="batch")
    return tokens, labels


def _shifted(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def require_no_left_padding(mask: Any) -> None:
    """Attention is causal and no more: what is padded on the right is seen by padding only."""
    if isinstance(mask, Tensor) and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise PlannerError(
            "sequences are padded on the right",
            value="an attention_mask that starts with zeros, or has gaps",
            remedy="pad on the right, with labels of -100 there",
            key="batch",
        )


def _kinds(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {type(value).__name__}" for key, value in batch.items())
    return ", ".join(type(value).__name__ for value in batch)


def _require_shape(given: Tensor, wanted: tuple[int, ...], name: str) -> None:
    if tuple(given.shape) != wanted:
        raise PlannerError(
            f"{name} of one dp rank are global_batch/dp sequences of seq_len: {list(wanted)}",
            value=list(given.shape),
            remedy="give each dp rank its own sequences, whole, and the same to its tp, cp and pp peers",
            key="batch",
        )
