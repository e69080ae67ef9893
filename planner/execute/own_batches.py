"""What a user's own module is called with and what it returns: an example's shapes, microbatches, a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.cut import tensors_in
from planner.execute.mesh import Meshes
from planner.models.user_module import Example
from planner.spec.workload import TrainWorkload

NEXT = "next_tokens"  # in a batch of a module that returns scores: what its loss compares them with


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a module computes in: the dtype of its first weight that is no integer."""
    found = (weight.dtype for weight in module.parameters() if weight.is_floating_point())
    return next(found, torch.get_default_dtype())


def meta_inputs(example: Example | None, rows: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """What so many sequences give the module, shapes alone."""
    if example is None:
        raise PlannerError(
            "to cut a module of one's own takes an example of what it is called with",
            value="none",
            remedy="pass example to parallelize: example(batch, seq_len) gives the module's keyword arguments",
            key="example",
        )
    with torch.device("meta"):
        given = example(rows, length)

    def shape_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to("meta", dtype if value.is_floating_point() else None)

    return {key: shape_of(value) for key, value in given.items()}


def microbatches_by_name(
    batch: Any, workload: TrainWorkload, meshes: Meshes, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Rows of every tensor of the batch: what the module takes by name."""
    strategy = meshes.strategy
    rows = workload.global_batch // strategy.dp
    if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
        raise PlannerError(
            "a batch holds the arguments of the module by name",
            value=type(batch).__name__,
            remedy="give a dict, as the example of the model's file returns",
            key="batch",
        )
    nested = nested_in(batch)
    if nested:
        raise PlannerError(
            "a batch holds its tensors by name, none of them inside of another value",
            value=nested,
            remedy="give each tensor a name of its own, so that its rows can be dealt out",
            key="batch",
        )
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:1] != (rows,):
            raise PlannerError(
                f"each tensor of a batch has global_batch/dp = {rows} rows",
                value=f"{key} {list(value.shape)}",
                remedy="give each rank its own sequences",
                key="batch",
            )
    for start in range(0, rows, strategy.microbatch):
        own = slice(start, start + strategy.microbatch)
        yield {
            key: value[own].to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }


def nested_in(given: Mapping[str, Any]) -> str:
    """The first value that has tensors inside, by name and type; empty where there is none."""
    for key, value in given.items():
        if not isinstance(value, Tensor) and next(tensors_in(value), None) is not None:
            return f"{key}: {type(value).__name__}"
    return ""


def with_its_arguments(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is given a whole batch, of which it takes its arguments; with `**`, all that are not ours."""
    taken = inspect.signature(forward).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())

    def run(*args: Any, **kwargs: Any) -> Any:
        fitting = (key for key in kwargs if key in taken or (takes_all and key != NEXT))
        return forward(*args, **{key: kwargs[key] for key in fitting})

    return run


def loss_in(out: Any) -> Tensor | None:
    """The loss among what a module returns: the one number; of a dict what is called so."""
    if isinstance(out, Tensor):
        return out if out.numel() == 1 else None
    if isinstance(out, Mapping) and isinstance(out.get("loss"), Tensor):
        return loss_in(out["loss"])
    numbers = [x for x in tensors_in(out) if x.dim() == 0 and x.is_floating_point()]
    return numbers[0] if len(numbers) == 1 else None


def own_loss(out: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The module's own loss, a mean over its labels or, without any, over its rows; as a sum."""
    loss = loss_in(out)
    if loss is None:
        raise PlannerError(
            "without a loss function the module returns its loss, one number",
            value=f"{type(out).__name__} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__,
            remedy="pass loss_fn(output, batch) → (sum, count) to parallelize",
            key="loss_fn",
        )
    labels = batch.get("labels", batch.get("targets"))
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        count: Any = (labels >= 0).sum()  # whichever of the others stands for those that do not count
    else:
        count = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
    total = loss.reshape(()) * count
    counts = torch.as_tensor(count, device=total.device) > 0
    return torch.where(counts, total, torch.zeros_like(total)), count  # a mean over no label is no number
