"""The integer program of a block against every assignment priced one by one, and what it chooses."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import planner
from planner.cost.layouts import Floats
from planner.search.block_prices import BlockPrices
from planner.search.operators import BlockProgram, Choice, Limits
from planner.search.solvers import Solver
from planner.spec.graph import Block, Graph
from planner.spec.regions import TooManyAlternativesError, alternatives, canonical
from planner.spec.splits import could_be_cut
from planner.spec.strategy import Strategy
from tests.cost.training_cases import bundled, exact, hardware, tiny, user, workload
from tests.search import mlps

EQUAL = 1e-9
SLOW = {"topology__node__bandwidth_gb_per_second": 1.0, "topology__node__latency_us": 50.0}


def prices(
    graph: Graph, block: str, on: str = "dgx-h100", *, work: dict[str, Any] | None = None, **keys: Any
) -> Any:
    return BlockPrices(
        graph=graph,
        block=block,
        profile=hardware(on),
        workload=workload(**{"seq_len": 512, "stack": "compiled"} | (work or {})),
        strategy=Strategy.from_dict({"tp": 8} | keys),
    )


def program(price: BlockPrices) -> BlockProgram:
    return BlockProgram(price.graph.blocks[price.block], price, sequence_parallel=price.strategy.sp)


def mlp(name: str) -> Graph:
    return planner.trace(f"{Path(mlps.__file__)}:{name}")


def modules(block: Block, names: frozenset[str]) -> set[str]:
    return {operator.module for operator in block.operators if operator.name in names}


def best(
    listed: Sequence[frozenset[str]], found: Floats, limits: Limits, weight_seconds: float
) -> tuple[float, frozenset[str]] | None:
    """The least of all assignments that fit, by looking at each."""
    fits = (found[:, 1] <= limits.weight_elements) & (found[:, 2] <= limits.kept_bytes)
    if not fits.any():
        return None
    values = np.where(fits, found[:, 0] + weight_seconds * found[:, 1], math.inf)
    return float(values.min()), listed[int(values.argmin())]


def drawn_limits(draw: random.Random, found: Floats) -> Iterator[Limits]:
    """None; one that cuts through the range; both, exactly what some assignment needs; what nothing needs."""
    yield Limits()
    yield Limits(weight_elements=draw.uniform(found[:, 1].min(), found[:, 1].max()))
    yield Limits(
        weight_elements=float(draw.choice(found[:, 1].tolist())),
        kept_bytes=float(draw.choice(found[:, 2].tolist())),
    )
    yield Limits(weight_elements=float(found[:, 1].min()) * 0.99)


def check(price: BlockPrices, draw: random.Random, solvers: Sequence[Solver] = ("highs",)) -> None:
    block = price.graph.blocks[price.block]
    listed = alternatives(block, sequence_parallel=price.strategy.sp)
    found, solved = price(listed), program(price)
    for limits in drawn_limits(draw, found):
        weight_seconds = draw.choice((0.0, 1e-12, 1e-10))
        wanted = best(listed, found, limits, weight_seconds)
        for solver in solvers:
            choice = solved.minimum(limits, weight_seconds=weight_seconds, solver=solver)
            if wanted is None:
                assert choice is None
                continue
            assert choice is not None
            assert choice.objective == pytest.approx(wanted[0], rel=EQUAL)
            assert choice.bound == pytest.approx(wanted[0], rel=EQUAL)
            assert choice.bound <= choice.objective
            assert choice.whole in listed


def drawn(draw: random.Random, *, cp: bool) -> dict[str, Any]:
    keys = {"tp": draw.choice((2, 4, 8)), "sp": draw.random() < 0.5, "microbatch": draw.choice((1, 2))}
    return keys | ({"cp": draw.choice((1, 2))} if cp else {})


def drawn_work(draw: random.Random) -> dict[str, Any]:
    return {
        "seq_len": draw.choice((512, 2048)),
        "stack": draw.choice(("eager", "compiled", "megatron")),
        "precision": draw.choice(("bf16", "fp8")),
    }


@pytest.mark.parametrize(
    "name", ["gpt3-175b", "llama3.1-70b", "falcon-7b", "mixtral-8x7b", "deepseek-v3", "vit-l-16", "t5-3b"]
)
def test_the_program_is_as_good_as_looking_at_each_assignment(name: str) -> None:
    """Falcon's attention and feed-forward read the same norm: gathered once, and one product under Megatron."""
    draw = random.Random(name)
    for block in bundled(name).blocks:
        for _ in range(3):
            work, keys = drawn_work(draw), drawn(draw, cp=True)
            check(prices(bundled(name), block, draw.choice(("dgx-h100", "dgx-b200")), work=work, **keys), draw)


