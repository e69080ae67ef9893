"""What each pipeline rank runs, and in which order: the orders of torch.distributed.pipelining.

Virtual stage j lies on rank j mod p; under zbv rank i holds virtual stages i and 2p − 1 − i. Where torch takes a
number of microbatches, its order is given. Where an interleaved order needs more of them to fill its rounds, it is
that of the filled rounds without the surplus.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

from planner.errors import PlannerError
from planner.spec.strategy import Schedule

Kind = Literal["F", "B", "I", "W"]  # forward, whole backward, its input part, its weight part
ONE_STAGE_A_RANK: tuple[Schedule, ...] = ("gpipe", "1f1b")
SPLIT_BACKWARD: tuple[Schedule, ...] = ("zb", "zbv")  # these run it in two parts


def in_two_parts(schedule: Schedule, pp: int) -> bool:
    """Whether a pipeline runs its backward so: then nothing is run again."""
    return pp > 1 and schedule in SPLIT_BACKWARD


class Action(NamedTuple):
    """One microbatch through one virtual stage, forward or back."""

    kind: Kind
    stage: int
    microbatch: int


Orders: TypeAlias = tuple[tuple[Action, ...], ...]


def orders(schedule: Schedule, pp: int, vpp: int, microbatches: int) -> Orders:
    """The actions of every rank."""
    require_runnable(schedule, pp, vpp, microbatches)
    size, rounds = round_shape(pp, microbatches)
    return round_orders(schedule, pp, vpp, size, rounds, microbatches)


def round_orders(schedule: Schedule, pp: int, vpp: int, size: int, rounds: int, microbatches: int) -> Orders:
    """The same with the rounds of interleaved schedules given, of `size` microbatches each; the surplus is cut."""
    ranks = range(pp)
    if schedule == "gpipe":
        sequences = [_one_after_another(rank, microbatches, microbatches) for rank in ranks]
    elif schedule == "1f1b":
        sequences = [_one_after_another(rank, microbatches, min(microbatches, pp - rank)) for rank in ranks]
    elif schedule == "zbv":
        sequences = [_v_shaped(rank, pp, max(2 * pp - 1, microbatches)) for rank in ranks]
    else:
        sequences = [_in_rounds(rank, pp, vpp, size, rounds, schedule == "zb") for rank in ranks]
    return tuple(
        tuple(action for action in sequence if action.microbatch < microbatches) for sequence in sequences
    )


def round_shape(pp: int, microbatches: int) -> tuple[int, int]:
    """Microbatches of a round of the interleaved schedules, and rounds: as many as have p microbatches each."""
    rounds = max(1, microbatches // pp)
    return -(-microbatches // rounds), rounds


def warmup_chunks(schedule: Schedule, rank: int, pp: int, vpp: int, size: int) -> int:
    """Forwards of an interleaved schedule that a rank is ahead of its backwards, between two pairs."""
    return (vpp - 1) * size + (1 if schedule == "zb" else 2) * (pp - 1 - rank)


def stage_ranks(schedule: Schedule, pp: int, vpp: int) -> tuple[int, ...]:
    """The rank of each virtual stage, in the order of the model."""
    ranks = tuple(range(pp))
    return ranks + ranks[::-1] if schedule == "zbv" else ranks * vpp


def rank_stages(schedule: Schedule, pp: int, vpp: int) -> tuple[tuple[int, ...], ...]:
    """The virtual stages of each rank, in the order of the model."""
    placed = stage_ranks(schedule, pp, vpp)
    return tuple(tuple(stage for stage, at in enumerate(placed) if at == rank) for rank in range(pp))


def messages(schedule: Schedule, pp: int, vpp: int, stage: int) -> dict[Kind, int]:
    """Where a virtual stage sends what it makes: the neighbour's rank after a forward, and after a backward.

    Nothing is sent at the ends of the model, nor to a neighbour on the same rank, which takes it as it is.
    """
    ranks = stage_ranks(schedule, pp, vpp)
    found: dict[Kind, int] = {}
    if stage + 1 < len(ranks):
        found["F"] = ranks[stage + 1]
    if stage > 0:
        found["B"] = found["I"] = ranks[stage - 1]
    return {kind: rank for kind, rank in found.items() if rank != ranks[stage]}


def require_runnable(schedule: Schedule, pp: int, vpp: int, microbatches: int) -> None:
    """An error for sizes that a schedule cannot have."""
    for key, value in (("pp", pp), ("vpp", vpp), ("microbatches", microbatches)):
        if value < 1:
            raise PlannerError(f"{key} is at least 1", value=value, remedy="use 1 or more", key=key)
    if schedule in ONE_STAGE_A_RANK and vpp > 1:
        raise PlannerError(
            f"{schedule} has one stage a rank", value=vpp, remedy="use interleaved, or vpp 1", key="vpp"
        )
    if schedule == "zbv" and vpp != 2:
        raise PlannerError("zbv has two stages a rank", value=vpp, remedy="set vpp to 2", key="vpp")


def _one_after_another(rank: int, microbatches: int, ahead: int) -> Iterator[Action]:
    """One stage a rank: `ahead` forwards, then backward and forward in turn. All of them ahead is GPipe."""
    for microbatch in range(ahead):
        yield Action("F", rank, microbatch)
    for microbatch in range(microbatches):
        yield Action("B", rank, microbatch)
        if microbatch + ahead < microbatches:
            yield Action("F", rank, microbatch + ahead)


def _in_rounds(rank: int, pp: int, vpp: int, size: int, rounds: int, split: bool) -> Iterator[Action]:
    """Interleaved: a round takes its microbatches through one virtual stage after the other.

    `split`: backward in two parts, the weight part as many backwards late as the rank has ranks before it.
    """
    count = size * rounds * vpp
    ahead = min(warmup_chunks("zb" if split else "interleaved", rank, pp, vpp, size), count)

    def action(kind: Kind, place: int) -> Action:
        turn, within = divmod(place, size)
        step = turn % vpp
        local = step if kind == "F" else vpp - 1 - step
        return Action(kind, local * pp + rank, turn // vpp * size + within)

    for place in range(ahead):
        yield action("F", place)
    for place in range(count):
        if place + ahead < count:
            yield action("F", place + ahead)
        yield action("I" if split else "B", place)
        if split and place >= rank:
            yield action("W", place - rank)
    if split:
        for place in range(max(0, count - rank), count):
            yield action("W", place)


def _v_shaped(rank: int, pp: int, microbatches: int) -> Iterator[Action]:
    """ZB-V: down the ranks and back up; two forwards and two backwards in turn, weight parts fill the end."""
    down, up = rank, 2 * pp - 1 - rank
    after = pp - rank  # ranks from this one on
    first_down = 2 * after - 1
    for microbatch in range(first_down):
        yield Action("F", down, microbatch)
    for microbatch in range(rank):
        yield Action("F", up, microbatch)
        yield Action("F", down, first_down + microbatch)
    for microbatch in range(after):
        yield Action("F", up, rank + microbatch)
        yield Action("I", up, microbatch)
        yield Action("W", up, microbatch)
    for microbatch in range(microbatches - pp):
        if microbatch + pp + after - 1 < microbatches:
            yield Action("F", down, microbatch + pp + after - 1)
        yield Action("I", down, microbatch)
        yield Action("W", down, microbatch)
        yield Action("F", up, microbatch + pp)
        yield Action("I", up, microbatch + after)
        yield Action("W", up, microbatch + after)
    for microbatch in range(rank):
        yield Action("I", down, microbatches - pp + microbatch)
        yield Action("I", up, microbatches - rank + microbatch)
    for microbatch in range(microbatches - after, microbatches):
        yield Action("I", down, microbatch)
        yield Action("W", down, microbatch - rank)
    for stage in (up, down):
        for microbatch in range(microbatches - rank, microbatches):
            yield Action("W", stage, microbatch)
