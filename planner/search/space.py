"""Every candidate of a plan: all legal strategies as columns, and how many others fell to which rule.

The space, of so many GPUs. A key that the wishes fix has that value alone, be it outside these ranges.

- tp, pp, cp, dp: every factorisation of the GPUs. Of a user's own module nobody says where tp may cut it: tp is 1;
  pp is at most its layers, embedding and head counted as one each, 1 where it has no layers; and the executor does
  not spread its sequences: cp is 1.
- ep: the divisors of tp·cp·dp, etp: 1 or tp, for a model with experts; else 1.
- schedule: those allowed. vpp: 1 for gpipe and 1f1b; 2 to 8 for interleaved and zb and 2 for zbv, where pp·vpp
  divides the layers, with or without embedding and head.
- microbatch: of the divisors of global_batch/dp all up to 8, and beyond the powers of two (to 2¹⁹). Where dp does
  not divide the batch, 1 stands for all.
- zero: 0 to 3. dp_replicate: 1 for zero 0, else the divisors of dp.
- sp: off and on. order: tp-cp-dp-pp and tp-cp-pp-dp.

The same run is there once. With tp 1 sp splits nothing and is off, even if fixed. With pp 1 nothing is scheduled:
1f1b stands for all schedules. With dp or pp 1 the two orders are one, tp-cp-dp-pp. With zero 0 every rank is a
copy, however dp_replicate is written. ZeRO stages stay apart even on one rank: 3 drops working copies of weights.
Not searched here are overlap and grad_dtype, which are fixed or neutral, and recomputation, which is decided block
by block; its column says none.

Candidates are never listed one by one. For each factorisation the other keys are axes of an array; a rule is asked
once for each combination of the keys that it reads, and its answer is as small an array as those keys span. Rules
come in the order of RULES, so an illegal candidate counts under the first that it breaks, and a degree that
nothing can save costs one question.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from planner.cost.layouts import Bools, Layouts
from planner.errors import PlannerError
from planner.spec.legality import READS, RULES, Case
from planner.spec.model import ModelSpec
from planner.spec.strategy import Overlap, Strategy
from planner.spec.wishes import Wishes
from planner.spec.workload import TrainWorkload
from planner.units import bytes_per_element

DEGREES = ("tp", "pp", "cp", "dp")
AXES = (("ep", "etp"), ("schedule", "vpp"), ("microbatch",), ("zero", "dp_replicate"), ("sp",), ("order",))
ORDERS = ("tp-cp-dp-pp", "tp-cp-pp-dp")

_AXIS_OF = {key: place for place, keys in enumerate(AXES) for key in keys}
_AXES_READ = {
    name: tuple(sorted({_AXIS_OF[key] for key in keys if key in _AXIS_OF})) for name, keys in READS.items()
}
_SMALL_MICROBATCH = 8
_LARGEST_MICROBATCH = 2**19  # the largest power of two that a strategy may have
_MOST_VIRTUAL_STAGES = 8

Options = tuple[tuple[Any, ...], ...]  # of one axis: each a value for every key of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The legal candidates, a row each in a fixed order, and how many others broke which rule first."""

    layouts: Layouts
    illegal: dict[str, int]  # by the names of RULES, in their order
    grad_dtype: Literal["fp32", "bf16", "fp16"]

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def candidates(self) -> int:
        """Legal and illegal ones."""
        return len(self) + sum(self.illegal.values())

    def strategy(self, row: int) -> Strategy:
        """One candidate by itself."""
        columns = self.layouts
        whole = (*DEGREES, "ep", "etp", "vpp", "microbatch", "zero", "dp_replicate")
        keys: dict[str, Any] = {key: int(getattr(columns, key)[row]) for key in whole}
        keys |= {key: str(getattr(columns, key)[row]) for key in ("recompute", "schedule", "order")}
        overlap = {axis: bool(getattr(columns, f"overlap_{axis}")[row]) for axis in ("tp", "dp", "ep", "pp")}
        return Strategy(**keys, sp=bool(columns.sp[row]), overlap=Overlap(**overlap), grad_dtype=self.grad_dtype)


def space_of(
    model: ModelSpec | None, workload: TrainWorkload, gpus: int, wishes: Wishes, *, layers: int = 0
) -> Space:
    """The candidates of a model on so many GPUs.

    `layers` are those of a user's own module, that has no spec; without any it is one stage.
    """
    if model is None and not layers and (wishes.fix.pp or 1) > 1:
        raise PlannerError(
            "the stages of a pipeline are made of layers, members of one list that hand one hidden state on",
            value=f"pp {wishes.fix.pp}, and no such list in the model",
            remedy="let each member of an nn.ModuleList take what the one before it returned, or fix pp=1",
            key="fix",
        )
    ranges = _Ranges(model, workload, gpus, wishes, layers if model is None else model.layers)
    # what is run again is chosen later, by block: here counts the least of it
    same = {"attention_dp": 1, "replicas": 1, "recompute": wishes.allowed_recompute[0]}
    judge = _Judge(model=model, workload=workload, gpus=gpus, same=same)
    parts = [judge.judged(degrees, ranges.axes(degrees)) for degrees in ranges.degrees()]
    if not parts:
        raise _no_factorisation(gpus, wishes)
    legal = [part for part in parts if part.legal]
    illegal = {name: sum(part.illegal.get(name, 0) for part in parts) for name in RULES}
    return Space(
        layouts=_columns(legal, workload.global_batch, wishes),
        illegal={name: count for name, count in illegal.items() if count},
        grad_dtype=wishes.fix.grad_dtype or "fp32",
    )


