"""One pipeline rank of a world without peers: its virtual stages, its optimizer, and steps of any order."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from planner.execute.apply import Applied, apply_strategy
from planner.execute.collectives import CollectiveCounter, CountedCollective
from planner.execute.gradients import clip_gradients, synchronise
from planner.execute.memory import Peak, StorageTracker, watch_gradients
from planner.execute.mesh import Meshes
from planner.execute.objective import Objective
from planner.execute.optimizer import LocalOptimizer
from planner.execute.phases import phase
from planner.execute.stage import DecoderStage
from planner.execute.step import Microbatch, run_forward
from planner.spec.model import ModelSpec
from planner.spec.orders import Action, Kind, orders, rank_stages, round_orders, round_shape
from planner.spec.paths import Span
from planner.spec.plan import ModuleSplit
from planner.spec.strategy import Recompute, Strategy
from planner.spec.training_run import TrainingRun
from planner.spec.workload import TrainWorkload

_RUN = TrainingRun()  # rates and decay change no size


@dataclass(slots=True)
class _Waiting:
    """A microbatch between its passes through a virtual stage."""

    x: Tensor
    root: Tensor  # what backward starts from
    gradient: Callable[[Tensor], Tensor]
    later: tuple[Any, ...] = ()  # what the weight part needs of the input part


class DryRank:
    """What a rank would hold and issue. Made, and used, in a fake world whose meshes these are.

    `layers` are those of each virtual stage of pipeline rank `rank`, in the order of the model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        meshes: Meshes,
        workload: TrainWorkload,
        splits: Mapping[str, ModuleSplit],
        layers: Sequence[Span],
        *,
        rank: int,
        recompute: Mapping[str, Recompute] | None = None,
    ) -> None:
        strategy = meshes.strategy
        self.meshes, self.workload, self.fake_mode = meshes, workload, FakeTensorMode()
        self.objective = Objective()
        self.last = strategy.pp * strategy.vpp - 1
        self.numbers = rank_stages(strategy.schedule, strategy.pp, strategy.vpp)[rank]
        self.parts: dict[int, Applied] = {}
        for number, own in zip(self.numbers, layers, strict=True):
            with self.fake_mode:
                stage = DecoderStage(spec, own, first=number == 0, last=number == self.last)
            precision = workload.precision
            self.parts[number] = apply_strategy(stage, splits, meshes, recompute=recompute, precision=precision)
        self.module = nn.ModuleList(part.stage for part in self.parts.values())
        self.summed = [entry for part in self.parts.values() for entry in part.summed]
        with self.fake_mode:
            self.optimizer = LocalOptimizer("adamw", self.module.named_parameters(), self.module, _RUN)
            self._step(
                one_by_one(self.numbers, 1, strategy), clip=False
            )  # fills what is filled once: moments, FSDP's buffers

    def step(self, actions: Sequence[Action], *, clip: bool = False) -> tuple[tuple[CountedCollective, ...], Peak]:
        """What a step in this order issues, and its fullest moment; with `clip` the norm of all gradients too."""
        tracker, counter = StorageTracker(self.fake_mode), CollectiveCounter(self.meshes.axes)
        with self.fake_mode:
            handles = watch_gradients(self.module, tracker)
            tracker.own(self.module.parameters(), "parameters")
            tracker.own(self.module.buffers(), "parameters")
            tracker.own(self.optimizer.state(), "optimizer")
            with counter, tracker.running():
                self._step(actions, clip=clip)
        for handle in handles:
            handle.remove()
        return counter.counted(), tracker.peak()

    def _step(self, actions: Sequence[Action], *, clip: bool) -> None:
        waiting: dict[tuple[int, int], _Waiting] = {}
        arriving = [self._arriving(number) for number in self.numbers]
        self.objective.begin(list(self.parts.values()), arriving)
        del arriving
        left = Counter(action.stage for action in actions if action.kind in "BW")
        for action in actions:
            part, key = self.parts[action.stage], (action.stage, action.microbatch)
            if action.kind == "F":
                waiting[key] = self._forward(action.stage)
                continue
            if action.kind in "BW":
                left[action.stage] -= 1
            part.sharding.before_backward(last=not left[action.stage])
            with phase("backward"):
                _BACKWARD[action.kind](part, waiting[key])
            if action.kind != "I":
                del waiting[key]
        for part in self.parts.values():
            part.sharding.finish()
        synchronise(self.summed)
        if clip:
            clip_gradients(self.module, self.meshes, self.summed, 1.0)
        with phase("optimizer"):
            self.optimizer.step(_RUN.lr)
            self.module.zero_grad()

    def _forward(self, number: int) -> _Waiting:
        part = self.parts[number]
        batch = self._arriving(number)
        root, gradient = run_forward(part, batch, self.objective)
        return _Waiting(batch.x, root, gradient)

    def _arriving(self, number: int) -> Microbatch:
        """Tokens, or what an earlier stage sent: a part of the sequence with sp."""
        strategy, part = self.meshes.strategy, self.parts[number]
        first, last = number == 0, number == self.last
        length = self.workload.seq_len // strategy.cp
        tokens = torch.zeros((strategy.microbatch, length), dtype=torch.long)
        shape = (strategy.microbatch, length // strategy.tp if strategy.sp else length, part.stage.spec.hidden)
        return Microbatch(
            x=tokens if first else torch.empty(shape, dtype=part.compute_dtype, requires_grad=True),
            labels=tokens if last else None,
            gradient=None if last else torch.empty_like,
            length=length,
        )


def _whole(part: Applied, held: _Waiting) -> None:
    """Both parts of a backward at once."""
    torch.autograd.backward(held.root, held.gradient(held.root))


def _input_part(part: Applied, held: _Waiting) -> None:
    """The gradient that the stage before waits for.

    The first stage has none to send: all of it comes later. Where blocks are run again all of it comes now, so
    that they are once.
    """
    if part.recomputes:
        _whole(part, held)
    if part.recomputes or not held.x.requires_grad:
        return
    gradients = [held.gradient(held.root)]
    _, groups = stage_backward_input([held.root], gradients, [held.x], iter(part.stage.parameters()))
    held.later = (groups, gradients)


def _weight_part(part: Applied, held: _Waiting) -> None:
    if held.later:
        stage_backward_weight(iter(part.stage.parameters()), held.later[0])
    elif not part.recomputes:
        _whole(part, held)


_BACKWARD: dict[Kind, Callable[[Applied, _Waiting], None]] = {"B": _whole, "I": _input_part, "W": _weight_part}


def one_by_one(stages: Sequence[int], count: int, strategy: Strategy) -> tuple[Action, ...]:
    """Each microbatch through all virtual stages of a rank and back before the next: what issues, not when."""
    kinds: tuple[Kind, ...] = ("I", "W") if strategy.schedule in ("zb", "zbv") else ("B",)
    return tuple(
        action
        for number in range(count)
        for action in (
            *(Action("F", stage, number) for stage in stages),
            *(Action(kind, stage, number) for stage in reversed(stages) for kind in kinds),
        )
    )


def short_order(strategy: Strategy, rank: int, count: int) -> tuple[Action, ...]:
    """A rank's order of so many microbatches that whatever it holds in a step of `count`, it holds in this one.

    In a step of many the middle repeats itself. One repetition is kept: without a pipeline a microbatch between
    the first and the one that reduces gradients, else what fills the pipeline and some more.
    """
    pp, vpp, schedule = strategy.pp, strategy.vpp, strategy.schedule
    if schedule in ("interleaved", "zb"):
        size, rounds = round_shape(pp, count)
        rounds = min(rounds, 4)
        return round_orders(schedule, pp, vpp, size, rounds, min(count, size * rounds))[rank]
    enough = {"gpipe": count, "1f1b": pp - rank + 2, "zbv": 3 * pp}[schedule]
    return orders(schedule, pp, vpp, min(count, enough))[rank]


def extrapolated(
    one: Sequence[CountedCollective], two: Sequence[CountedCollective], count: int
) -> tuple[CountedCollective, ...]:
    """Calls of a step of `count` microbatches from those of steps with one and with two: each adds the same."""
    first = {(call.axis, call.ranks, call.phase, call.kind): call for call in one}
    found = []
    for call in two:
        before = first.get((call.axis, call.ranks, call.phase, call.kind), replace(call, count=0, bytes=0))
        more = count - 2
        found.append(
            replace(
                call,
                count=call.count + more * (call.count - before.count),
                bytes=call.bytes + more * (call.bytes - before.bytes),
            )
        )
    return tuple(found)
