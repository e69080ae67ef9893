"""An exact simulation of one pipeline flush, event by event: what each rank runs and when.

Every rank runs its actions in the given order, each as soon as the rank is free and its input has arrived. A
message between neighbouring virtual stages on different ranks takes a hop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlannerError
from planner.spec.orders import Action, Kind, Orders

# what an action adds to the microbatches held
_HELD = {"F": 1, "B": -1, "I": -1, "W": 0}


class Event(NamedTuple):
    """What a rank does for a while: compute, wait for a message under way, or send one if sends block."""

    rank: int
    kind: Kind | Literal["receive", "send"]
    stage: int
    microbatch: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The events of every rank in the order of time; gaps between them are bubbles."""

    ranks: tuple[tuple[Event, ...], ...]
    stages: tuple[tuple[int, ...], ...]  # virtual stages of each rank, in the order of the model

    @cached_property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max((events[-1].end_seconds for events in self.ranks if events), default=0.0)

    @cached_property
    def busy_seconds(self) -> NDArray[np.float64]:
        """Seconds that each rank computes."""
        return self._sums(lambda event: event.kind in _HELD)

    @cached_property
    def communication_seconds(self) -> NDArray[np.float64]:
        """Seconds that each rank sends, or has nothing to do but wait for a message under way."""
        return self._sums(lambda event: event.kind in ("receive", "send"))

    @property
    def bubble_seconds(self) -> NDArray[np.float64]:
        """Seconds left of each rank: nothing to do and nothing under way to it."""
        return self.seconds - self.busy_seconds - self.communication_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data: totals of each rank, and its events in the order of time."""
        sums = zip(self.busy_seconds, self.communication_seconds, self.bubble_seconds, self.ranks, strict=True)
        return {
            "seconds": self.seconds,
            "ranks": [
                {
                    "busy_seconds": float(busy),
                    "communication_seconds": float(communication),
                    "bubble_seconds": float(bubble),
                    "events": [event._asdict() for event in events],
                }
                for busy, communication, bubble, events in sums
            ],
        }

    @property
    def in_flight(self) -> NDArray[np.int64]:
        """Microbatches held per rank and virtual stage when a rank first holds most: forward run, backward not.

        Of a backward in two parts the input part counts.
        """
        return np.array([self._held(rank) for rank in range(len(self.ranks))])

    def _sums(self, counts: Callable[[Event], bool]) -> NDArray[np.float64]:
        counted = [[event for event in events if counts(event)] for events in self.ranks]
        return np.array([sum(event.end_seconds - event.start_seconds for event in events) for events in counted])

    def _held(self, rank: int) -> list[int]:
        turns = {stage: turn for turn, stage in enumerate(self.stages[rank])}
        held = [0] * len(turns)
        peak = list(held)
        for event in self.ranks[rank]:
            if event.kind in _HELD:
                held[turns[event.stage]] += _HELD[event.kind]
                if sum(held) > sum(peak):
                    peak = list(held)
        return peak


def simulate(
    orders: Orders,
    forward: Sequence[float],
    backward: Sequence[float],
    weight: Sequence[float] | None = None,
    hop_seconds: float | Sequence[float] = 0.0,
    *,
    blocking_sends: bool = False,
) -> Timeline:
    """Runs the orders with seconds per virtual stage; `weight` is the part of `backward` that W runs.

    `hop_seconds`: of every boundary, or one for each. Sends go on beside the sender's next action, or with
    `blocking_sends` keep it busy.
    """
    durations, hops = _durations(orders, forward, backward, weight), _hops(hop_seconds, len(forward))
    run = _Run(orders, durations, hops, blocking_sends)
    run.to_the_end()
    return Timeline(ranks=tuple(map(tuple, run.events)), stages=run.stages)


class _Run:
    """Ranks stand at an action each; one whose input is missing sleeps until its producer wakes it."""

    def __init__(
        self, orders: Orders, durations: Mapping[str, Sequence[float]], hops: Sequence[float], blocking: bool
    ) -> None:
        self.orders, self.durations, self.hops, self.blocking = orders, durations, hops, blocking
        self.stages = tuple(tuple(sorted({action.stage for action in rank})) for rank in orders)
        self.rank_of = {stage: rank for rank, stages in enumerate(self.stages) for stage in stages}
        self.last = len(hops)
        self.events: list[list[Event]] = [[] for _ in orders]
        self.clocks = [0.0] * len(orders)
        self.sent: dict[tuple[str, int, int], tuple[float, float]] = {}  # by consumer: when sent, when there
        self.sleeping: dict[tuple[str, int, int], int] = {}

    def to_the_end(self) -> None:
        """Runs every rank; an error if some wait for each other."""
        awake, places = list(range(len(self.orders))), [0] * len(self.orders)
        while awake:
            rank = awake.pop()
            order = self.orders[rank]
            while places[rank] < len(order):
                action = order[places[rank]]
                needed = self._input(action)
                if needed is not None and needed not in self.sent:
                    self.sleeping[needed] = rank
                    break
                places[rank] += 1
                woken = self._do(rank, action, needed)
                if woken is not None:
                    awake.append(woken)
        for rank, order in enumerate(self.orders):
            if places[rank] < len(order):
                raise PlannerError(
                    "an order lets every action have its input in the end",
                    value=f"rank {rank} waits for the input of {order[places[rank]]}",
                    remedy="give orders that some schedule makes",
                    key="orders",
                )

    def _input(self, action: Action) -> tuple[str, int, int] | None:
        """What an action waits for besides its rank."""
        kind, stage, microbatch = action
        if kind == "F":
            return None if stage == 0 else ("F", stage, microbatch)
        return (kind if kind == "W" else "B", stage, microbatch)

    def _do(self, rank: int, action: Action, needed: tuple[str, int, int] | None) -> int | None:
        """Runs an action, sends its result, and says which rank that wakes."""
        kind, stage, microbatch = action
        free = start = self.clocks[rank]
        if needed is not None:
            sent, there = self.sent.pop(needed)
            start = max(free, there)
            if start > max(free, sent):
                self.events[rank].append(Event(rank, "receive", stage, microbatch, max(free, sent), start))
        end = start + self.durations[kind][stage]
        self.events[rank].append(Event(rank, kind, stage, microbatch, start, end))
        self.clocks[rank] = end
        if kind == "I":
            self.sent["W", stage, microbatch] = (end, end)
        if kind == "W" or (kind != "F" and stage == 0):
            return None
        if kind == "F" and stage == self.last:
            self.sent["B", stage, microbatch] = (end, end)
            return None
        return self._send(rank, action, end)

    def _send(self, rank: int, action: Action, end: float) -> int | None:
        kind, stage, microbatch = action
        target, boundary = (stage + 1, stage) if kind == "F" else (stage - 1, stage - 1)
        consumer = ("F" if kind == "F" else "B", target, microbatch)
        hop = self.hops[boundary] if self.rank_of.get(target) != rank else 0.0
        if hop and self.blocking:
            self.events[rank].append(Event(rank, "send", stage, microbatch, end, end + hop))
            self.clocks[rank] = end + hop
        self.sent[consumer] = (end, end + hop)
        return self.sleeping.pop(consumer, None)


def _durations(
    orders: Orders, forward: Sequence[float], backward: Sequence[float], weight: Sequence[float] | None
) -> dict[str, list[float]]:
    stages = 1 + max((action.stage for rank in orders for action in rank), default=0)
    parts = [float(seconds) for seconds in (weight if weight is not None else [0.0] * len(backward))]
    whole = [float(seconds) for seconds in backward]
    for key, values in (("forward", forward), ("backward", whole), ("weight", parts)):
        if len(values) != stages:
            raise PlannerError(
                f"{key} has seconds for each virtual stage",
                value=len(values),
                remedy=f"give {stages} numbers",
                key=key,
            )
    return {
        "F": [float(seconds) for seconds in forward],
        "B": whole,
        "I": [both - part for both, part in zip(whole, parts, strict=True)],
        "W": parts,
    }


def _hops(hop_seconds: float | Sequence[float], stages: int) -> list[float]:
    hops = np.asarray(hop_seconds, dtype=float)
    if hops.ndim and hops.shape != (stages - 1,):
        raise PlannerError(
            "hop_seconds is one number, or one for each boundary between virtual stages",
            value=hops.shape,
            remedy=f"give {stages - 1} numbers",
            key="hop_seconds",
        )
    return [float(hop) for hop in np.broadcast_to(hops, stages - 1)]
