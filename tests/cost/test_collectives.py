"""Collectives: hand-worked numbers, what no cost may do, and a rate that a search can live on."""

from __future__ import annotations

from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import planner
from planner.cost.collectives import (
    KINDS,
    CollectiveKind,
    chosen_algorithm,
    collective_cost,
    collective_seconds,
)
from planner.cost.curves import table_curve
from planner.cost.topology import place
from planner.errors import PlannerError
from planner.spec.hardware import CollectiveTable, HardwareProfile
from planner.spec.overrides import with_changes
from tests.spec.examples import PROFILE, example

H100 = HardwareProfile.from_dict(PROFILE)
_SOURCE = {"source": "assumed", "reference": "round numbers"}


def plain(**level: Any) -> HardwareProfile:
    """Two nodes' kind of cluster in round numbers: 4 GPUs at 100 GB/s and 1 µs, nodes at 10 GB/s a GPU, 10 µs."""
    nics = {**_SOURCE, "count": 4, "gpus": 4, "bandwidth_gb_per_second": 10.0}
    node = {**_SOURCE, "link": "fast", "gpus": 4, "bandwidth_gb_per_second": 100.0, "latency_us": 1.0}
    net = {**_SOURCE, "link": "slow", "bandwidth_gb_per_second": 10.0, "latency_us": 10.0, "nics": nics}
    return HardwareProfile.from_dict(example(PROFILE, topology={"node": {**node, **level}, "net": net}))


PLAIN = plain()

groups = st.one_of(
    st.tuples(st.integers(0, 300), st.integers(1, 300), st.integers(2, 80)).map(
        lambda drawn: range(drawn[0], drawn[0] + drawn[1] * drawn[2], drawn[1])
    ),
    st.sets(st.integers(0, 600), min_size=2, max_size=40).map(sorted),
)
sizes = st.floats(0.0, 1e11)
collectives = st.sampled_from(get_args(CollectiveKind))
dtypes = st.sampled_from(["bf16", "fp32", "int8", "fp8_block"])
counts = st.integers(1, 300)


def ranks_for(kind: str, ranks: Any) -> Any:
    return list(ranks)[:2] if kind == "p2p" else ranks


# Hand-worked


@pytest.mark.parametrize(
    ("kind", "ranks", "micro", "name"),
    [
        # 10⁸ bytes. One node: 3 of 4 parts at 100 GB/s and 3 hops
        ("all_gather", range(4), 3 + 750, "ring"),
        ("reduce_scatter", range(4), 3 + 750, "ring"),
        ("all_reduce", range(4), 6 + 1500, "ring"),
        ("broadcast", range(4), 2 + 1000, "tree"),
        ("all_to_all", range(4), 2 + 750, "direct"),
        ("p2p", [0, 3], 1 + 1000, "p2p"),
        # two nodes: 7/8 of the bytes leave each node through four cards, 40 GB/s; 6 hops of 1 µs and 1 of 10
        ("all_gather", range(8), 16 + 0.875 * 2500, "ring"),
        # ... in a tree the buffer crosses once, up on one and down on the other half of it
        ("all_reduce", range(8), 2 * (2 * 1 + 10) + 2500, "tree"),
        # half of each send buffer crosses at 10 GB/s
        ("all_to_all", range(8), 2 + 10 + 5000, "direct"),
        ("p2p", [0, 4], 10 + 10_000, "p2p"),
        # four ranks, a node each
        ("all_gather", range(0, 16, 4), 30 + 7500, "ring"),
        ("all_reduce", range(0, 16, 4), 60 + 15_000, "ring"),
    ],
)
def test_formulas(kind: CollectiveKind, ranks: Any, micro: float, name: str) -> None:
    assert collective_seconds(PLAIN, kind, 1e8, ranks=ranks) == pytest.approx(micro * 1e-6)
    assert chosen_algorithm(PLAIN, kind, 1e8, ranks=ranks) == name


