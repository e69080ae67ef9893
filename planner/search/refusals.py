"""Why nothing fits: the limit that binds, by how much, and the nearest changes with which something does.

The candidate that comes closest is that of least memory among even pipelines, every layer recomputed alike, and
cut as usual or, where shared weights would be cut unlike one another, in the nearest way: candidates are priced in
the order of their memory's bound until no bound left is below the least price. Each change is solved again, so it
is told only where the best layout with it is known.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.cost.training import TrainingCost
from planner.cost.uncertainty import memory_headroom
from planner.cost.ways import Way
from planner.errors import PlannerError
from planner.search.answers import Answer, Question, answer, figures
from planner.search.bounds import bounds
from planner.search.chain import Chain
from planner.search.choices import choices_of
from planner.search.prices import LeastPrices
from planner.search.space import Space
from planner.search.variations import (
    capacity_bytes,
    every_recompute,
    every_schedule,
    limits_recompute,
    limits_schedules,
    plain_wishes,
    released,
    with_more_memory,
    with_wishes,
)
from planner.spec.legality import violations
from planner.spec.misfit import Change, Closest, Limit, Misfit
from planner.spec.strategy import Strategy
from planner.spec.wishes import RECOMPUTES, SCHEDULES
from planner.units import GIB, in_binary_bytes

_BATCH = 128  # candidates priced together
_SECONDS = 30.0
_MULTIPLES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of the GPUs
_HALVINGS = 6  # of the sequence
_ROOM = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class _Try:
    """A change: how it is called, the question with it, and the numbers of GPUs."""

    flags: str
    question: Question
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Changes of one kind, the nearest first; the first that helps is told."""

    name: str
    tries: tuple[_Try, ...]


def why_not(question: Question, gpus: Sequence[int], *, seconds: float = _SECONDS) -> Misfit:
    """Of a question without an answer: what binds, and what would fit; no change is begun after `seconds`."""
    until = time.monotonic() + seconds
    question = with_wishes(question, time_limit_seconds=0.0)
    counts = tuple(sorted(set(gpus)))
    spaces = _spaces(question, counts)
    illegal = {
        name: sum(space.illegal.get(name, 0) for space in spaces.values())
        for name in dict.fromkeys(name for space in spaces.values() for name in space.illegal)
    }
    legal = {count: space for count, space in spaces.items() if len(space)}
    nearest = closest(question, legal[max(legal)]) if legal else None
    limit: Limit = "memory" if legal else "rules"
    best = 0.0
    if nearest is not None and not nearest.missing_bytes:
        limit = "time"
        if question.wishes.minimize == "gpus":
            found = answer(replace(question, wishes=plain_wishes(question.wishes)), counts).found
            if found.best:
                limit, best = "deadline", found.best[0].seconds
    known = Misfit(
        limit=limit,
        gpus=counts,
        candidates=sum(space.candidates for space in spaces.values()),
        illegal=illegal,
        broken=_broken(question, max(counts)) if limit == "rules" else "",
        capacity_bytes=capacity_bytes(question),
        closest=nearest if limit in ("memory", "time") else None,
        deadline_seconds=question.wishes.deadline_seconds if limit == "deadline" else 0.0,
        best_seconds=best,
    )
    return _with_changes(known, question, until)


def _spaces(question: Question, counts: Sequence[int]) -> dict[int, Space]:
    """The candidates of every number of GPUs that the fixed degrees divide."""
    found = {count: _space(question, count) for count in counts}
    sound = {count: space for count, space in found.items() if isinstance(space, Space)}
    if not sound:
        raise next(error for error in found.values() if isinstance(error, PlannerError))
    return sound


def _space(question: Question, gpus: int) -> Space | PlannerError:
    try:
        return question.space(gpus)
    except PlannerError as error:
        return error


def _broken(question: Question, gpus: int) -> str:
    """The rules that a plain layout breaks: the fixed degrees, and data parallelism over what they leave."""
    given = dict(question.wishes.fix.given)
    taken = question.wishes.fix.gpus_unit
    if "dp" not in given and gpus % taken == 0:
        given["dp"] = gpus // taken
    found = violations(question.spec, question.workload, Strategy(**given), gpus)
    return "; ".join(f"{item.rule}, got {item.value}" for item in found[:2])