def _no_factorisation(gpus: int, wishes: Wishes) -> PlannerError:
    unit = wishes.fix.gpus_unit
    return PlannerError(
        f"the fixed degrees and those left free have {gpus} GPUs as their product",
        value=", ".join(f"{key} {value}" for key, value in wishes.fix.given.items() if key in DEGREES),
        remedy=f"give {unit} GPUs{' or a multiple' if gpus % unit else ''}, or leave one of them free",
        key="fix",
    )


class _Part(NamedTuple):
    """The candidates of one factorisation."""

    degrees: tuple[int, ...]
    axes: tuple[Options, ...]
    alive: Bools  # which are legal, along the axes; 1 long where all of an axis are alike
    illegal: dict[str, int]

    @property
    def legal(self) -> int:
        return _spread(self.alive, self.axes)


def _spread(marks: Bools, axes: Sequence[Options]) -> int:
    """Candidates that are marked, an axis of length 1 standing for all of it."""
    return int(np.count_nonzero(marks)) * math.prod(map(len, axes)) // max(1, marks.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """Asks the rules, each question once."""

    model: ModelSpec | None
    workload: TrainWorkload
    gpus: int
    same: dict[str, Any]  # in all candidates
    answers: dict[str, dict[tuple[Any, ...], bool]] = field(default_factory=lambda: {name: {} for name in RULES})
    tables: dict[Any, tuple[Bools, Bools]] = field(default_factory=dict)  # answers along axes; which were asked

    def breaks(self, name: str, values: tuple[Any, ...]) -> bool:
        """Whether a strategy whose keys READS[name] have these values breaks that rule."""
        known = self.answers[name]
        if values not in known:
            strategy = Strategy(**dict(zip(READS[name], values, strict=True)))
            known[values] = RULES[name](Case(self.model, self.workload, strategy, self.gpus)) is not None
        return known[values]

    def judged(self, degrees: tuple[int, ...], axes: tuple[Options, ...]) -> _Part:
        """Which candidates of a factorisation are legal, and the first rule that the others break."""
        alive = np.ones((1,) * len(axes), dtype=np.bool_)
        illegal = {}
        for name in RULES if all(axes) else ():
            broken = self._broken(name, alive, degrees, axes)
            count = _spread(alive & broken, axes)
            if count:
                illegal[name] = count
                alive = alive & ~broken
                if not alive.any():
                    break
        return _Part(degrees, axes, alive if all(axes) else np.zeros_like(alive), illegal)

    def _broken(self, name: str, alive: Bools, degrees: tuple[int, ...], axes: tuple[Options, ...]) -> Bools:
        """The rule's answer along the axes that it reads, asked only where a candidate is still alive."""
        read = _AXES_READ[name]
        others = tuple(place for place in range(len(axes)) if place not in read)
        asked = alive.any(axis=others, keepdims=True)
        known: dict[str, Any] = dict(zip(DEGREES, degrees, strict=True)) | self.same
        key = name, tuple(known[key] for key in READS[name] if key in known), tuple(axes[axis] for axis in read)
        if key not in self.tables:
            shape = tuple(len(axis) if place in read else 1 for place, axis in enumerate(axes))
            self.tables[key] = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
        broken, told = self.tables[key]
        for place in zip(*(asked & ~told).nonzero(), strict=True):
            for axis in read:
                known.update(zip(AXES[axis], axes[axis][place[axis]], strict=True))
            broken[place] = self.breaks(name, tuple(known[key] for key in READS[name]))
            told[place] = True
        return broken


