"""Published training runs as rows that a fit can price again and again with other constants."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import planner
from planner.cost.training import TrainingCost
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.model import ModelSpec
from planner.spec.overrides import with_changes
from planner.spec.runs import Run, read_runs
from planner.spec.runs_predicted import Prediction, predicted, remembered
from planner.spec.sources import resolve_model
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload, workload_from_dict
from tests.measured_rows import DATA, MissingDataError, profile

FILES = ("training_runs.csv", "megatron_a100_multi_node.csv", "megatron_a100_single_node.csv")
SINGLE_NODE, MULTI_NODE = "megatron_a100_single_node", "megatron_a100_multi_node"
TARGETS = (MULTI_NODE, SINGLE_NODE, "nvidia-dgxc", "nvidia-nemo-bridge-dense", "nvidia-nemo-bridge-moe",
           "bigscience", "torchtitan")  # fmt: skip

Floats = npt.NDArray[np.float64]
Values = Mapping[str, float]
_BEGAN = time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run, and what pricing it takes."""

    run: Run
    graph: Graph
    workload: TrainWorkload
    strategy: Strategy
    base: str  # name of the profile
    changes: Mapping[str, Any]  # to that profile, by the run's own cluster and software
    regime: str
    shipped_seconds: float  # predicted with the shipped profiles

    @property
    def seconds(self) -> float:
        """Measured."""
        assert self.run.step_seconds is not None
        return self.run.step_seconds


def note(text: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"{time.monotonic() - _BEGAN:5.0f} s  {text}", file=sys.stderr, flush=True)


def timed_runs(folder: Path = DATA) -> list[Run]:
    """The runs of trust A and B with a time."""
    for name in FILES:
        if not (folder / name).is_file():
            raise MissingDataError(f"{folder / name}: no such file; the published runs do not lie there")
    table = read_runs([folder / name for name in FILES])
    return [run for run in table.judged if run.step_seconds and run.trust in ("A", "B")]


def shipped_predictions(runs: Sequence[Run]) -> list[Prediction]:
    """Each run as `tp-plan validate` predicts it."""
    ask = remembered(planner.estimate)
    return [predicted(run, ask) for run in runs]


def rows_of(predictions: Iterable[Prediction]) -> list[Row]:
    """What could be predicted, of the sources that constants are fitted to."""
    graphs: dict[str, Graph] = {}
    return [
        _row(prediction, graphs)
        for prediction in predictions
        if prediction.estimate is not None and prediction.run.source in TARGETS
    ]


def _row(prediction: Prediction, graphs: dict[str, Graph]) -> Row:
    run, estimate = prediction.run, prediction.estimate
    assert estimate is not None
    found = resolve_model(dict(run.model))
    key = json.dumps(run.model, sort_keys=True, default=dict)
    if key not in graphs:
        graphs[key] = planner.trace(found)
    workload = workload_from_dict(run.workload, model=found if isinstance(found, ModelSpec) else None)
    assert isinstance(workload, TrainWorkload)
    plain = isinstance(run.hardware, str)
    return Row(
        run=run,
        graph=graphs[key],
        workload=workload,
        strategy=estimate.strategy,
        base=str(run.hardware) if plain else run.hardware["base"],
        changes={} if plain else dict(run.hardware["set"]),
        regime=estimate.uncertainty.regime,
        shipped_seconds=estimate.step_seconds,
    )


def sampled(rows: Sequence[Row]) -> list[Row]:
    """A row of each class of alike configurations, so that a fit is cheap and no sweep outvotes the others.

    A single-node step is composed from layers timed by themselves: alike are those of one measured layer.
    """
    first: dict[Any, Row] = {}
    for row in rows:
        first.setdefault(_class_of(row), row)
    return list(first.values())


def _class_of(row: Row) -> Any:
    run, strategy = row.run, row.strategy
    hidden, each = run.model["hidden"], strategy.microbatch
    if run.source == SINGLE_NODE:
        return run.source, hidden, strategy.tp, each
    name = "" if run.source == "bigscience" else run.model["name"]  # thirteen models of one kind
    return (run.source, row.base, name, row.workload.precision, strategy.tp, strategy.pp, strategy.cp, each,
            strategy.overlap.ep)  # fmt: skip


def priced(rows: Sequence[Row], settings: Callable[[Row], Mapping[str, Any]]) -> Floats:
    """Predicted seconds with keys of each row's profile set; rows that share model and cluster at once."""
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        changes = json.dumps({**row.changes, **settings(row)}, sort_keys=True)
        groups.setdefault((id(row.graph), row.workload, row.base, changes), []).append(place)
    found = np.empty(len(rows))
    profiles: dict[tuple[str, str], HardwareProfile] = {}
    for (_, workload, base, changes), places in groups.items():
        if (base, changes) not in profiles:
            profiles[base, changes] = with_changes(profile(base), json.loads(changes))
        cost = TrainingCost(rows[places[0]].graph, profiles[base, changes], workload)
        found[places] = cost.costs([rows[place].strategy for place in places]).step_seconds
    return found