def test_hierarchical_wins_where_cards_are_slow() -> None:
    """Four nodes of 1 TB/s: 6 hops and 150 µs inside, then 6 hops and 2·3/4 of the bytes at 40 GB/s."""
    fast = plain(bandwidth_gb_per_second=1000.0)
    assert chosen_algorithm(fast, "all_reduce", 1e8, ranks=range(16)) == "hierarchical"
    expected = (6 + 150 + 60 + 3750) * 1e-6
    assert collective_seconds(fast, "all_reduce", 1e8, ranks=range(16)) == pytest.approx(expected)


def test_small_messages_of_large_groups_take_the_tree_of_an_all_reduce() -> None:
    assert chosen_algorithm(PLAIN, "all_gather", 1e3, ranks=range(64)) == "all_reduce, tree"
    reduced = collective_seconds(PLAIN, "all_reduce", 1e3, ranks=range(64))
    assert collective_seconds(PLAIN, "all_gather", 1e3, ranks=range(64)) == reduced
    assert chosen_algorithm(PLAIN, "all_gather", 1e9, ranks=range(64)) == "ring"


def test_switches_that_reduce() -> None:
    """The buffer goes up and the sum comes down: B/(100 GB/s · 0.74); 8-bit elements take a ring."""
    switched = plain(nvls=True)
    assert collective_seconds(switched, "all_reduce", 1e8, ranks=range(4)) == pytest.approx(3e-6 + 1e-3 / 0.74)
    assert chosen_algorithm(switched, "all_reduce", 1e8, ranks=range(4)) == "nvls"
    assert chosen_algorithm(switched, "all_reduce", 1e8, ranks=range(4), dtype="int8") == "ring"


def test_a_measured_table() -> None:
    """8 ranks, x = 1.75·B/445 GB/s: the cheaper of 15.6 µs + x/0.3 and 60 µs + x."""
    x = 1.75 * 2**20 / 445e9
    assert collective_seconds(H100, "all_reduce", 2**20, ranks=range(8)) == pytest.approx(15.6e-6 + x / 0.3)
    big = 1.75 * 2**29 / 445e9
    assert collective_seconds(H100, "all_reduce", 2**29, ranks=range(8)) == pytest.approx(60e-6 + big)
    one_byte = collective_seconds(H100, "all_reduce", 2**29, ranks=range(8), dtype="int8")
    assert one_byte == pytest.approx(60e-6 + big / 0.79)
    half = collective_seconds(H100, "all_gather", 2**29, ranks=range(4))
    assert half == pytest.approx((7e-6**0.67 + (0.75 * 2**29 / 330e9) ** 0.67) ** (1 / 0.67))


def test_group_sizes_between_and_beyond_measured_ones() -> None:
    table = H100.topology["nvlink"].collectives["all_reduce"]
    six = table_curve(table, "all_reduce", 6)
    assert six.floor_seconds == pytest.approx(12.5e-6)  # a hop a rank
    inverse = (1 / 4 - 1 / 6) / (1 / 4 - 1 / 8)
    assert six.rate == pytest.approx(2 * 5 / 6 / ((350 + inverse * 95) * 1e9))
    wide = table_curve(table, "all_reduce", 64)
    assert wide.floor_seconds == pytest.approx(2 * 15.6e-6)  # log2(64)/log2(8): less than 56 further hops
    assert wide.rate == pytest.approx(2 * 63 / 64 / 445e9)
    exchange = H100.topology["nvlink"].collectives["all_to_all"]
    nine = 12.5 * np.log2(9) / 3  # a tree, again less than a further hop of 0.925 µs
    assert table_curve(exchange, "all_to_all", 9).latency_seconds == pytest.approx(nine * 1e-6)


def test_streaming_across_nodes_keeps_what_is_inside() -> None:
    """16 H100: the tree's two slow hops on top of eight GPUs' own all-reduce, whose NVLink is the slowest link."""
    inside = collective_seconds(H100, "all_reduce", 2**29, ranks=range(8))
    assert chosen_algorithm(H100, "all_reduce", 2**29, ranks=range(16)) == "tree"
    assert collective_seconds(H100, "all_reduce", 2**29, ranks=range(16)) == pytest.approx(inside + 24e-6)


