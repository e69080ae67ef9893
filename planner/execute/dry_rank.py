"""One pipeline rank of a world without peers: its virtual stages, its optimizer, and steps of any order."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from planner.execute.adapters import stage_of
from planner.execute.apply import Applied, apply_strategy
from planner.execute.collectives import CollectiveCounter, CountedCollective
from planner.execute.gradients import TiedEnds, clip_gradients, synchronise
from planner.execute.memory import Peak, StorageTracker, watch_gradients
from planner.execute.mesh import Meshes
from planner.execute.objective import Objective
from planner.execute.optimizer import LocalOptimizer
from planner.execute.parameters import Summed
from planner.execute.phases import phase
from planner.execute.pieces import Piece
from planner.execute.pipeline import shape_between
from planner.execute.runner import tied_ends
from planner.execute.sharding import DataParallel
from planner.execute.stage import DecoderStage, Stage
from planner.execute.step import Microbatch, run_forward
from planner.spec.model import ModelSpec
from planner.spec.orders import Action, Kind, messages, orders, rank_stages, round_orders, round_shape
from planner.spec.paths import Span
from planner.spec.plan import ModuleSplit
from planner.spec.strategy import Recompute, Strategy
from planner.spec.training_run import TrainingRun
from planner.spec.workload import TrainWorkload

_RUN = TrainingRun()  # rates and decay change no size


@dataclass(frozen=True, slots=True, kw_only=True)
class DryStep:
    """What a step issued, what its second microbatch did of that, and what memory it took."""

    collectives: tuple[CountedCollective, ...]
    of_second: tuple[CountedCollective, ...]
    peak: Peak
    pieces: tuple[Piece, ...]  # of memory: before the actions, of each of them, after them


@dataclass(slots=True)
class Waiting:
    """A microbatch between its passes through a virtual stage."""

    x: Tensor
    root: Tensor  # what backward starts from
    gradient: Callable[[Tensor], Tensor]
    later: tuple[Any, ...] = ()  # what the weight part needs of the input part


class DrySteps(ABC):
    """Steps of a rank of a fake world, in any order: what they issue and take."""

    meshes: Meshes
    workload: TrainWorkload
    fake_mode: FakeTensorMode
    numbers: Sequence[int]  # of its virtual stages
    receivers: dict[int, dict[Kind, int]]  # by virtual stage: the pipeline rank to which it sends after an action
    shardings: dict[int, DataParallel]
    module: nn.Module
    summed: Sequence[Summed]
    tied: TiedEnds | None

    def _make_ready(self) -> None:
        """Make the optimizer, and fill what is filled once: moments, FSDP's buffers."""
        with self.fake_mode:
            self.optimizer = LocalOptimizer("adamw", self.module.named_parameters(), self.module, _RUN)
            self._step([Action("F", n, 0) for n in self.numbers] + [Action("B", n, 0) for n in self.numbers[::-1]])

    def step(self, actions: Sequence[Action], *, clip: bool = False) -> DryStep:
        """What a step in this order issues and takes; with `clip` the norm of all gradients too."""
        tracker, counter = StorageTracker(self.fake_mode), CollectiveCounter(self.meshes.axes)
        with self.fake_mode:
            handles = watch_gradients(self.module, tracker)
            tracker.own(self.module.parameters(), "parameters")
            tracker.own(self.module.buffers(), "parameters")
            tracker.own(self.optimizer.state(), "optimizer")

            def between(following: Action | None) -> None:
                tracker.end_piece()
                counter.microbatch = following.microbatch if following else None

            with counter, tracker.running():
                self._step(actions, clip=clip, between=between)
        for handle in handles:
            handle.remove()
        return DryStep(
            collectives=counter.counted(),
            of_second=counter.counted(1),
            peak=tracker.peak(),
            pieces=tuple(tracker.pieces()),
        )

    def _step(
        self,
        actions: Sequence[Action],
        *,
        clip: bool = False,
        between: Callable[[Action | None], None] = lambda following: None,
    ) -> None:
        waiting: dict[tuple[int, int], Waiting] = {}
        left = Counter(action.stage for action in actions if action.kind in "BW")
        for action in actions:
            between(action)
            sharding, key = self.shardings[action.stage], (action.stage, action.microbatch)
            if action.kind == "F":
                waiting[key] = self._forward(action.stage)
                self._send(action, waiting[key].root)
                continue
            if action.kind in "BW":
                left[action.stage] -= 1
            sharding.before_backward(last=not left[action.stage])
            with phase("backward"):
                self._backward(action, waiting[key])
            self._send(action, waiting[key].x.grad)
            if action.kind != "I":
                del waiting[key]
        between(None)
        for sharding in self.shardings.values():
            sharding.finish()
        self._synchronise()
        if clip:
            clip_gradients(self.module, self.meshes, self.summed, 1.0, tied=self.tied)
        with phase("optimizer"):
            self.optimizer.step(_RUN.lr)
            self.module.zero_grad()

    def _send(self, action: Action, made: Tensor | None) -> None:
        """What an action made goes to the neighbour's rank, as it is: here it reaches nobody."""
        receiver = self.receivers[action.stage].get(action.kind)
        if receiver is not None:
            assert made is not None, f"stage {action.stage} has nothing to send after {action.kind}"
            dist.isend(made.detach(), group=self.meshes.pp.group, group_dst=receiver)

    @abstractmethod
    def _forward(self, number: int) -> Waiting:
        """A microbatch through a virtual stage."""

    def _backward(self, action: Action, held: Waiting) -> None:
        """And back, or a part of that."""
        torch.autograd.backward(held.root, held.gradient(held.root))

    def _synchronise(self) -> None:
        """Gradients that ranks hold parts of, made whole."""
        synchronise(self.summed)
        if self.tied is not None:
            self.tied.synchronise()