def closest(question: Question, space: Space) -> Closest:
    """The least memory of an even pipeline, whether it fits or not."""
    wishes, words = question.wishes, question.wishes.allowed_recompute
    choices = choices_of(question.graph, cut=bool((space.layouts.tp > 1).any()))
    cost = TrainingCost(question.graph, question.profile, question.workload, choices.ways(question.graph, words))
    prices = LeastPrices(cost.pricer, choices, space.layouts)
    least = bounds(cost.pricer, prices, space.layouts, Chain.of(question.graph).layers).device_bytes
    ways = [Way(block=item.block, whole=choices.together[0][item.block]) for item in question.graph.sequence]
    usual = TrainingCost(question.graph, question.profile, question.workload, ways)
    order = np.argsort(least, kind="stable")
    best, chosen = np.inf, Strategy()
    for first in range(0, len(order), _BATCH):
        rows = order[first : first + _BATCH]
        if least[rows[0]] >= best:
            break
        some = [space.strategy(int(row)) for row in rows]
        tried = [
            replace(strategy, recompute=word)
            for strategy in some
            for word in wishes.recompute_under(strategy.schedule, strategy.pp)
        ]
        device = usual.costs(tried, ways).device_bytes
        place = int(device.argmin())
        if device[place] < best:
            best, chosen = float(device[place]), tried[place]
    memory = usual.alone(chosen, ways=ways).memory()
    stage = int(memory.device[:, 0].argmax())
    return Closest(
        strategy=chosen,
        stage=stage,
        memory=memory.memory(stage, 0),
        high_bytes=best * memory_headroom(question.graph, question.profile, question.workload),
        capacity_bytes=capacity_bytes(question),
    )


def _with_changes(known: Misfit, question: Question, until: float) -> Misfit:
    changes: list[Change] = []
    failed: list[str] = []
    untried: list[str] = []
    for family in _families(known, question):
        found: Change | None = None
        late = False
        for item in family.tries:
            late = time.monotonic() > until
            found = None if late else _change(item)
            if late or found:
                break
        if found:
            changes.append(found)
        else:
            (untried if late else failed).append(family.name)
    if not changes and not untried:
        both = _combined(known, question)
        found = _change(both) if both else None
        if both:
            (changes.append(found) if found else failed.append(both.flags))
    return replace(known, changes=tuple(changes), failed=tuple(failed), untried=tuple(untried))


def _change(item: _Try) -> Change | None:
    """The best layout with a change; none where nothing fits still."""
    try:
        found = answer(item.question, item.gpus)
    except PlannerError:  # a rule that the change breaks: it is none that helps
        return None
    return _told(item, found) if found.found.best else None


def _told(item: _Try, found: Answer) -> Change:
    question, best = item.question, found.found.best[0]
    headroom = memory_headroom(question.graph, question.profile, question.workload)
    known = figures(question, best.arrangement)
    return Change(
        flags=item.flags.replace("{gpus}", str(found.gpus)),
        strategy=best.arrangement.strategy,
        gpus=found.gpus,
        step_seconds=best.seconds,
        memory_high_bytes=known.memory_bytes * headroom,
    )


def _families(known: Misfit, question: Question) -> Iterator[_Family]:
    """What may be changed, the most usual first."""
    counts, wishes = known.gpus, question.wishes
    if known.limit == "time":
        yield _one("leave --time-limit out", question, counts)
        return
    more = [count for count in _more(question, max(counts)) if count > max(counts)]
    if more:
        tries = tuple(_Try(flags=f"--gpus {count}", question=question, gpus=(count,)) for count in more)
        yield _Family(name=f"up to {more[-1]:,} GPUs", tries=tries)
    if limits_recompute(question):
        yield _one("allow recompute", every_recompute(question), counts)
    if limits_schedules(question):
        yield _one("allow every schedule", every_schedule(question), counts)
    for key in wishes.fix.given:
        if key != "recompute":
            yield _one(f"leave {key} free", released(question, key), counts)
    if known.closest is not None:
        yield from _memory(question, known.closest, counts)
    if known.limit != "deadline" and (question.spec is None or question.spec.vision is None):
        yield _sequences(question, counts)
    if known.limit == "rules":
        yield _batches(question, counts)
    if question.workload.precision in ("bf16", "fp16", "fp32") and "fp8" in question.profile.gemm:
        lower = replace(question, workload=replace(question.workload, precision="fp8"))
        yield _one("--precision fp8", lower, counts)


