"""The optimizer of a run, on what each rank holds: plain tensors that share memory with split and sharded weights.

So one kernel updates all of them, whatever mesh they are spread over, and no moment is larger than its shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from planner.execute.parameters import local
from planner.execute.phases import phase
from planner.spec.training_run import TrainingRun
from planner.spec.workload import Optimizer

_MOMENTS: dict[Optimizer, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


class LocalOptimizer:
    """AdamW or plain SGD of what is trained. Norms and biases do not decay."""

    def __init__(self, kind: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]], module: nn.Module,
                 run: TrainingRun) -> None:  # fmt: skip
        self.kind = kind
        self._parameters = {path: value for path, value in parameters if value.requires_grad}
        self._held = {path: nn.Parameter(local(value.detach())) for path, value in self._parameters.items()}
        decayed = [held for path, held in self._held.items() if decays(module, path)]
        others = [held for path, held in self._held.items() if not decays(module, path)]
        groups = [
            {"params": held, "weight_decay": decay}
            for held, decay in ((decayed, run.weight_decay), (others, 0.0))
            if held
        ]
        self._optimizer: torch.optim.Optimizer | None = None
        if not groups:  # a stage may have no layers
            return
        if kind == "sgd":
            self._optimizer = torch.optim.SGD(groups, lr=run.lr)
        else:
            self._optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(run.beta1, run.beta2), fused=True)

    def step(self, rate: float) -> None:
        """Update the weights by their gradients, at a learning rate."""
        if self._optimizer is None:
            return
        for path, held in self._held.items():
            grad = self._parameters[path].grad
            held.grad = None if grad is None else local(grad)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with phase("optimizer"):
            self._optimizer.step()
        for held in self._held.values():
            held.grad = None

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """By name of the moment and path, what this rank keeps; zeros before the first step."""
        found: dict[str, dict[str, Tensor]] = {name: {} for name in _MOMENTS[self.kind]}
        for path, held in self._held.items():
            for name in found:
                found[name][path] = self._state(held)[name]
        return found

    def resume_at(self, step: int) -> None:
        """So many steps are done: what AdamW's correction of its young moments reads."""
        if self.kind == "adamw":
            for held in self._held.values():
                self._state(held)["step"].fill_(step)

    def state(self) -> list[Tensor]:
        """Everything kept between steps: moments and step counts."""
        states = self._optimizer.state.values() if self._optimizer is not None else ()
        return [value for state in states for value in state.values()]

    def _state(self, held: nn.Parameter) -> dict[str, Tensor]:
        assert self._optimizer is not None, "what is held is optimized"
        state: dict[str, Tensor] = self._optimizer.state[held]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=held.device)
            state |= {name: torch.zeros_like(held.detach()) for name in _MOMENTS[self.kind]}
        return state


def decays(module: nn.Module, path: str) -> bool:
    """Whether weight decay acts on a parameter: matrices and tables, no norms, no biases."""
    parent, _, name = path.rpartition(".")
    owner, value = module.get_submodule(parent), module.get_parameter(path)
    return not ("bias" in name or "Norm" in type(owner).__name__ or value.dim() < 2)


def learning_rate(run: TrainingRun, step: int) -> float:
    """lr·t/warmup, then min_lr + (lr − min_lr)·(1 + cos πx)/2 with x from 0 to 1 at the last step."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    behind = max(1, run.steps - 1 - run.warmup)
    share = min(1.0, (step - run.warmup) / behind)
    return run.min_lr + (run.lr - run.min_lr) * (1 + math.cos(math.pi * share)) / 2
