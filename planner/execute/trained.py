"""What a run trains: with which values it begins, what a step reads, how it is spread. Here, a spec's decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from planner.errors import PlannerError
from planner.execute.adapters import require_decoder
from planner.execute.compiled import require_compilable
from planner.execute.data import TrainingData, open_data
from planner.execute.gathered import gatherer
from planner.execute.parts import Shapes, held_values, parts_of, whole_shapes
from planner.execute.ring import require_context
from planner.execute.weights import Source
from planner.models.build import build_model
from planner.spec.huggingface_config import config_at
from planner.spec.legality import require_legal
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan, content_digest
from planner.spec.training_run import TrainingRun
from planner.spec.workload import TrainWorkload

if TYPE_CHECKING:  # whoever starts the ranks builds no model; what builds one loads half of torch
    from planner.execute.runner import Runner

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Trained(ABC):
    """A model under a plan, checked before ranks start. Every rank has the same."""

    plan: Plan
    run: TrainingRun

    @property
    @abstractmethod
    def digest(self) -> str:
        """Of the model: a run goes on with the one that it began with."""

    @property
    @abstractmethod
    def weights(self) -> int:
        """How many it has."""

    @property
    @abstractmethod
    def reads(self) -> str:
        """What data, so that a resumed run sees whether it is the same."""

    @abstractmethod
    def batch(self, first: int, rows: int, device: torch.device) -> Mapping[str, Any]:
        """What a step takes: the sequences from a place of the run on, the same in whatever layout."""

    @abstractmethod
    def shapes(self) -> Shapes:
        """Of its weights as they are kept."""

    @abstractmethod
    def runner(self, device: torch.device) -> Runner:
        """This rank's part of it, with the values that a run begins with."""

    @abstractmethod
    def require_places(self) -> None:
        """Refuse folders that it could not begin from or end in; one process calls this, before ranks write."""

    @abstractmethod
    def export(self, runner: Runner, *, writes: bool) -> None:
        """Its weights written for others, where the run asks for that. All ranks call this, one of them writes."""


@dataclass(frozen=True, kw_only=True)
class TrainedSpec(Trained):
    """The decoder that a specification or a config.json describes."""

    spec: ModelSpec
    data: TrainingData

    @classmethod
    def of(cls, plan: Plan, run: TrainingRun, spec: ModelSpec) -> TrainedSpec:
        """What of the plan and the data cannot be run is a PlannerError."""
        workload = plan.workload
        assert isinstance(workload, TrainWorkload), "checked before"
        require_decoder(spec, plan.model)
        digest = content_digest(spec)
        if digest != plan.digests.model:
            plan.require_same(digest, plan.digests.hardware)
        require_legal(spec, workload, plan.strategy, plan.gpus)
        if run.compile:
            require_compilable(plan, spec)
        require_context(run.context, spec, plan.strategy, workload.seq_len)
        return cls(plan=plan, run=run, spec=spec, data=open_data(run, vocab=spec.vocab, length=workload.seq_len))

    @property
    def digest(self) -> str:
        return self.plan.digests.model

    @property
    def weights(self) -> int:
        return sum(value.numel() for value in build_model(self.spec, device="meta").parameters())

    @property
    def reads(self) -> str:
        return self.data.told

    def batch(self, first: int, rows: int, device: torch.device) -> Mapping[str, Tensor]:
        """Tokens, and for each of them the next one."""
        tokens, labels = self.data.batch(first, rows, device)
        return {"tokens": tokens, "labels": labels}

    def shapes(self) -> Shapes:
        """Of the unsplit decoder."""
        return whole_shapes(build_model(self.spec, device="meta"))

    def runner(self, device: torch.device) -> Runner:
        """Drawn from the seed, or read from a folder: no rank ever holds the whole."""
        from planner.execute.runner import build_runner

        return build_runner(
            self.plan,
            self.spec,
            device=device,
            dtype=DTYPES[self.run.dtype],
            seed=self.run.seed,
            weights=self.source(),
            compile=self.run.compile,
            context=self.run.context,
        )

    def source(self) -> Source | None:
        """Where weights come from, if from a Hugging Face folder; it must be one of the plan's model."""
        if not self.run.weights:
            return None
        from planner.execute.huggingface_folder import HuggingFaceFolder

        found = HuggingFaceFolder(self.run.weights)
        if replace(found.spec, name=self.spec.name) != self.spec:
            raise PlannerError(
                f"the weights are those of the plan's model, {self.spec.name}",
                value=self.run.weights,
                remedy=f"plan for {self.run.weights}, or give the weights of {self.spec.name}",
                key="weights",
            )
        return found

    def export_config(self) -> dict[str, Any]:
        """The Hugging Face configuration of exported weights: one that is there, else that of the model."""
        return config_at((self.run.weights, self.plan.model), self.spec)

    def require_places(self) -> None:
        """The folder of weights is of this model, that of the export is new."""
        self.source()
        if self.run.export:
            from planner.execute.huggingface_export import require_new

            self.export_config()
            require_new(Path(self.run.export))

    def export(self, runner: Runner, *, writes: bool) -> None:
        """As a Hugging Face checkpoint."""
        if not self.run.export:
            return
        from planner.execute.huggingface_export import export_huggingface

        shapes = self.shapes()
        own = {kept: held for _, kept, held in parts_of(runner.module, shapes, held_values(runner.module))}
        export_huggingface(
            self.run.export,
            self.export_config(),
            gatherer(own, dict(shapes.values())),
            tokenizer_from=Path(self.run.weights) if self.run.weights else None,
            writes=writes,
        )
