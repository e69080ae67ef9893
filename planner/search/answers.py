"""The answer to what a user asks: the best layout on one number of GPUs, or on the best of several.

Each number of GPUs is searched only for what beats the best so far; the certificates of all of them add up to one,
in the unit of the objective. A number that no factorisation or rule allows is passed over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.cost.times import PARTS
from planner.cost.training import TrainingCost
from planner.cost.ways import Arrangement
from planner.errors import PlannerError
from planner.search.arranged import settled
from planner.search.objectives import in_order, step_limit_seconds, value_of
from planner.search.optimize import Found, Progress, Search
from planner.search.reasons import reason_of
from planner.search.space import Space, space_of
from planner.spec.assignments import require_sequence_parallel
from planner.spec.estimate import Memory, StepTime
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.model import ModelSpec
from planner.spec.plan import Certificate, RunnerUp
from planner.spec.regions import mixing_whole
from planner.spec.wishes import Wishes
from planner.spec.workload import TrainWorkload

_MOST_RUNNERS_UP = 5

Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a plan is asked for, but for the number of GPUs."""

    spec: ModelSpec | None  # none of a user's own module
    graph: Graph
    profile: HardwareProfile
    workload: TrainWorkload
    wishes: Wishes

    def __post_init__(self) -> None:
        if self.graph.own:
            if self.wishes.fix.sp:
                require_sequence_parallel(self.graph)
            wishes = self.wishes.of_own_module(mixes_whole=bool(mixing_whole(self.graph)))
            object.__setattr__(self, "wishes", wishes)

    def space(self, gpus: int) -> Space:
        """The candidates on so many GPUs."""
        return space_of(self.spec, self.workload, gpus, self.wishes, layers=_layers(self.graph))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best layout, on the number of GPUs where it is; `found.best` is empty where nothing fits."""

    question: Question
    gpus: int
    space: Space
    found: Found


def _layers(graph: Graph) -> int:
    """How many layers there are; none of a user's own module whose layers are in several lists."""
    found = [placement.path for placement in graph.sequence if placement.path]
    lists = {path.rpartition(".")[0] for path in found}
    return len(found) if len(lists) == 1 or not graph.own else 0


def answer(question: Question, gpus: Sequence[int], *, progress: Report = lambda _: None) -> Answer:
    """The best over all these numbers of GPUs, with one certificate for them together.

    Raises only where the fixed degrees divide none of them. After an interrupt, or past the time limit, it is the
    best so far: numbers that were not looked at leave nothing proven.
    """
    trials = _Trials(question, progress)
    trials.run(in_order(question.wishes, gpus))
    return trials.answer()


def searched(
    question: Question, gpus: int, *, limit_seconds: float = math.inf, progress: Report = lambda _: None
) -> Answer:
    """The best on so many GPUs whose step is below a limit; of a space without candidates nothing."""
    space = question.space(gpus)
    if len(space):
        found = Search(
            question.graph, question.profile, question.workload, space, question.wishes,
            limit_seconds=limit_seconds, progress=progress,
        ).run()  # fmt: skip
    else:
        proof = Certificate(
            solver=question.wishes.solver, objective=0.0, bound=0.0, candidates=space.candidates,
            illegal=space.illegal, pruned=0, solved=0,
        )  # fmt: skip
        found = Found(best=(), certificate=proof, interrupted=False)
    return Answer(question=question, gpus=gpus, space=space, found=found)


