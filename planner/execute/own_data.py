"""What a user's own module reads in a run: tokens by the names of its arguments, or numbers made up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from planner.errors import PlannerError
from planner.execute.data import TrainingData, open_data
from planner.execute.order import mixed
from planner.execute.own_arguments import Arguments
from planner.execute.own_batches import NEXT
from planner.spec.training_run import SYNTHETIC, TrainingRun


class OwnData(Protocol):
    """What a run reads, under the names of a module's arguments."""

    @property
    def told(self) -> str:
        """What it is."""
        ...

    def rows(self, first: int, count: int, device: torch.device) -> dict[str, Tensor]:
        """What follows from the data among the arguments, of the sequences from a place of the run on."""
        ...


def open_own_data(run: TrainingRun, arguments: Arguments, length: int) -> OwnData:
    """The data of a run, or a PlannerError that says why it does not fit the module."""
    if arguments.tokens:
        data = open_data(run, vocab=arguments.vocab, length=length)
        return _Tokens(data=data, arguments=arguments)
    if run.data != SYNTHETIC:
        raise PlannerError(
            "data of tokens goes to a module that takes tokens, integers [sequences, tokens]",
            value=", ".join(arguments.example),
            remedy=f"give --data {SYNTHETIC}, or call planner.parallelize(model, plan) in a script of your own",
            key="data",
        )
    return _MadeUp(arguments=arguments, seed=run.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """Tokens under the names of a module's arguments, and the next ones as it wants them."""

    data: TrainingData
    arguments: Arguments

    @property
    def told(self) -> str:
        """As bundled models read it."""
        return self.data.told

    def rows(self, first: int, count: int, device: torch.device) -> dict[str, Tensor]:
        """Labels are the next tokens, or the tokens themselves where the module shifts them."""
        tokens, following = self.data.batch(first, count, device)
        found = {self.arguments.tokens: tokens}
        if self.arguments.labels:
            found[self.arguments.labels] = tokens if self.arguments.shifts else following
        elif not self.arguments.returns_loss:
            found[NEXT] = following
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _MadeUp:
    """Numbers for a module that takes no tokens, by seed and place alone."""

    arguments: Arguments
    seed: int
    told: str = SYNTHETIC

    def rows(self, first: int, count: int, device: torch.device) -> dict[str, Tensor]:
        """Fractions are normal, integers below their bound."""
        each = [self._row(place) for place in range(first, first + count)]
        return {key: torch.cat([row[key] for row in each]).to(device) for key in self.arguments.drawn}

    def _row(self, place: int) -> dict[str, Tensor]:
        maker = np.random.default_rng(mixed(self.seed, place))
        row = {}
        for key in self.arguments.drawn:
            like, bound = self.arguments.example[key], self.arguments.bounds.get(key, 0)
            shape = tuple(like.shape)
            made = maker.normal(size=shape) if like.is_floating_point() else maker.integers(bound, size=shape)
            row[key] = torch.from_numpy(made).to(like.dtype)
        return row