def _one(flags: str, question: Question, gpus: tuple[int, ...]) -> _Family:
    return _Family(name=flags, tries=(_Try(flags=flags, question=question, gpus=gpus),))


def _more(question: Question, gpus: int) -> tuple[int, ...]:
    most = question.profile.largest_gpus or gpus * _MULTIPLES[-1]
    counts = [gpus * times for times in _MULTIPLES if gpus * times <= most]
    unit = question.wishes.fix.gpus_unit
    return tuple(sorted({*counts, *([unit * -(-gpus // unit)] if unit * -(-gpus // unit) <= most else [])}))


def _memory(question: Question, nearest: Closest, counts: tuple[int, ...]) -> Iterator[_Family]:
    """As much of the device as the closest candidate needs, or all of it."""
    device, wishes = question.profile.device.memory_bytes, question.wishes
    if wishes.max_memory_bytes and wishes.max_memory_bytes < device:
        needed = nearest.high_bytes / (1.0 - wishes.memory_margin) * (1.0 + _ROOM)
        tries = [
            _Try(
                flags=f"--max-memory {limit / GIB:.2f}GiB",
                question=with_wishes(question, max_memory_bytes=limit),
                gpus=counts,
            )
            for limit in (_rounded_up(needed), device)
            if wishes.max_memory_bytes < limit <= device
        ]
        yield _Family(name=f"--max-memory {device / GIB:.4g}GiB", tries=tuple(tries))
    elif wishes.memory_margin:
        yield _one("--memory-margin 0", with_wishes(question, memory_margin=0.0), counts)
    else:
        further = _rounded_up(nearest.missing_bytes / (1.0 - wishes.memory_margin))
        words = f"GPUs with {in_binary_bytes(further)} more memory"
        yield _one(words, with_more_memory(question, further), counts)


def _rounded_up(size: float) -> float:
    """To hundredths of a GiB, as flags have it."""
    return float(np.ceil(size / GIB * 100.0) / 100.0 * GIB)


def _sequences(question: Question, counts: tuple[int, ...]) -> _Family:
    """Half the tokens, a quarter, ..."""
    lengths = [question.workload.seq_len // 2**times for times in range(1, _HALVINGS + 1)]
    tries = tuple(
        _Try(
            flags=f"--seq-len {length}",
            question=replace(question, workload=replace(question.workload, seq_len=length)),
            gpus=counts,
        )
        for length in lengths
        if length
    )
    return _Family(name=f"down to {lengths[-1]:,} tokens a sequence", tries=tries)


def _batches(question: Question, counts: tuple[int, ...]) -> _Family:
    """The nearest multiples of the GPUs, and of what each of their divisors leaves."""
    now, sizes = question.workload.global_batch, set()
    for count in counts:
        for unit in {count, *(size for size in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if count % size == 0)}:
            sizes |= {now // unit * unit, -(-now // unit) * unit}
    nearest = sorted((size for size in sizes if size and size != now), key=lambda size: (abs(size - now), size))
    tries = tuple(
        _Try(
            flags=f"--global-batch {size}",
            question=replace(question, workload=replace(question.workload, global_batch=size)),
            gpus=counts,
        )
        for size in nearest
    )
    return _Family(name="another global batch", tries=tries)


def _combined(known: Misfit, question: Question) -> _Try | None:
    """Everything that is held by a wish released at once, where more than one thing is."""
    wishes = question.wishes
    held = [f"fixed {key}" for key in wishes.fix.given]
    held += ["recompute"] if wishes.recompute != RECOMPUTES else []
    held += ["schedules"] if wishes.schedules != SCHEDULES else []
    if len(held) < 2:
        return None
    free = every_schedule(every_recompute(released(question, *wishes.fix.given)))
    return _Try(flags=f"leave free what is held: {', '.join(held)}", question=free, gpus=known.gpus)
