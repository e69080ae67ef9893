"""Fitting the constants of a training step to published runs, each source weighing the same.

Minimised is the sum over sources of the mean over its rows of H(log(predicted/measured)), plus
RIDGE² · ((x − prior)/spread)² for each constant x. H is Huber's: errors beyond 8 % count linearly. RIDGE is
what the runs of one source leave open of a constant that stretches their steps one to one: twenty independent
rows, 9 % off each. A constant of which the rows say nothing stays at its prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from tests.bench.training_constants import CONSTANTS, NAMES, settings
from tests.bench.training_rows import TARGETS, Floats, Row, Values, note, priced

RIDGE = 0.09 / 20**0.5
HUBER = 0.08
LONGEST_STEP = 0.35  # of the distance between a constant's bounds
MOST_HALVINGS = 4
NUDGE = 0.02  # of that distance, for derivatives
ENOUGH = 2e-3  # by which share an iteration has to lower what is minimised, or the fit ends

PRIOR = np.array([constant.prior for constant in CONSTANTS])
SPREAD = np.array([constant.spread for constant in CONSTANTS])
LEAST = np.array([constant.least for constant in CONSTANTS])
MOST = np.array([constant.most for constant in CONSTANTS])


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where a fit stands: constants, the errors of the rows, and how these change with those."""

    values: Floats
    errors: Floats  # log(predicted/measured)
    slopes: Floats  # [row, constant]

    @property
    def named(self) -> dict[str, float]:
        """The constants by name."""
        return dict(zip(NAMES, self.values.tolist(), strict=True))


def predicted_seconds(rows: Sequence[Row], values: Values) -> Floats:
    """Steps with other constants."""
    return priced(rows, lambda row: settings(row, values))


def errors_of(rows: Sequence[Row], values: Floats) -> Floats:
    """Logarithms of predicted over measured."""
    predicted = predicted_seconds(rows, dict(zip(NAMES, values.tolist(), strict=True)))
    return np.log(predicted / np.array([row.seconds for row in rows]))


def slopes_of(rows: Sequence[Row], values: Floats, errors: Floats) -> Floats:
    """Differences of the errors, of the rows whose profile a constant changes."""
    found = np.zeros((len(rows), len(NAMES)))
    named = dict(zip(NAMES, values.tolist(), strict=True))
    for column, name in enumerate(NAMES):
        nudge = NUDGE * (MOST - LEAST)[column]
        nudge = nudge if values[column] + nudge <= MOST[column] else -nudge
        other = {**named, name: named[name] + nudge}
        places = [place for place, row in enumerate(rows) if settings(row, other) != settings(row, named)]
        if places:
            changed = values + nudge * (np.arange(len(values)) == column)
            found[places, column] = (errors_of([rows[i] for i in places], changed) - errors[places]) / nudge
    return found


def weights_of(rows: Sequence[Row], without: str = "") -> Floats:
    """Of each row's squared error; those of a source add up to one."""
    sources = np.array([row.run.source for row in rows])
    found = np.zeros(len(rows))
    for source in TARGETS:
        own = sources == source
        if own.any() and source != without:
            found[own] = 1.0 / own.sum()
    return found


def loss(values: Floats, errors: Floats, weights: Floats) -> float:
    """What is minimised."""
    size = np.abs(errors)
    huber = np.where(size < HUBER, size**2, 2.0 * HUBER * size - HUBER**2)
    return float(np.sum(weights * huber) + np.sum((RIDGE * (values - PRIOR) / SPREAD) ** 2))


def stepped(state: State, weights: Floats) -> Floats:
    """The best constants if errors were linear in them, no farther than a step may go."""
    span = MOST - LEAST
    rows = np.sqrt(weights * np.minimum(1.0, HUBER / np.maximum(np.abs(state.errors), 1e-9)))
    matrix = np.vstack([state.slopes * span * rows[:, None], np.diag(RIDGE * span / SPREAD)])
    aims = np.concatenate([-state.errors * rows, RIDGE * (PRIOR - state.values) / SPREAD])
    low = np.maximum((LEAST - state.values) / span, -LONGEST_STEP) - 1e-9
    high = np.minimum((MOST - state.values) / span, LONGEST_STEP) + 1e-9
    found: Floats = np.clip(state.values + span * lsq_linear(matrix, aims, (low, high)).x, LEAST, MOST)
    return found


def improved(rows: Sequence[Row], state: State, weights: Floats) -> State | None:
    """After one step, halved until it helps, with the slopes as they were; none where no step helps."""
    before, aim = loss(state.values, state.errors, weights), stepped(state, weights)
    for halves in range(MOST_HALVINGS):
        values = state.values + (aim - state.values) / 2**halves
        errors = errors_of(rows, values)
        if loss(values, errors, weights) < before * (1.0 - ENOUGH):
            return State(values=values, errors=errors, slopes=state.slopes)
    return None


def fitted(rows: Sequence[Row], start: Values, *, most_iterations: int = 6) -> State:
    """Gauss and Newton's iterations from given constants."""
    values = np.array([start[name] for name in NAMES])
    errors, weights = errors_of(rows, values), weights_of(rows)
    state = State(values=values, errors=errors, slopes=slopes_of(rows, values, errors))
    for iteration in range(most_iterations):
        found = improved(rows, state, weights)
        if found is None:
            break
        lower = loss(found.values, found.errors, weights)
        note(f"iteration {iteration + 1}: {loss(state.values, state.errors, weights):.5f} → {lower:.5f}")
        slopes = slopes_of(rows, found.values, found.errors)
        state = State(values=found.values, errors=found.errors, slopes=slopes)
    return state


def without(rows: Sequence[Row], state: State, source: str) -> State:
    """The fit without a source, from that with all: two steps with its slopes, then one with their own."""
    weights = weights_of(rows, source)
    kept = np.flatnonzero(weights)
    some = [rows[i] for i in kept]
    own = State(values=state.values, errors=state.errors[kept], slopes=state.slopes[kept])
    for fresh in (False, False, True):
        if fresh:
            own = State(values=own.values, errors=own.errors, slopes=slopes_of(some, own.values, own.errors))
        own = improved(some, own, weights[kept]) or own
    return own
