"""Seconds of many pipeline flushes of one order at once: end = max(end of the rank's last action, input) + own.

The order of a schedule repeats: a head, equal turns, a tail. Each is compiled to steps of actions that wait for
none of one another, so that a step is a few array operations over its actions and all candidates. Once a turn
delays everything by the same time, so does every further one (the recurrence is linear in max and plus, and the
turns are equal): the turns left are then added up, exactly, and the cost does not grow with the microbatches.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.spec.orders import Action, Orders, round_orders, round_shape
from planner.spec.strategy import Schedule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_Rows: TypeAlias = slice | Ints

_SETTLED = 1e-10  # of a turn: by how much delays may differ and count as one
_MOST_PIECES = 4  # array operations that cost less than gathering the rows
_CACHE_ELEMENTS = 2**18  # numbers worked on at a time, so that they stay in the processor's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of candidates, virtual stages first; hops are 0 between virtual stages of one rank."""

    forward: Floats  # [virtual stage, candidate]
    backward: Floats  # its input part where a schedule splits it
    weight: Floats
    hops: Floats  # [boundary, candidate]


def flush_seconds(schedule: Schedule, pp: int, vpp: int, microbatches: Ints, times: Times) -> Floats:
    """From the first forward to the last backward, per candidate; those of one program are run together."""
    programs: dict[_Program, list[tuple[Ints, int]]] = {}
    for count in np.unique(microbatches):
        program, turns = _program(schedule, pp, vpp, int(count))
        programs.setdefault(program, []).append((np.flatnonzero(microbatches == count), turns))
    seconds = np.empty(len(microbatches))
    for program, members in programs.items():
        rows = np.concatenate([some for some, _ in members])
        turns_of = np.concatenate([np.full(len(some), turns) for some, turns in members])
        width = max(16, min(1024, _CACHE_ELEMENTS // program.rows))
        for first in range(0, len(rows), width):
            part = rows[first : first + width]
            seconds[part] = program.run(_rows(times, part), turns_of[first : first + width])
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Actions that wait for none of one another, in pieces: rows of the step, then rows of what goes into them."""

    rows: slice
    arrivals: tuple[tuple[slice, _Rows, _Rows], ...]  # messages (ends) and hops
    clocks: tuple[tuple[slice, _Rows], ...]  # the rank's action before (ends)
    late: tuple[tuple[slice, _Rows, _Rows], ...]  # the same and the weight part between (durations)
    own: tuple[tuple[slice, _Rows], ...]  # durations


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """A stretch of every rank's order, from one state (ranks' clocks, messages under way) to the next."""

    steps: tuple[_Step, ...]
    rows: int
    widest: int
    inputs: int
    out: Ints  # rows of the next state
    out_late: Ints

    def run(self, state: Floats, durations: Floats, hops: Floats) -> Floats:
        """The state after it."""
        candidates = state.shape[1]
        ends = np.empty((self.rows, candidates))
        ends[0] = 0.0
        ends[1 : 1 + self.inputs] = state
        start, clock = np.empty((2, self.widest, candidates))
        for step in self.steps:
            for rows, message, hop in step.arrivals:
                np.add(ends[message], hops[hop], out=start[rows])
            for rows, before in step.clocks:
                np.maximum(start[rows], ends[before], out=start[rows])
            for rows, before, weight in step.late:
                np.add(ends[before], durations[weight], out=clock[rows])
                np.maximum(start[rows], clock[rows], out=start[rows])
            end = ends[step.rows]
            for rows, own in step.own:
                np.add(start[rows], durations[own], out=end[rows])
        state_after: Floats = ends.take(self.out, axis=0) + durations.take(self.out_late, axis=0)
        return state_after


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Program:
    head: _Segment
    turn: _Segment | None
    tail: _Segment | None
    ranks: int

    @property
    def rows(self) -> int:
        """Most end times at once."""
        return max(segment.rows for segment in (self.head, self.turn, self.tail) if segment is not None)

    def run(self, rows: tuple[Floats, Floats], turns: Ints) -> Floats:
        """Seconds of each candidate."""
        durations, hops = rows
        state = self.head.run(np.zeros((self.head.inputs, durations.shape[1])), durations, hops)
        if self.turn is not None and self.tail is not None:
            state = _turned(self.turn, turns, state, durations, hops)
            state = self.tail.run(state, durations, hops)
        seconds: Floats = state[: self.ranks].max(axis=0)
        return seconds


def _turned(segment: _Segment, turns: Ints, state: Floats, durations: Floats, hops: Floats) -> Floats:
    """The state after each candidate's turns; those left once its delays have become one are added up."""
    state, left = state.copy(), turns.copy()
    while len(moving := np.flatnonzero(left)):
        before = state[:, moving]
        delay = segment.run(before, durations[:, moving], hops[:, moving]) - before
        longest = delay.max(axis=0)
        settled = longest - delay.min(axis=0) <= _SETTLED * longest
        left[moving] -= 1
        state[:, moving] = before + delay + np.where(settled, left[moving] * longest, 0.0)
        left[moving[settled]] = 0
    return state


def _rows(times: Times, part: Ints) -> tuple[Floats, Floats]:
    """Durations by row (forward, backward, weight, nothing) and hops by row (boundaries, nothing)."""
    nothing = np.zeros((1, times.forward[:, part].shape[1]))
    durations = np.concatenate([times.forward[:, part], times.backward[:, part], times.weight[:, part], nothing])
    return durations, np.concatenate([times.hops[:, part], nothing])


@functools.lru_cache(maxsize=256)
def _compiled(
    schedule: Schedule, pp: int, vpp: int, size: int, rounds: int, microbatches: int, turning: bool
) -> _Program:
    """The program of an order, whole or to be lengthened by turns."""
    sequences = round_orders(schedule, pp, vpp, size, rounds, microbatches)
    compiler = _Compiler(sequences, pp * vpp)
    ends = [len(sequence) for sequence in sequences]
    if not turning:
        return _Program(head=compiler.segment([0] * pp, ends), turn=None, tail=None, ranks=pp)
    first = _steady(schedule, pp, vpp, size)
    starts = [_forward(sequence, first - rank) for rank, sequence in enumerate(sequences)]
    again = [_forward(sequence, first - rank + vpp * size) for rank, sequence in enumerate(sequences)]
    turn = compiler.segment(starts, again)
    assert len(turn.out) == turn.inputs
    return _Program(
        head=compiler.segment([0] * pp, starts),
        turn=turn,
        tail=compiler.segment(starts, ends),
        ranks=pp,
    )


def _program(schedule: Schedule, pp: int, vpp: int, microbatches: int) -> tuple[_Program, int]:
    """The program of an order, and the turns between its head and its tail."""
    if schedule == "zbv":
        size, rounds, needed = pp, 1, 3 * pp
    else:
        size, rounds = round_shape(pp, microbatches)
        needed = _steady(schedule, pp, vpp, size) // vpp + 1 + size
        needed = -(-needed // size) * size if size * rounds == microbatches else needed + 2 * size
    turns = max(0, (microbatches - needed) // size)
    whole = schedule, pp, vpp, size, max(1, rounds - turns), microbatches - turns * size
    return _compiled(*whole, turns > 0), turns


def _steady(schedule: Schedule, pp: int, vpp: int, size: int) -> int:
    """Forwards of rank 0 after which actions repeat themselves; of rank i, i fewer."""
    return 3 * pp - 1 if schedule == "zbv" else (vpp - 1) * size + 2 * pp


def _forward(sequence: Sequence[Action], count: int) -> int:
    """Where the forward after so many stands in an order."""
    return [place for place, action in enumerate(sequence) if action.kind == "F"][count]


class _Task(NamedTuple):
    """An action by numbers. Messages are ordered by direction, the virtual stage they go to, then microbatch."""

    kind: str
    waits: int  # for this message; -1: for none
    makes: int
    hop: int  # row of hops
    duration: int  # row of durations


_Placed: TypeAlias = tuple[int, _Task, int]  # rank, task, row of a weight part's duration right after it


class _Compiler:
    """Numbers the actions of stretches of an order by the step in which they can run."""

    def __init__(self, orders: Orders, stages: int) -> None:
        self.stages = stages
        self.nothing = 3 * stages  # row of durations
        self.many = 1 + max(action.microbatch for order in orders for action in order)
        self.orders = [[self._task(action) for action in order] for order in orders]

    def _task(self, action: Action) -> _Task:
        kind, stage, microbatch = action
        ahead, last = kind == "F", self.stages - 1
        first = stage == (0 if ahead else last)
        # directions apart from one another, what leaves either end of the model included
        goes_to = stage if ahead else self.stages + 2 + stage
        message = goes_to * self.many + microbatch
        if kind == "W":  # on the rank of its input part
            return _Task(kind, waits=-1, makes=-2, hop=last, duration=2 * self.stages + stage)
        return _Task(
            kind,
            waits=-1 if first else message,
            makes=message + (self.many if ahead else -self.many),
            hop=last if first else stage - ahead,
            duration=stage if ahead else self.stages + stage,
        )

    def segment(self, starts: Sequence[int], ends: Sequence[int]) -> _Segment:
        """From before the actions at `starts` to before those at `ends`."""
        pending = self.pending(starts)
        inputs = len(starts) + len(pending)
        known = {message: 1 + len(starts) + place for place, message in enumerate(pending)}
        groups = self._by_step(starts, ends, known)
        left = self.pending(ends)
        blocks = self._blocks(groups, left)
        widest = max(map(len, groups))
        row_of = dict(known)
        last_row = [1 + rank if starts[rank] else 0 for rank in range(len(starts))]
        last_late = [self.nothing] * len(starts)
        steps = []
        for unsorted, block in zip(groups, blocks, strict=True):
            group = sorted(unsorted, key=lambda placed: (placed[1].kind, placed[0]))
            row = 1 + inputs + block * widest
            columns = []
            for place, (rank, task, late) in enumerate(group, row):
                message = row_of[task.waits] if task.waits >= 0 else 0
                columns.append((last_row[rank], last_late[rank], message, task.hop, task.duration))
                row_of[task.makes] = last_row[rank] = place
                last_late[rank] = late
            steps.append(self._step(row, columns))
        return _Segment(
            steps=tuple(steps),
            rows=1 + inputs + widest * (1 + max(blocks)),
            widest=widest,
            inputs=inputs,
            out=np.array(last_row + [row_of[message] for message in left]),
            out_late=np.array(last_late + [self.nothing] * len(left)),
        )

    def _step(self, row: int, columns: Sequence[tuple[int, ...]]) -> _Step:
        """A step from its rows of: action before, weight part between, message, hop, duration."""
        after, late, message, hop, duration = zip(*columns, strict=True)
        delayed = any(row != self.nothing for row in late)
        return _Step(
            rows=slice(row, row + len(columns)),
            arrivals=tuple((rows, first, second) for rows, (first, second) in _pieces(message, hop)),
            clocks=() if delayed else tuple((rows, only) for rows, (only,) in _pieces(after)),
            late=tuple((rows, clock, weight) for rows, (clock, weight) in _pieces(after, late)) if delayed else (),
            own=tuple((rows, only) for rows, (only,) in _pieces(duration)),
        )

    def _blocks(self, groups: Sequence[Sequence[_Placed]], left: Iterable[int]) -> list[int]:
        """A block of rows for each step, free again after the last step that reads one of them."""
        made_in: dict[int, int] = {}
        last_in: dict[int, int] = {}  # rank: step of its last action
        until = list(range(len(groups)))
        for step, group in enumerate(groups):
            for rank, task, _ in group:
                for source in (made_in.get(task.waits), last_in.get(rank)):
                    if source is not None:
                        until[source] = step
                made_in[task.makes] = last_in[rank] = step
        for kept in (*last_in.values(), *(made_in[message] for message in left if message in made_in)):
            until[kept] = len(groups)
        blocks, free, used = [], [], 0
        ending: dict[int, list[int]] = {}
        for step, last in enumerate(until):
            free += ending.pop(step - 1, [])
            if not free:
                free.append(used)
                used += 1
            blocks.append(free.pop())
            ending.setdefault(last, []).append(blocks[-1])
        return blocks

    def pending(self, cut: Sequence[int]) -> list[int]:
        """Messages made before a cut and needed after it, in an order that is the same for every turn."""
        if not any(cut):
            return []
        places = list(zip(self.orders, cut, strict=True))
        made = {task.makes for order, place in places for task in order[:place]}
        return sorted(made.intersection(task.waits for order, place in places for task in order[place:]))

    def _by_step(self, starts: Sequence[int], ends: Sequence[int], known: Iterable[int]) -> list[list[_Placed]]:
        """The tasks by step; a weight part alone after another task goes with that."""
        step_of: dict[int, int] = dict.fromkeys([-1, *known], -1)
        places, clocks = list(starts), [-1] * len(starts)
        groups: list[list[_Placed]] = []
        sleeping: dict[int, int] = {}
        awake = list(range(len(starts)))
        while awake:
            rank = awake.pop()
            order, place, end, clock = self.orders[rank], places[rank], ends[rank], clocks[rank]
            while place < end:
                task = order[place]
                arrives = step_of.get(task.waits)
                if arrives is None:
                    sleeping[task.waits] = rank
                    break
                place += 1
                clock = 1 + max(clock, arrives)
                late = self.nothing
                if place < end and task.kind != "W" and order[place].kind == "W":
                    late = order[place].duration
                    place += 1
                if clock == len(groups):
                    groups.append([])
                groups[clock].append((rank, task, late))
                step_of[task.makes] = clock
                woken = sleeping.pop(task.makes, None)
                if woken is not None:
                    awake.append(woken)
            places[rank], clocks[rank] = place, clock
        assert places == list(ends)
        return groups


def _pieces(*columns: Sequence[int]) -> list[tuple[slice, tuple[_Rows, ...]]]:
    """Row numbers as stretches in which each column rises or falls evenly; as they are if there are too many."""
    changes = list(
        zip(*([after - before for before, after in itertools.pairwise(column)] for column in columns), strict=True)
    )
    level = (0,) * len(columns)
    pieces: list[tuple[slice, tuple[_Rows, ...]]] = []
    first, count = 0, len(columns[0])
    while first < count:
        last = first
        while last < count - 1 and changes[last] == changes[first]:
            last += 1
        change = changes[first] if last > first else level
        rows = tuple(
            _stretch(column[first], column[last], step) for column, step in zip(columns, change, strict=True)
        )
        pieces.append((slice(first, last + 1), rows))
        first = last + 1
        if len(pieces) > _MOST_PIECES:
            return [(slice(0, count), tuple(np.array(column) for column in columns))]
    return pieces


def _stretch(first: int, last: int, change: int) -> slice:
    """Rows from the first to the last; one row if they are the same."""
    if change >= 0:
        return slice(first, last + 1, change or 1)
    return slice(first, last - 1 if last else None, change)