@pytest.mark.parametrize("name", ["mlp", "scaled", "shared_layer", "two_tower"])
def test_modules_of_users(name: str) -> None:
    draw = random.Random(name)
    for block in user(name).blocks:
        for _ in range(2):
            check(prices(user(name), block, work=drawn_work(draw), **drawn(draw, cp=False)), draw)


@pytest.mark.parametrize("stack", ["compiled", "megatron"])
def test_branches_that_read_the_same_values(stack: str) -> None:
    """What is gathered for one branch is there for the others: no sum over branches alone tells the price."""
    draw = random.Random(stack)
    graph = mlp("branches")
    for sp in (False, True):
        price = prices(graph, "start", work={"stack": stack}, sp=sp)
        crossings = program(price).crossings
        assert crossings
        assert any(abs(change[0]) > 1e-9 for change in crossings.values())
        check(price, draw)


def test_both_solvers_agree() -> None:
    draw = random.Random(0)
    for graph, block in ((tiny("llama"), "blocks.0"), (user("mlp"), "start"), (mlp("branches"), "start")):
        check(prices(graph, block, **drawn(draw, cp=False)), draw, solvers=("highs", "cbc"))


def pairs(first: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every choice of neighbours from `first` on, by the first of each: a column cut, then a row cut."""
    if first >= count - 1:
        yield ()
        return
    yield from pairs(first + 1, count)
    for others in pairs(first + 2, count):
        yield (first, *others)


@pytest.mark.parametrize("sp", [False, True])
def test_more_assignments_than_are_listed(sp: bool) -> None:
    """Fourteen layers in a row: 610 ways to cut neighbours, of which the program finds the best."""
    graph = mlp("chain")
    block = graph.blocks["start"]
    with pytest.raises(TooManyAlternativesError):
        alternatives(block, sequence_parallel=sp)
    names = could_be_cut(block)
    chosen = [{place for first in picked for place in (first, first + 1)} for picked in pairs(0, len(names))]
    assert len(chosen) == 610
    listed = [canonical(block, frozenset(n for i, n in enumerate(names) if i not in cut)) for cut in chosen]
    assert len(set(listed)) == 610
    price = prices(graph, "start", work={"seq_len": 4096}, tp=2, microbatch=8, sp=sp)
    found, solved, draw = price(listed), program(price), random.Random(1)
    for limits in [*drawn_limits(draw, found), *drawn_limits(draw, found)]:
        wanted = best(listed, found, limits, 0.0)
        choice = solved.minimum(limits)
        assert (choice is None) == (wanted is None)
        if choice is not None and wanted is not None:
            assert choice.objective == pytest.approx(wanted[0], rel=EQUAL)
            assert choice.bound == pytest.approx(wanted[0], rel=EQUAL)


# what it chooses


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("name", ["gpt3-175b", "llama3.1-70b"])
def test_megatrons_pairing_is_the_fastest_of_a_large_layer(name: str, sp: bool) -> None:
    """Columns then rows, attention by heads: nothing whole, on time alone."""
    choice = program(prices(bundled(name), "blocks.0", work={"seq_len": 4096}, sp=sp)).minimum()
    assert choice is not None
    assert choice.whole == frozenset()


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("name", ["gpt3-175b", "llama3.1-70b"])
def test_vocabularies_are_cut_where_weights_count(name: str, sp: bool) -> None:
    """A whole table is faster to read; it does not fit, or its gradient costs more than it saves.

    The gradient: 4 bytes reduced over a rank's 50 GB/s link to other nodes, once in eight microbatches.
    """
    gradient_seconds = 4 / 50e9 / 8
    for end in ("start", "end"):
        price = prices(bundled(name), end, work={"seq_len": 4096}, sp=sp)
        found = price(alternatives(bundled(name).blocks[end], sequence_parallel=sp))
        for choice in (
            program(price).minimum(Limits(weight_elements=float(found[:, 1].max()) * 0.9)),
            program(price).minimum(weight_seconds=gradient_seconds),
        ):
            assert choice is not None
            assert choice.whole == frozenset()
    fastest = program(prices(bundled(name), "start", work={"seq_len": 4096}, sp=sp)).minimum()
    assert fastest is not None
    assert modules(bundled(name).blocks["start"], fastest.whole) == {"embedding.tokens"}


def test_small_layers_stay_whole_on_slow_links() -> None:
    """What two sums a layer cost is more than the work that they save."""
    block = bundled("gpt2").blocks["blocks.0"]
    for on in ("h100-pcie", "a100-pcie"):
        apart = program(prices(bundled("gpt2"), "blocks.0", on, tp=4)).minimum()
        along = program(prices(bundled("gpt2"), "blocks.0", on, tp=4, sp=True)).minimum()
        assert apart is not None
        assert along is not None
        assert apart.whole == frozenset(could_be_cut(block))
        assert modules(block, along.whole) == {"ffn.up", "ffn.down"}, "attention needs every token"


@pytest.mark.parametrize("faster", [1.0, 1e6])
def test_a_faster_link_cuts_what_a_slow_one_leaves_whole(faster: float) -> None:
    """Sums of 1.4 GB at 1 GB/s against a sixteenth of 10 TFLOP on a GPU that does 1 PFLOP/s."""
    graph = bundled("gpt3-13b")
    price = BlockPrices(
        graph=graph,
        block="blocks.0",
        profile=exact(topology__flat__bandwidth_gb_per_second=faster),
        workload=workload(seq_len=512),
        strategy=Strategy.from_dict({"tp": 8}),
    )
    choice = program(price).minimum()
    assert choice is not None
    assert (choice.whole == frozenset()) == (faster > 1.0)


def test_falling_limits_walk_every_trade() -> None:
    for graph, block, sp in (
        (user("mlp"), "start", True),
        (mlp("branches"), "start", True),
        (tiny("t5"), "start", False),
    ):
        price = prices(graph, block, work={"seq_len": 2048}, tp=2, microbatch=4, sp=sp)
        listed = alternatives(graph.blocks[block], sequence_parallel=sp)
        rows = {tuple(row) for row in price(listed).tolist()}
        wanted = {row for row in rows if not any(better(other, row) for other in rows)}
        assert {measures(choice) for choice in program(price).frontier()} == wanted
        assert len(wanted) > 1


def better(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def measures(choice: Choice) -> tuple[float, ...]:
    return choice.seconds, choice.weight_elements, choice.kept_bytes


def test_a_second_solve_equals_the_first() -> None:
    for solver in ("highs", "cbc"):
        price = prices(user("scaled"), "start", sp=True)
        first, second = program(price), program(price)
        assert first.minimum(solver=solver) == second.minimum(solver=solver) == first.minimum(solver=solver)


def test_on_one_rank_nothing_matters() -> None:
    found = prices(tiny("llama"), "blocks.0", tp=1)(
        alternatives(tiny("llama").blocks["blocks.0"], sequence_parallel=False)
    )
    assert (found == found[0]).all()


def test_tighter_limits_never_help() -> None:
    price = prices(mlp("branches"), "start", work={"seq_len": 4096}, tp=4, sp=True)
    solved, before = program(price), 0.0
    weights = price([frozenset(could_be_cut(price.graph.blocks["start"]))])[0, 1]
    for share in np.linspace(1.0, 0.2, 9).tolist():
        choice = solved.minimum(Limits(weight_elements=weights * share))
        objective = math.inf if choice is None else choice.objective
        assert objective >= before
        before = objective