def test_a_broadcast_streams_like_an_all_gather() -> None:
    gather = H100.topology["nvlink"].collectives["all_gather"]
    expected = (10.2e-6**gather.power + (2**29 / 355e9) ** gather.power) ** (1 / gather.power)
    assert collective_seconds(H100, "broadcast", 2**29, ranks=range(8)) == pytest.approx(expected)


def test_chunks_fill_links_across_nodes() -> None:
    """(√latency + √transfer)²: 24 µs and 2500 µs."""
    chunked = with_changes(PLAIN, {"topology.net.power": 0.5})
    expected = (24e-6**0.5 + 2500e-6**0.5) ** 2
    assert collective_seconds(chunked, "all_reduce", 1e8, ranks=range(8)) == pytest.approx(expected)


def test_groups_beside_one_another_share_the_cards() -> None:
    one_card = with_changes(PLAIN, {"topology.net.nics.count": 1})
    alone = collective_seconds(one_card, "all_reduce", 1e8, ranks=[0, 4])
    assert collective_seconds(one_card, "all_reduce", 1e8, ranks=[0, 4], concurrent_groups=4) == pytest.approx(
        20e-6 + 4 * (alone - 20e-6)
    )


def test_rank_order_changes_the_cost() -> None:
    """Tensor parallel 8 innermost stays in a node; outermost it crosses eight of them."""
    inner = collective_seconds(H100, "all_reduce", 2**26, ranks=range(8), concurrent_groups=8)
    outer = collective_seconds(H100, "all_reduce", 2**26, ranks=range(0, 64, 8), concurrent_groups=8)
    assert outer > 5 * inner


def test_traffic_that_changes_rails_hops_inside_first() -> None:
    """Two a node: 6 µs among them by the table, 12 between nodes, 5 to reach the right card."""
    assert collective_seconds(H100, "all_to_all", 0.0, ranks=[0, 1, 8, 9]) == pytest.approx(23e-6)
    assert collective_seconds(H100, "all_to_all", 0.0, ranks=[0, 8]) == pytest.approx(12e-6)


def test_the_engines_own_all_reduce() -> None:
    """5 µs + x/240 GB/s up to 64 MiB, then NCCL's; without a seam."""
    small = collective_seconds(H100, "all_reduce", 2**16, ranks=range(8), custom_all_reduce="graph")
    assert small == pytest.approx(5e-6 + 1.75 * 2**16 / 240e9)
    assert small < collective_seconds(H100, "all_reduce", 2**16, ranks=range(8))
    assert chosen_algorithm(H100, "all_reduce", 2**16, ranks=range(8), custom_all_reduce="graph") == "custom graph"
    for size, ranks in ((2**28, range(8)), (2**16, range(16)), (2**16, range(0, 64, 8))):
        own = collective_seconds(H100, "all_reduce", size, ranks=ranks, custom_all_reduce="graph")
        assert own == collective_seconds(H100, "all_reduce", size, ranks=ranks)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "all_reduce"])
def test_the_engines_own_all_reduce_does_nothing_else(kind: CollectiveKind) -> None:
    ranks = ranks_for(kind, range(8))
    library = collective_seconds(H100, kind, 2**16, ranks=ranks)
    assert collective_seconds(H100, kind, 2**16, ranks=ranks, custom_all_reduce="graph") == library
    assert chosen_algorithm(H100, kind, 2**16, ranks=ranks, custom_all_reduce="graph") != "custom graph"


def test_it_is_offered_to_users() -> None:
    """8 H100, 64 KiB: 5 to 6 µs against the library's 18.7, by published timings."""
    asked: dict[str, Any] = {"kind": "all_reduce", "bytes_": 2**16, "ranks": range(8)}
    own = planner.collective_seconds("dgx-h100", **asked, custom_all_reduce="graph")
    assert 4e-6 < own < 7e-6 < 15e-6 < planner.collective_seconds("dgx-h100", **asked)
    with pytest.raises(PlannerError) as caught:
        planner.collective_seconds("dgx-h100", **asked, custom_all_reduce="lazy")  # type: ignore[arg-type]
    assert caught.value.key == "custom_all_reduce"


