"""What every block costs under the candidates of a space: each distinct context is priced once.

The price of a block reads a few keys of a strategy (degrees inside a stage, microbatch, where the ranks of its
groups lie). Candidates that agree on these are one context.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from planner.cost.activations import Activations, BlockActivations
from planner.cost.blocks import BlockPricer
from planner.cost.layouts import Bools, Floats, Ints, Layouts, Words
from planner.cost.times import BlockCost
from planner.cost.ways import Way
from planner.cost.weights import block_weights, held_parameters, tied_parameters
from planner.search.chain import Chain
from planner.spec.graph import Graph
from planner.spec.strategy import Recompute

_IN_A_TABLE = 2**24  # distinct values are counted in a table up to here
_AT_ONCE = 2**14
_PRICED_TOGETHER = 2**13  # contexts: every part of every way of so many is in memory at a time
_ANYTHING_KEPT = 2  # a zero stage under which gradients are not summed apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The assignments of every block, and which of them may stand together under which sp."""

    alone: Mapping[str, tuple[frozenset[str], ...]]  # of each block, all of them
    together: tuple[Mapping[str, frozenset[str]], ...]  # one of each block; the usual ones first
    allowed: Mapping[bool, tuple[bool, ...]]  # by sp, which of `together` can run

    def ways(self, graph: Graph, recompute: Sequence[Recompute]) -> tuple[Way, ...]:
        """Every way of every block: layers with each word of recomputation, the ends as they are."""
        layers = {placement.block for placement in graph.sequence if placement.path}
        return tuple(
            Way(block=name, whole=whole, recompute=word)
            for name, wholes in self.alone.items()
            for whole in wholes
            for word in (recompute if name in layers else (None,))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """The distinct contexts among candidates."""

    layouts: Layouts  # one candidate of each
    of_row: Ints


def contexts(layouts: Layouts, *, exact: bool) -> Contexts:
    """Candidates that blocks cost the same under; unless `exact`, whatever summing gradients adds is left out."""
    pp_inside = np.zeros(len(layouts), dtype=np.bool_)
    for order in distinct(layouts.order):
        if order.index("pp") < order.index("dp"):
            pp_inside |= layouts.order == order
    spread = pp_inside & (layouts.ep * layouts.etp > layouts.tp * layouts.cp)
    summed = (
        np.where(layouts.zero < _ANYTHING_KEPT, layouts.microbatches, 0) if exact else np.zeros_like(layouts.tp)
    )
    columns = [
        layouts.tp, layouts.cp, layouts.ep, layouts.etp, layouts.microbatch, layouts.sp.astype(np.int64),
        np.where(spread, layouts.pp, 0), summed,
    ]  # fmt: skip
    first, of_row = alike(columns)
    chosen = layouts.take(first)
    if not exact:
        ones = np.ones(len(chosen), dtype=np.int64)
        chosen = replace(chosen, zero=ones * _ANYTHING_KEPT, microbatches=ones)
    return Contexts(layouts=chosen, of_row=of_row)


def distinct(words: Words) -> list[str]:
    """Words of a column by their first place; a piece at a time, for a column of words is large as a list."""
    pieces = (words[first : first + _AT_ONCE].tolist() for first in range(0, len(words), _AT_ONCE))
    return list(dict.fromkeys(itertools.chain.from_iterable(pieces)))


def alike(columns: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Rows that agree in all columns: the first of each kind, and the kind of each row; the least kinds first."""
    kinds, count = np.zeros(len(columns[0]), dtype=np.int64), 1
    for column in columns:
        places, values = _ranked(column)
        kinds, count = _ranked(kinds * values + places)
    first = np.zeros(count if len(kinds) else 0, dtype=np.int64)
    first[kinds[::-1]] = np.arange(len(kinds))[::-1]  # of a kind the last one written is the first
    return first, kinds


def _ranked(column: Ints) -> tuple[Ints, int]:
    """Which of the distinct values each row has, and how many there are; small whole numbers need no sorting."""
    if not len(column):
        return column.astype(np.int64), 1
    if column.max() >= _IN_A_TABLE:
        values, places = np.unique(column, return_inverse=True)
        return places.reshape(-1), len(values)
    there = np.zeros(int(column.max()) + 1, dtype=np.bool_)
    there[column] = True
    ranks = np.cumsum(there) - 1
    return ranks[column], int(ranks[-1]) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastOthers:
    """Of some other blocks together the least that they take, by context."""

    forward: Floats
    backward: Floats
    kept: Floats
    dense: Floats
    experts: Floats

    def take(self, rows: Ints) -> LeastOthers:
        """Some of the contexts."""
        return LeastOthers(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastLayer:
    """Of the layers that are most of the model, the least that any assignment takes, by context."""

    before: Ints  # how many stand before each layer of the chain, and in it
    seconds: tuple[Floats, ...]  # by what is run again, the least first
    forward: Floats
    kept: tuple[Floats, ...]
    dense: Floats
    experts: Floats
    first: LeastOthers  # what stands before all layers: of the first stage
    last: LeastOthers  # behind them: of the last stage
    rest: LeastOthers  # other layers, and what stands between them

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.before[-1])


def block_costs(pricer: BlockPricer, layouts: Layouts) -> dict[str, BlockCost]:
    """Every way of every block under every candidate, by way."""
    found = contexts(layouts, exact=True)
    return {name: cost.take(found.of_row) for name, cost in pricer.costs(found.layouts).items()}


def _seconds(pricer: BlockPricer, rows: Layouts) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Forward and backward of every way, by context."""
    ahead, back = ({way.name: np.empty(len(rows)) for way in pricer.ways} for _ in range(2))
    for first in range(0, len(rows), _PRICED_TOGETHER):
        part = slice(first, first + _PRICED_TOGETHER)
        for name, cost in pricer.costs(rows.take(part)).items():
            ahead[name][part], back[name][part] = cost.forward_seconds, cost.backward_seconds
    return ahead, back


class LeastPrices:
    """Over all ways of each block, the least it can cost in a context."""

    def __init__(self, pricer: BlockPricer, choices: Choices, layouts: Layouts) -> None:
        self.found = contexts(layouts, exact=False)
        self.choices, self.pricer = choices, pricer
        rows, repeats = self.found.layouts, pricer.graph.repeats()
        ahead, back = _seconds(pricer, rows)
        kept = BlockActivations(pricer, rows)
        self._activations = {way.name: kept.of(way.name) for way in pricer.ways}
        nothing = np.zeros(len(rows))
        self.forward, self.backward, self.kept = nothing, nothing, nothing
        self.dense, self.dense_once, self.experts = nothing, nothing, nothing
        self.layer_seconds = np.full(len(rows), np.inf)
        self._values: dict[tuple[str, frozenset[str]], dict[str, Floats]] = {}
        self._least: dict[str, dict[str, Floats]] = {}
        self._main, self._chain = "", Chain.of(pricer.graph)
        tied, most = self._tied(), 0
        for block, wholes in choices.alone.items():
            few: dict[str, list[Floats]] = {}
            for whole in wholes:
                mask = self._allowed(block, whole, rows)
                ways = [way for way in pricer.ways if (way.block, way.whole) == (block, whole)]
                kernels = pricer.kernels[ways[0].name]
                weights = block_weights(kernels.block, kernels.splits, rows)
                held = held_parameters(kernels.block, kernels.splits, rows)
                shared = sum(item.elements for item in held if item.path in tied.get(block, ()))
                values = {
                    "forward": ahead[ways[0].name],
                    "backward": np.min([back[way.name] for way in ways], axis=0),
                    "kept": np.min([self._activations[way.name].kept for way in ways], axis=0),
                    "dense": weights.dense - shared * kernels.layer,
                    "dense once": weights.dense - shared,
                    "experts": weights.experts,
                }
                plain = self._activations[
                    next((way.name for way in ways if way.recompute == "none"), ways[0].name)
                ]
                values |= {"unfinished": plain.unfinished, "gradients": plain.gradients}
                values |= {f"seconds {i}": values["forward"] + back[way.name] for i, way in enumerate(ways)}
                for i, way in enumerate(ways):
                    found = self._activations[way.name]
                    values |= {f"kept {i}": found.kept, f"again {i}": found.again}
                    values |= {f"passing {i}": found.passing, f"routed {i}": -found.routed}
                self._values[block, whole] = values
                for key, value in values.items():
                    few.setdefault(key, []).append(np.where(mask, value, np.inf))
            least = self._least[block] = {key: np.min(value, axis=0) for key, value in few.items()}
            count = repeats[block]
            self.forward = self.forward + count * least["forward"]
            self.backward = self.backward + count * least["backward"]
            self.dense = self.dense + count * least["dense"]
            self.dense_once = self.dense_once + count * least["dense once"]
            self.experts = self.experts + count * least["experts"]
            if pricer.kernels[ways[0].name].layer:
                self.kept = self.kept + count * least["kept"]
                self.layer_seconds = np.minimum(self.layer_seconds, least["forward"] + least["backward"])
                if count > most:
                    most, self._main = count, block
        self.layer = self._layer(self._least)
        self.layer_seconds = np.where(most > 0, self.layer_seconds, 0.0)

    def _layer(self, values: Mapping[str, Mapping[str, Floats]]) -> LeastLayer:
        """The layers that are most of the model, and what is beside them, each block at these values."""
        chain, nothing = self._chain, np.zeros(len(self.found.layouts))
        main = chain.blocks.index(self._main) if self._main else -1
        own = values.get(self._main, {})
        inside = chain.prefix[-1] * (np.arange(len(chain.blocks)) != main)

        def by_word(name: str) -> tuple[Floats, ...]:
            return tuple(value for key, value in own.items() if key.startswith(f"{name} ")) or (nothing,)

        def others(counts: Ints) -> LeastOthers:
            keys = ("forward", "backward", "kept", "dense once", "experts")
            each = zip(chain.blocks, counts.tolist(), strict=True)
            held = [(values[block], count) for block, count in each if count]
            sums = {key: sum((count * item[key] for item, count in held), nothing) for key in keys}
            return LeastOthers(dense=sums.pop("dense once"), **sums)

        return LeastLayer(
            before=chain.prefix[:, main] if self._main else np.zeros(chain.layers + 1, dtype=np.int64),
            seconds=by_word("seconds"), forward=own.get("forward", nothing), kept=by_word("kept"),
            dense=own.get("dense", nothing), experts=own.get("experts", nothing),
            first=others(chain.before), last=others(chain.after), rest=others(inside),
        )  # fmt: skip

    def layer_of(self, together: Mapping[str, frozenset[str]]) -> LeastLayer:
        """The layers that are most of the model under one assignment, and what is beside them."""
        return self._layer({block: self._values[block, whole] for block, whole in together.items()})

    def dominated(self, together: Mapping[str, frozenset[str]]) -> Bools:
        """Contexts in which some block does better under its usual assignment in everything that a step reads."""
        result = np.zeros(len(self.found.layouts), dtype=np.bool_)
        for block, whole in together.items():
            if whole and (block, frozenset[str]()) in self._values:
                usual, other = self._values[block, frozenset()], self._values[block, whole]
                result |= np.all([usual[key] <= other[key] for key in usual], axis=0)
        return result

    def _tied(self) -> dict[str, set[str]]:
        """Of each block the parameters that a rank may hold already, for another block or way shares them."""
        layers = {way.block for way in self.pricer.ways if self.pricer.kernels[way.name].layer}
        found: dict[str, set[str]] = {}
        for group in tied_parameters(self.pricer.graph):
            for place, (block, path) in enumerate(group):
                if place or block in layers:
                    found.setdefault(block, set()).add(path)
        return found

    def activations(self, rows: Ints) -> dict[str, Activations]:
        """Of every way under some candidates."""
        return {name: found.take(self.found.of_row[rows]) for name, found in self._activations.items()}

    def _allowed(self, block: str, whole: frozenset[str], rows: Layouts) -> Bools:
        """The usual assignment everywhere; others where something is cut and sp allows them."""
        if not whole:
            return np.ones(len(rows), dtype=np.bool_)
        runs = {
            sp: any(
                allowed and together[block] == whole
                for allowed, together in zip(self.choices.allowed[sp], self.choices.together, strict=True)
            )
            for sp in (False, True)
        }
        return (rows.tp > 1) & np.where(rows.sp, runs[True], runs[False])


def products(alone: Mapping[str, tuple[frozenset[str], ...]]) -> tuple[Mapping[str, frozenset[str]], ...]:
    """One assignment of each block, in every combination."""
    return tuple(dict(zip(alone, wholes, strict=True)) for wholes in itertools.product(*alone.values()))