class DryRank(DrySteps):
    """What a rank would hold and issue. Made, and used, as this rank of a fake world whose meshes these are.

    `layers` are those of each virtual stage of pipeline rank `rank`, in the order of the model. With `model`, a
    module on the meta device, stages are cut out of it; else they are those of the bundled decoder.
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
        model: nn.Module | None = None,
    ) -> None:
        strategy = meshes.strategy
        self.meshes, self.workload, self.fake_mode = meshes, workload, FakeTensorMode()
        self.objective = Objective()
        self.last = strategy.pp * strategy.vpp - 1
        placed = strategy.schedule, strategy.pp, strategy.vpp
        self.numbers = rank_stages(*placed)[rank]
        self.receivers = {number: messages(*placed, number) for number in self.numbers}
        self.parts: dict[int, Applied] = {}
        for number, own in zip(self.numbers, layers, strict=True):
            ends = {"first": number == 0, "last": number == self.last}
            if model is None:
                with self.fake_mode:
                    stage: Stage = DecoderStage(spec, own, **ends)
            else:
                stage = stage_of(model, own, **ends, dtype=torch.float32)
                with self.fake_mode:
                    _give_memory(stage)
            precision = workload.precision
            self.parts[number] = apply_strategy(stage, splits, meshes, recompute=recompute, precision=precision)
        self.module = nn.ModuleList(part.stage for part in self.parts.values())
        self.summed = [entry for part in self.parts.values() for entry in part.summed]
        self.tied = tied_ends(self.parts, meshes)
        self.shardings = {number: part.sharding for number, part in self.parts.items()}
        self._make_ready()

    def _step(self, actions: Sequence[Action], **how: Any) -> None:
        arriving = [self._arriving(number) for number in self.numbers]
        self.objective.begin(list(self.parts.values()), arriving)
        super()._step(actions, **how)

    def _forward(self, number: int) -> Waiting:
        part = self.parts[number]
        batch = self._arriving(number)
        root, gradient = run_forward(part, batch, self.objective)
        return Waiting(batch.x, root, gradient)

    def _backward(self, action: Action, held: Waiting) -> None:
        _BACKWARD[action.kind](self.parts[action.stage], held)

    def _arriving(self, number: int) -> Microbatch:
        """Tokens, or what an earlier stage sent: a part of the sequence with sp."""
        strategy, part = self.meshes.strategy, self.parts[number]
        first, last = number == 0, number == self.last
        length = self.workload.seq_len // strategy.cp
        tokens = torch.zeros((strategy.microbatch, length), dtype=torch.long)
        shape = shape_between(strategy, self.workload.seq_len, part.stage.spec.hidden)
        return Microbatch(
            x=tokens if first else torch.empty(shape, dtype=part.compute_dtype, requires_grad=True),
            labels=tokens if last else None,
            gradient=None if last else torch.empty_like,
            length=length,
        )


def _give_memory(stage: Stage) -> None:
    """Weights on the CPU for those on the meta device. `to_empty` moves no weight into a fake mode."""
    made: dict[int, nn.Parameter] = {}
    for module in stage.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = made.setdefault(id(weight), nn.Parameter(empty))


def _whole(part: Applied, held: Waiting) -> None:
    """Both parts of a backward at once."""
    torch.autograd.backward(held.root, held.gradient(held.root))


def _input_part(part: Applied, held: Waiting) -> None:
    """The gradient that the stage before waits for.

    The first stage has none to send: all of it comes later. Where torch cannot split it, all of it comes now.
    """
    if part.at_once:
        _whole(part, held)
    if part.at_once or not held.x.requires_grad:
        return
    gradients = [held.gradient(held.root)]
    _, groups = stage_backward_input([held.root], gradients, [held.x], iter(part.stage.parameters()))
    held.later = (groups, gradients)


def _weight_part(part: Applied, held: Waiting) -> None:
    if held.later:
        stage_backward_weight(iter(part.stage.parameters()), held.later[0])
        part.sharding.after_weights()
    elif not part.at_once:
        _whole(part, held)


_BACKWARD: dict[Kind, Callable[[Applied, Waiting], None]] = {"B": _whole, "I": _input_part, "W": _weight_part}


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


def extrapolated(step: DryStep, more: int) -> tuple[CountedCollective, ...]:
    """Calls of a step with so many more microbatches like the second, neither the first nor the last."""
    each = {(call.axis, call.ranks, call.phase, call.kind): call for call in step.of_second}
    found = []
    for call in step.collectives:
        added = each.get((call.axis, call.ranks, call.phase, call.kind), replace(call, count=0, bytes=0))
        found.append(replace(call, count=call.count + more * added.count, bytes=call.bytes + more * added.bytes))
    return tuple(found)