# Properties


@given(collectives, groups, sizes, sizes, counts, dtypes)
def test_more_bytes_never_cost_less(
    kind: CollectiveKind, ranks: Any, one: float, other: float, concurrent: int, dtype: str
) -> None:
    cost = collective_cost(H100, kind, ranks_for(kind, ranks), concurrent, dtype)
    assert cost.seconds(min(one, other)) <= cost.seconds(max(one, other)) * (1 + 1e-12)


@given(st.integers(2, 8), sizes, sizes, st.floats(0.1, 100.0))
def test_nor_by_an_engines_own_all_reduce(size: int, one: float, other: float, slower: float) -> None:
    """Also where launching it eagerly takes longer than the library's call."""
    key = "topology.nvlink.custom_all_reduce.graph.floor_us"
    profile = with_changes(H100, {key: f"{slower:.3f}x"})
    cost = collective_cost(profile, "all_reduce", range(size), custom_all_reduce="graph")
    assert cost.seconds(min(one, other)) <= cost.seconds(max(one, other)) * (1 + 1e-12)


@given(collectives, st.integers(0, 10_000), sizes)
def test_a_group_of_one_costs_nothing(kind: CollectiveKind, rank: int, size: float) -> None:
    assert collective_seconds(H100, kind, size, ranks=[rank]) == 0.0
    assert np.all(collective_seconds(H100, kind, np.array([size, 1.0]), ranks=[rank]) == 0.0)
    assert chosen_algorithm(H100, kind, size, ranks=[rank]) == "none"


@given(st.sampled_from([H100, PLAIN]), groups, sizes, counts, dtypes)
def test_an_all_reduce_is_never_cheaper_than_its_reduce_scatter(
    profile: HardwareProfile, ranks: Any, size: float, concurrent: int, dtype: str
) -> None:
    both = [
        collective_seconds(profile, kind, size, ranks=ranks, concurrent_groups=concurrent, dtype=dtype)
        for kind in ("all_reduce", "reduce_scatter")
    ]
    assert both[0] >= both[1]


HALVES = [
    with_changes(H100, {key: "0.5x"})
    for key in (
        "inter_node_bandwidth",
        "intra_node_bandwidth",
        "topology.nvlink.bandwidth_gb_per_second",
        "topology.rail.nics.count",
        "topology.rail.nics.efficiency",
        "topology.spine.bandwidth_gb_per_second",
        "topology.nvlink.collectives.all_reduce.bandwidth_gb_per_second",
        "topology.nvlink.collectives.all_gather.bandwidth_gb_per_second.1",
    )
]


@given(st.sampled_from(HALVES), collectives, groups, sizes, counts)
def test_halving_a_bandwidth_never_speeds_anything_up(
    slower: HardwareProfile, kind: CollectiveKind, ranks: Any, size: float, concurrent: int
) -> None:
    ranks = ranks_for(kind, ranks)
    before, after = (
        collective_seconds(profile, kind, size, ranks=ranks, concurrent_groups=concurrent)
        for profile in (H100, slower)
    )
    assert after >= before * (1 - 1e-12)


@given(collectives, groups, sizes, counts, counts)
def test_more_groups_at_once_are_never_cheaper(
    kind: CollectiveKind, ranks: Any, size: float, one: int, other: int
) -> None:
    crowded = with_changes(H100, {"topology.spine.oversubscription": 3, "topology.rail.nics.count": 2})
    few, many = (
        collective_seconds(crowded, kind, size, ranks=ranks_for(kind, ranks), concurrent_groups=count)
        for count in (min(one, other), max(one, other))
    )
    assert few <= many * (1 + 1e-12)


@given(collectives, groups, sizes, st.randoms())
def test_swapping_equal_ranks_changes_nothing(kind: CollectiveKind, ranks: Any, size: float, random: Any) -> None:
    ranks = list(ranks_for(kind, ranks))
    expected = collective_seconds(H100, kind, size, ranks=ranks)
    random.shuffle(ranks)
    assert collective_seconds(H100, kind, size, ranks=ranks) == expected
    swapped = {rank ^ 1 for rank in ranks}  # neighbours in each node change places
    assert collective_seconds(H100, kind, size, ranks=swapped) == pytest.approx(expected, rel=1e-12)