class _Trials:
    """Numbers of GPUs, one after the other."""

    def __init__(self, question: Question, progress: Report) -> None:
        self.question, self.report = question, progress
        self.wishes, self.workload = question.wishes, question.workload
        self.until = time.monotonic() + (self.wishes.time_limit_seconds or math.inf)
        self.tried: list[Answer] = []
        self.refused: list[PlannerError] = []
        self.best: Answer | None = None
        self.value = math.inf
        self.bound = math.inf  # of what was not looked at to the end
        self.interrupted = False

    def run(self, counts: Sequence[int]) -> None:
        """Until all are tried, no other can be better, or time is up."""
        for place, gpus in enumerate(counts):
            left = self.until - time.monotonic()
            if self.interrupted or (place and left <= 0.0):
                self._stopped(float(gpus) if self.wishes.minimize == "gpus" else 0.0)
                return
            self._try(gpus, left)
            if self.best and self.wishes.minimize == "gpus":
                return

    def _stopped(self, bound: float) -> None:
        """What was not looked at to the end has no lower objective than this."""
        self.interrupted, self.bound = True, min(self.bound, bound)

    def _try(self, gpus: int, left_seconds: float) -> None:
        limit = step_limit_seconds(self.wishes, self.workload, gpus, self.value)
        timed = max(left_seconds, 1e-3) if math.isfinite(left_seconds) else 0.0
        question = replace(self.question, wishes=replace(self.wishes, time_limit_seconds=timed))
        last = [0.0]
        try:
            found = searched(question, gpus, limit_seconds=limit, progress=self._told(last))
        except PlannerError as error:
            self.refused.append(error)
            return
        except KeyboardInterrupt:
            self._stopped(0.0)
            return
        found = replace(found, question=self.question)  # whose time limit is that of all numbers together
        self.tried.append(found)
        if found.found.best:
            value = value_of(self.wishes, self.workload, gpus, found.found.best[0].seconds)
            if value < self.value:
                self.best, self.value = found, value
        if found.found.interrupted:
            bound = found.found.certificate.bound if found.found.best else min(last[0], limit)
            self._stopped(value_of(self.wishes, self.workload, gpus, bound))

    def _told(self, last: list[float]) -> Report:
        """Progress over all numbers of GPUs; keeps the last bound."""
        before = [item.found.certificate for item in self.tried]
        explored = sum(item.solved for item in before)
        candidates = sum(item.candidates - sum(item.illegal.values()) for item in before)

        def report(progress: Progress) -> None:
            last[0] = progress.bound_seconds
            self.report(
                replace(
                    progress,
                    explored=explored + progress.explored,
                    candidates=candidates + progress.candidates,
                )
            )

        return report

    def answer(self) -> Answer:
        """The best of what was tried."""
        if not self.tried:
            if self.refused and not self.interrupted:
                raise self.refused[0]
            raise KeyboardInterrupt
        chosen = self.best or max(self.tried, key=lambda item: item.gpus)
        objective = self.value if self.best else 0.0
        proofs = [item.found.certificate for item in self.tried]
        names = dict.fromkeys(name for proof in proofs for name in proof.illegal)
        certificate = Certificate(
            solver=self.wishes.solver,
            minimize=self.wishes.minimize,
            objective=objective,
            bound=min(self.bound, objective),
            candidates=sum(proof.candidates for proof in proofs),
            illegal={name: sum(proof.illegal.get(name, 0) for proof in proofs) for name in names},
            pruned=sum(proof.pruned for proof in proofs),
            solved=sum(proof.solved for proof in proofs),
        )
        best = self.best.found.best if self.best else ()
        return replace(chosen, found=Found(best=best, certificate=certificate, interrupted=self.interrupted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Time and memory of an arrangement, without its intervals and warnings."""

    step: StepTime
    memory: tuple[Memory, ...]  # of every stage

    @property
    def memory_bytes(self) -> float:
        """Of the fullest stage."""
        return max(item.device_bytes for item in self.memory)


def figures(question: Question, arrangement: Arrangement) -> Figures:
    """What an arrangement costs."""
    cost = TrainingCost(question.graph, question.profile, question.workload, arrangement.ways)
    shared = cost.alone(arrangement.strategy, arrangement.layers, arrangement.ways)
    seconds = zip(PARTS, shared.parts()[:, 0].tolist(), strict=True)
    memory = shared.memory()
    return Figures(
        step=StepTime(**{f"{part}_seconds": value for part, value in seconds}),
        memory=tuple(memory.memory(rank, 0) for rank in range(arrangement.strategy.pp)),
    )


def runners_up(given: Answer) -> tuple[RunnerUp, ...]:
    """The best that the search saw with other degrees, and why each lost.

    Degrees that cannot win are given up as soon as that is known: solved to the end some of these would lose by
    much less, yet none would win.
    """
    if not given.found.best:
        return ()
    question = given.question
    best, *others = given.found.best[: 1 + _MOST_RUNNERS_UP]
    step = figures(question, best.arrangement).step
    found = []
    for other in others:
        known = figures(question, other.arrangement)
        found.append(
            RunnerUp(
                strategy=settled(question.graph, other.arrangement).strategy,
                objective=value_of(question.wishes, question.workload, given.gpus, other.seconds),
                memory_bytes=known.memory_bytes,
                reason=reason_of(step, known.step),
            )
        )
    return tuple(found)