class _Ranges:
    """The values that each key takes."""

    def __init__(
        self, model: ModelSpec | None, workload: TrainWorkload, gpus: int, wishes: Wishes, layers: int
    ) -> None:
        self.model, self.workload, self.gpus, self.wishes = model, workload, gpus, wishes
        self.layers, self.fix = layers, wishes.fix

    def degrees(self) -> Iterator[tuple[int, ...]]:
        """tp, pp, cp, dp of product gpus."""
        fix = self.fix
        own = self.model is None
        tensor, context = (1 if own and fixed is None else fixed for fixed in (fix.tp, fix.cp))
        for tp in _degrees(self.gpus, tensor):
            for pp in _degrees(self.gpus // tp, fix.pp):
                if own and fix.pp is None and pp > (self.layers + 2 if self.layers else 1):
                    continue
                for cp in _degrees(self.gpus // tp // pp, context):
                    dp = self.gpus // (tp * pp * cp)
                    if fix.dp in (None, dp):
                        yield tp, pp, cp, dp

    def axes(self, degrees: tuple[int, ...]) -> tuple[Options, ...]:
        """What the other keys may be with these degrees, in the order of AXES."""
        tp, pp, cp, dp = degrees
        return (
            self._experts(tp, tp * cp * dp),
            self._schedules(pp),
            tuple((size,) for size in self._microbatches(dp)),
            self._shards(dp),
            ((False,),) if tp == 1 else _held(self.fix.sp, (False, True)),
            _held(self.fix.order, ORDERS if dp > 1 and pp > 1 else ORDERS[:1]),
        )

    def _experts(self, tp: int, ranks: int) -> Options:
        routed = self.model is not None and self.model.moe is not None
        spread = _held(self.fix.ep, divisors(ranks) if routed else (1,))
        cut = _held(self.fix.etp, dict.fromkeys((1, tp)) if routed else (1,))
        return tuple((*ep, *etp) for ep, etp in itertools.product(spread, cut))

    def _schedules(self, pp: int) -> Options:
        fixed = self.fix.vpp
        if pp == 1:
            return ((self.fix.schedule or "1f1b", fixed or 1),)
        whole = [
            vpp
            for vpp in range(2, _MOST_VIRTUAL_STAGES + 1)
            if self.layers and 0 in (self.layers % (pp * vpp), (self.layers + 2) % (pp * vpp))
        ]
        free = {"gpipe": [1], "1f1b": [1], "interleaved": whole, "zb": whole, "zbv": [2] if 2 in whole else []}
        return tuple(
            (schedule, vpp)
            for schedule in self.wishes.allowed_schedules
            for vpp in ([fixed] if fixed else free[schedule])
        )

    def _microbatches(self, dp: int) -> Sequence[int]:
        if self.fix.microbatch is not None:
            return (self.fix.microbatch,)
        own, rest = divmod(self.workload.global_batch, dp)
        if rest:
            return (1,)
        sizes = list(range(1, _SMALL_MICROBATCH + 1))
        while sizes[-1] < _LARGEST_MICROBATCH:
            sizes.append(2 * sizes[-1])
        return tuple(size for size in sizes if own % size == 0)

    def _shards(self, dp: int) -> Options:
        copies = self.fix.dp_replicate
        return tuple(
            (*zero, *replicas)
            for zero in _held(self.fix.zero, range(4))
            for replicas in _held(copies, divisors(dp) if zero[0] else (1,))
        )


def _held(fixed: Any, free: Any) -> Options:
    """The value that is fixed, or all that may be."""
    return tuple((value,) for value in (free if fixed is None else (fixed,)))


def _degrees(left: int, fixed: int | None) -> tuple[int, ...]:
    """A degree of what is left of the GPUs."""
    if fixed is None:
        return divisors(left)
    return () if left % fixed else (fixed,)


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """All of them, rising."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return tuple(dict.fromkeys([*small, *(number // size for size in reversed(small))]))


def _columns(parts: Sequence[_Part], global_batch: int, wishes: Wishes) -> Layouts:
    """The legal rows of all factorisations; columns that are the same in every row take no memory."""
    rows = sum(part.legal for part in parts)
    kinds: dict[str, Any] = {"sp": np.bool_, "schedule": "U11", "order": "U11"}
    columns = {
        key: np.empty(rows, dtype=kinds.get(key, np.int64)) for key in (*DEGREES, "microbatches", *_AXIS_OF)
    }
    first = 0
    for part in parts:
        own = slice(first, first + part.legal)
        first = own.stop
        for key, degree in zip(DEGREES, part.degrees, strict=True):
            columns[key][own] = degree
        shape = tuple(map(len, part.axes))
        places = np.broadcast_to(part.alive, shape).nonzero()
        for keys, options, place in zip(AXES, part.axes, places, strict=True):
            for key, values in zip(keys, zip(*options, strict=True), strict=True):
                columns[key][own] = np.array(values, dtype=columns[key].dtype)[place]
        columns["microbatches"][own] = global_batch // part.degrees[-1] // columns["microbatch"][own]
    overlap = wishes.fix.overlap or Overlap()
    same = {f"overlap_{axis}": getattr(overlap, axis) for axis in ("tp", "dp", "ep", "pp")}
    same |= {"recompute": "none", "gradient_bytes": bytes_per_element(wishes.fix.grad_dtype or "fp32")}
    return Layouts(**columns, **{key: np.broadcast_to(np.array(value), rows) for key, value in same.items()})