@given(collectives, groups, st.floats(1.0, 1e10), st.sampled_from([None, "graph"]))
@settings(max_examples=200)
def test_the_cost_has_no_seams(kind: CollectiveKind, ranks: Any, size: float, custom: Any) -> None:
    """Over bytes: protocols, algorithms, engines' tables and NCCL's join."""
    cost = collective_cost(H100, kind, ranks_for(kind, ranks), custom_all_reduce=custom)
    step = cost.seconds(size * (1 + 1e-7)) / cost.seconds(size)
    assert 1 - 1e-9 <= step < 1 + 1e-5


@given(st.integers(2, 8), st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]))
def test_measured_group_sizes_join_those_between(size: int, kind: str) -> None:
    """Every constant of a curve lies between those of the measured sizes to either side."""
    table = H100.topology["nvlink"].collectives[kind]  # type: ignore[index]
    curve = table_curve(table, kind, size)
    low, high = max(item for item in (2, 4, 8) if item <= size), min(item for item in (2, 4, 8) if item >= size)
    ends = [table_curve(table, kind, item) for item in (low, high)]
    assert min(end.latency_seconds for end in ends) <= curve.latency_seconds
    assert curve.latency_seconds <= max(end.latency_seconds for end in ends)
    bus = [end.rate / (1 - 1 / item) for end, item in zip(ends, (low, high), strict=True)]
    assert min(bus) * (1 - 1e-9) <= curve.rate / (1 - 1 / size) <= max(bus) * (1 + 1e-9)


@given(collectives, groups, st.lists(sizes, min_size=1, max_size=6), counts, st.sampled_from([None, "graph"]))
def test_arrays_cost_what_their_numbers_cost(
    kind: CollectiveKind, ranks: Any, many: list[float], concurrent: int, custom: Any
) -> None:
    cost = collective_cost(H100, kind, ranks_for(kind, ranks), concurrent, custom_all_reduce=custom)
    array = cost.seconds(np.array(many))
    assert array.shape == (len(many),)
    assert list(array) == pytest.approx([cost.seconds(size) for size in many], rel=1e-12)
    assert list(cost.chosen(np.array(many))) == [cost.chosen(size) for size in many]


@given(groups, sizes)
def test_a_placement_serves_as_well_as_its_ranks(ranks: Any, size: float) -> None:
    placed = collective_seconds(H100, "all_gather", size, ranks=place(H100, ranks))
    assert placed == collective_seconds(H100, "all_gather", size, ranks=ranks)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kind": "scan"}, "kind"),
        ({"bytes_": -1}, "bytes"),
        ({"bytes_": float("nan")}, "bytes"),
        ({"bytes_": [1.0, float("inf")]}, "bytes"),
        ({"ranks": [0, 0]}, "ranks"),
        ({"kind": "p2p"}, "ranks"),
        ({"concurrent_groups": 0}, "concurrent_groups"),
        ({"concurrent_groups": 1.5}, "concurrent_groups"),
        ({"dtype": "fp7"}, "dtype"),
        ({"custom_all_reduce": "lazy"}, "custom_all_reduce"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], key: str) -> None:
    asked: dict[str, Any] = {"kind": "all_reduce", "bytes_": 1e6, "ranks": range(8), **changes}
    with pytest.raises(PlannerError) as caught:
        collective_seconds(H100, asked.pop("kind"), asked.pop("bytes_"), **asked)
    assert caught.value.key == key
    assert caught.value.remedy


def test_a_number_for_all_group_sizes() -> None:
    table = CollectiveTable(
        source="assumed", reference="x", ranks=(2, 4), floor_us=(3.0,), bandwidth_gb_per_second=(100.0, 200.0)
    )
    assert [table_curve(table, "all_gather", size).latency_seconds for size in (2, 3, 4)] == [3e-6] * 3
    assert table.numbers_per_size == 1.5
