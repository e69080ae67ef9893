"""What a run trains: a user's own module, as `FILE.py:FUNCTION` makes it.

Every rank calls the function, for parts of a module that are no tensors; of its values those of rank 0 count, so
that they are the same whatever the layout. They follow from the run's seed as far as the function draws by torch,
numpy or random. A module too large for as many copies in memory is made on the meta device by its function:
then each rank draws its parts by path and seed.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.compiled import require_compilable
from planner.execute.own_arguments import Arguments, arguments_of, next_token_loss
from planner.execute.own_data import OwnData, open_own_data
from planner.execute.own_module import OwnRunner, require_runnable, require_same_paths
from planner.execute.parts import Shapes, whole_shapes
from planner.execute.runner import Runner
from planner.execute.trained import DTYPES, Trained
from planner.execute.weights import fill_from_first, without_values
from planner.models.user_module import imported, in_dtype, loaded, made_by
from planner.spec.legality import require_legal
from planner.spec.plan import Plan
from planner.spec.sources import UserModule
from planner.spec.training_run import TrainingRun
from planner.spec.workload import TrainWorkload


@dataclass(frozen=True, kw_only=True)
class TrainedFile(Trained):
    """The module that a function of a file makes."""

    user: UserModule
    arguments: Arguments
    data: OwnData
    whole: Shapes
    parameters: int
    kept: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # the user's imports, while steps run

    @classmethod
    def of(cls, plan: Plan, run: TrainingRun, user: UserModule) -> TrainedFile:
        """What of plan, module and data cannot be run is a PlannerError. The module has no values for this."""
        workload = plan.workload
        assert isinstance(workload, TrainWorkload), "checked before"
        _require_own(run)
        require_runnable(plan)
        require_legal(None, workload, plan.strategy, plan.gpus)
        if run.compile:
            require_compilable(plan, None)
        with loaded(user.path, user.function) as (module, example, _):
            require_same_paths(plan, module)
            module, example = in_dtype(module.train(), example, DTYPES[run.dtype])
            whole = whole_shapes(module)
            arguments = arguments_of(module, example, workload.seq_len)
            _require_kept(arguments.changed, module, plan)
            return cls(
                plan=plan,
                run=run,
                user=user,
                arguments=arguments,
                data=open_own_data(run, arguments, workload.seq_len),
                whole=whole,
                parameters=sum(value.numel() for value in module.parameters()),
            )

    @property
    def digest(self) -> str:
        return self.plan.digests.model

    @property
    def weights(self) -> int:
        return self.parameters

    @property
    def reads(self) -> str:
        return self.data.told

    def batch(self, first: int, rows: int, device: torch.device) -> Mapping[str, Any]:
        """The module's arguments, and what its loss reads beside them."""
        fed = self.data.rows(first, rows, device)
        example = self.arguments.example
        found = {key: _repeated(value, rows, device) for key, value in example.items() if key not in fed}
        return found | {
            key: value.to(example[key].dtype) if key in example else value for key, value in fed.items()
        }

    def shapes(self) -> Shapes:
        """Of the unsplit module."""
        return self.whole

    def runner(self, device: torch.device) -> Runner:
        """The values of rank 0 in their places on all ranks."""
        _seed(self.run.seed)
        file = self.kept.enter_context(imported(self.user.path))
        module, example = made_by(file, self.user.path, self.user.function, device="cpu")
        module, example = in_dtype(module, example, DTYPES[self.run.dtype])
        if whole_shapes(module) != self.whole:
            raise PlannerError(
                "the function makes the same module each time",
                value=f"{self.user.path}:{self.user.function}",
                remedy="let neither the device nor chance decide over its parts",
                key="model",
            )
        # FSDP2 warns of results that are views: that of the whole only a loss reads
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \(FSDP{type(module).__name__}\) returned a view")
        on_meta = any(value.is_meta for value in module.parameters())
        if dist.get_rank() and not on_meta:
            module = without_values(module)
        return OwnRunner.of(
            module,
            self.plan,
            None if self.arguments.returns_loss else next_token_loss,
            device,
            self.run.seed,
            None,
            example,
            compiled=self.run.compile,
            fill=None if on_meta else partial(fill_from_first, model=module),
        )

    def require_places(self) -> None:
        """There are none: what it begins from its function knows."""

    def export(self, runner: Runner, *, writes: bool) -> None:
        """Nothing: refused before."""


def _seed(seed: int) -> None:
    """Whatever a function draws by."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _repeated(value: Any, rows: int, device: torch.device) -> Any:
    """What every sequence has alike."""
    return torch.cat([value] * rows).to(device) if isinstance(value, Tensor) else value


def _require_own(run: TrainingRun) -> None:
    """Refuse what takes a model whose weights have the names of a library."""
    for key, given, remedy in (
        ("weights", run.weights, "let FUNCTION load them: a run starts from the values that its module has"),
        ("export", run.export, "give --checkpoint, whose tensors weight/PATH are whole; "
         "torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes one file of it"),
    ):  # fmt: skip
        if given:
            rule = "weights of Hugging Face are those of a model that a specification or a config.json describes"
            raise PlannerError(rule, value=given, remedy=remedy, key=key)


def _require_kept(changed: tuple[str, ...], module: nn.Module, plan: Plan) -> None:
    """Buffers that forward writes to are kept where every rank runs the whole forward."""
    lasting = [path for path in changed if path in module.state_dict()]
    if lasting and plan.strategy.pp > 1:
        raise PlannerError(
            "in a pipeline no forward of a module writes to a buffer that a checkpoint keeps",
            value=lasting[0],
            remedy="use a norm without statistics, register it with persistent=False, or plan with --fix pp=1",
            key="model",
        )
