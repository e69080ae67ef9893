"""A training run as a command line asks for it: data, optimizer, checkpoints, and what to do when it fails."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from planner.errors import PlannerError
from planner.spec.codec import Count, Degree, Range, Share, decode, field_types
from planner.spec.files import require_apart
from planner.spec.workload import Context, Stack, stack_of_run

Rate = Annotated[float, Range(0.0, 1e6)]
Device = Literal["auto", "cpu", "cuda"]

SYNTHETIC = "synthetic"
MEASURED = "measured.json"  # beside the plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """What a plan leaves open of a run. Every rank gets the same."""

    data: str = SYNTHETIC  # or tokens.bin, or the folder of a dataset
    data_dtype: Literal["auto", "uint16", "uint32"] = "auto"  # of tokens.bin; auto: by vocabulary
    steps: Degree = 10  # of the optimizer, those before a resume among them
    lr: Rate = 3e-4
    min_lr: Rate = 3e-5  # where the cosine ends
    warmup: Count = 0  # steps from 0 to lr
    weight_decay: Rate = 0.1  # not of norms and biases
    beta1: Share = 0.9
    beta2: Share = 0.95
    clip: Rate = 1.0  # greatest norm of the gradients; 0: not clipped
    seed: Count = 0  # of weights, of dropout and of the order of the data
    dtype: Literal["fp32", "fp64"] = "fp32"  # of weights and optimizer; fp64 computes in fp64 too
    compile: bool = False  # blocks, by torch.compile
    context: Context = "gather"  # keys and values over cp: gathered, or passed around a ring
    device: Device = "auto"
    weights: str = ""  # folder of a Hugging Face checkpoint to start from; empty: drawn
    export: str = ""  # folder for one at the end; empty: none
    checkpoint: str = ""  # folder; empty: none
    every: Count = 0  # steps between checkpoints; 0: at the end alone
    keep: Degree = 2  # checkpoints; older ones are removed
    resume: bool = False  # from the last whole checkpoint, if there is one
    log: str = ""  # JSON lines
    measured: str = ""  # empty: measured.json beside the plan
    timeout: Annotated[float, Range(0.0, 1e7)] = 0.0  # seconds that a rank may wait in a step; 0: by the plan

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> TrainingRun:
        """A run from flags, `None` where one was left out; a `min_lr` that was left out is a tenth of `lr`."""
        told = {key: value for key, value in given.items() if value is not None}
        if "lr" in told and "min_lr" not in told and isinstance(told["lr"], int | float):
            told["min_lr"] = told["lr"] / 10
        return decode(cls, told)

    def __post_init__(self) -> None:
        for holds, key, rule, remedy in (
            (self.min_lr <= self.lr, "min_lr", f"min_lr is at most lr, {self.lr:g}", "lower min_lr"),
            (self.beta1 < 1.0, "beta1", "beta1 is below 1: old gradients fade", "lower beta1"),
            (self.beta2 < 1.0, "beta2", "beta2 is below 1: old gradients fade", "lower beta2"),
            (not self.resume or self.checkpoint, "resume", "a run resumes from a folder", "give --checkpoint"),
            (not self.every or self.checkpoint, "every", "checkpoints go to a folder", "give --checkpoint"),
        ):  # fmt: skip
            if not holds:
                raise PlannerError(rule, value=getattr(self, key), remedy=remedy, key=key)

    def require_apart(self, plan: Path) -> None:
        """Refuse to write over the plan or the data, or two things into one file."""
        measured = self.measured or str(plan.parent / MEASURED)
        require_apart({"log": self.log, "measured": measured}, {"plan": str(plan), "data": self.data})

    @property
    def stack(self) -> Stack:
        """The software that the run is."""
        return stack_of_run(compiled=self.compile)

    def to_arguments(self) -> list[str]:
        """The flags that give this run again."""
        words: list[str] = []
        for item in dataclasses.fields(self):
            value, name = getattr(self, item.name), item.name.replace("_", "-")
            if value == item.default and item.name != "min_lr":  # which follows from lr where it is left out
                continue
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words


RUN_KEYS = tuple(item.name for item in dataclasses.fields(TrainingRun))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankArguments:
    """The command line that each rank gets."""

    plan: str
    run: TrainingRun
    quiet: bool = False
    verbose: bool = False  # tracebacks are shown

    def words(self) -> list[str]:
        """As `parse_arguments` reads it."""
        flags = ["--quiet"] * self.quiet + ["--verbose"] * self.verbose
        return [self.plan, *self.run.to_arguments(), *flags]


def parse_arguments(words: Sequence[str]) -> RankArguments:
    """What `torchrun … -m planner.execute` is asked for."""
    parser = argparse.ArgumentParser(prog="python -m planner.execute", allow_abbrev=False)
    parser.add_argument("plan")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    for key, kind in field_types(TrainingRun).items():
        plain = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
        flag = f"--{key.replace('_', '-')}"
        if plain is bool:
            parser.add_argument(flag, dest=key, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(flag, dest=key, type=plain if plain in (int, float) else str)
    given = vars(parser.parse_args(words))
    apart = {key: given.pop(key) for key in ("plan", "quiet", "verbose")}
    return RankArguments(run=TrainingRun.from_flags(given), **apart)
