"""How close any plain model can come to two tables of Megatron's timings on A100.

One table is composed from layers that were timed by themselves: their times are told apart again, and drawn as the
best curve over the microbatch that is the host's time up to a knee and a rising line beyond, a line for each
hidden size and tp, one host time for each tp. The steps put together from those curves are off by what no such
model explains, whatever its constants. The other table's steps are fitted by terms of layers, microbatches and
tokens, for each tp by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from tests.bench.training_rows import MULTI_NODE, SINGLE_NODE, Floats
from tests.measured_rows import DATA, columns, table

FEWEST_STEPS = 3  # of one layer, from which its time can be told
LEVELS = 300  # that are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Mean and largest relative errors of what is closest."""

    steps: int
    composed: float  # steps put together from the layers' own times
    smooth: float  # steps put together from layers on curves
    layers: float  # layers on curves
    farthest_layer: float


def single_node(folder: Path = DATA) -> Floor:
    """How far steps and layers lie from the curves."""
    steps = _Steps(f"{SINGLE_NODE}.csv", folder)
    composed, smooth, layers = [], [], []
    for tp in np.unique(steps.tp):
        known = {shape: terms for shape, terms in steps.layers_of(tp).items() if terms is not None}
        curves = _closest({shape: terms[0] for shape, terms in known.items()})
        for (hidden, each), terms in known.items():
            rows = (steps.tp == tp) & (steps.hidden == hidden) & (steps.each == each)
            curve = np.array([curves[hidden, each], *terms[1:]])
            composed += list(steps.composed(rows) @ terms / steps.milliseconds[rows] - 1.0)
            smooth += list(steps.composed(rows) @ curve / steps.milliseconds[rows] - 1.0)
            layers.append(abs(curve[0] / terms[0] - 1.0))
    return Floor(
        steps=len(composed),
        composed=float(np.mean(np.abs(composed))),
        smooth=float(np.mean(np.abs(smooth))),
        layers=float(np.mean(layers)),
        farthest_layer=max(layers),
    )


def head_ratios(folder: Path = DATA) -> list[float]:
    """Times of embedding and head with tp 1 over those with tp 2, of equal hidden size and microbatch."""
    steps = _Steps(f"{SINGLE_NODE}.csv", folder)
    one, two = steps.layers_of(1), steps.layers_of(2)
    pairs = ((one[shape], two[shape]) for shape in one if shape in two)
    return [float(first[1] / second[1]) for first, second in pairs if first is not None and second is not None]


def multi_node(folder: Path = DATA) -> Iterator[tuple[int, int, float, float]]:
    """Of each tp: its steps, and the mean and the largest error of the best sum of terms."""
    steps = _Steps(f"{MULTI_NODE}.csv", folder)
    for tp in np.unique(steps.tp):
        own = steps.tp == tp
        terms = steps.terms(own) / steps.milliseconds[own][:, None]
        if own.sum() >= FEWEST_STEPS:
            apart = np.abs(terms @ nnls(terms, np.ones(own.sum()))[0] - 1.0)
            yield int(tp), int(own.sum()), float(apart.mean()), float(apart.max())


class _Steps:
    """Columns of a table of timings."""

    def __init__(self, name: str, folder: Path) -> None:
        keys = ("hidden_size", "tensor_parallelism", "pipeline_parallelism", "data_parallelism", "micro_batch",
                "global_batch", "n_layers", "iteration_time_ms")  # fmt: skip
        found = columns(table(name, folder), *keys)
        self.hidden, self.tp, self.pp, dp, self.each, batch, layers, self.milliseconds = found
        self.microbatches = batch / self.each / dp
        self.layers = layers / self.pp  # of a stage

    def composed(self, rows: Floats) -> Floats:
        """What a step is put together from: a layer, the head, a layer's parameters, the rest."""
        count, layers = self.microbatches[rows], self.layers[rows]
        rounds = count + self.pp[rows] - 1.0
        return np.stack([rounds * layers, count, layers, np.ones(len(count))], axis=1)

    def layers_of(self, tp: float) -> dict[tuple[float, float], Floats | None]:
        """Milliseconds of those by hidden size and microbatch; none where too few steps tell them apart."""
        own = self.tp == tp
        found: dict[tuple[float, float], Floats | None] = {}
        for hidden, each in sorted(set(zip(self.hidden[own], self.each[own], strict=True))):
            rows = own & (self.hidden == hidden) & (self.each == each)
            parts = self.composed(rows) / self.milliseconds[rows][:, None]
            enough = len(parts) >= FEWEST_STEPS
            found[hidden, each] = nnls(parts, np.ones(len(parts)))[0] if enough else None
        return found

    def terms(self, rows: Floats) -> Floats:
        """Layers and microbatches through the pipeline, each also by its tokens, and what happens once a step."""
        rounds = self.microbatches[rows] + self.pp[rows] - 1.0
        layers, each, ones = self.layers[rows], self.each[rows], np.ones(len(rounds))
        count = self.microbatches[rows]
        return np.stack(
            [rounds * layers, rounds * layers * each, count, count * each, ones / self.pp[rows], ones], axis=1
        )


def _closest(layers: dict[tuple[float, float], float]) -> dict[tuple[float, float], float]:
    """A curve over the microbatch for each hidden size, all level at the same time before their knees."""
    best, least = layers, np.inf
    for level in np.linspace(min(layers.values()), max(layers.values()), LEVELS):
        curves: dict[tuple[float, float], float] = {}
        for hidden in dict.fromkeys(hidden for hidden, _ in layers):
            sizes = np.array([each for other, each in layers if other == hidden])
            curve = _with_knee(sizes, np.array([layers[hidden, each] for each in sizes]), level)
            curves |= {(hidden, each): value for each, value in zip(sizes, curve, strict=True)}
        apart = sum(abs(curves[shape] / layers[shape] - 1.0) for shape in layers)
        if apart < least:
            best, least = curves, apart
    return best


def _with_knee(sizes: Floats, milliseconds: Floats, level: float) -> Floats:
    """The closest curve that is level up to some size and a line that rises from there on."""
    best, least = np.full(len(sizes), level), float(np.abs(level / milliseconds - 1.0).sum())
    for flat in range(len(sizes)):
        terms = np.stack([np.ones(len(sizes) - flat), sizes[flat:]], axis=1)
        line = terms @ nnls(terms / milliseconds[flat:, None], np.ones(len(terms)))[0]
        curve = np.concatenate([np.full(flat, level), np.maximum(line, level)])
        apart = float(np.abs(curve / milliseconds - 1.0).sum())
        if apart < least:
            best, least = curve, apart
    return best
