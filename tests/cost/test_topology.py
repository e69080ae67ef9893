"""Placement of groups in the topology, and the topology as a graph whose size does not follow the cluster's."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from planner.cost.topology import Placement, place, topology_graph
from planner.errors import PlannerError
from planner.spec.hardware import HardwareProfile
from tests.spec.examples import PROFILE, example

H100 = HardwareProfile.from_dict(PROFILE)  # 8 GPUs in NVLink, 256 on a rail, then a spine

progressions = st.tuples(st.integers(0, 700), st.integers(1, 700), st.integers(1, 60)).map(
    lambda drawn: range(drawn[0], drawn[0] + drawn[1] * drawn[2], drawn[1])
)


def spans(placement: Placement) -> list[tuple[str, int, int, int]]:
    return [(item.name, item.fanout, item.inner_ranks, item.nic_ranks) for item in placement.crossings]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (range(8), [("nvlink", 8, 1, 0)]),
        ([3], []),
        (range(16), [("nvlink", 8, 1, 0), ("rail", 2, 8, 8)]),
        (range(0, 64, 8), [("rail", 8, 1, 1)]),
        (range(0, 2048, 256), [("spine", 8, 1, 1)]),
        (range(0, 32, 4), [("nvlink", 2, 1, 0), ("rail", 4, 2, 2)]),
        ([0, 1, 8], [("nvlink", 2, 1, 0), ("rail", 2, 2, 2)]),
        (range(2048), [("nvlink", 8, 1, 0), ("rail", 32, 8, 8), ("spine", 8, 256, 8)]),
        ([255, 256], [("spine", 2, 1, 1)]),
    ],
)
def test_the_levels_that_a_group_crosses(ranks: Any, expected: list[tuple[str, int, int, int]]) -> None:
    placement = place(H100, ranks)
    assert spans(placement) == expected
    assert placement.size == len(ranks)
    assert sum(crossing.hops for crossing in placement.crossings) == len(ranks) - 1


def test_an_uneven_group_has_its_narrowest_and_its_widest_node() -> None:
    rail = place(H100, [0, 1, 2, 8]).crossings[-1]
    assert (rail.narrowest, rail.inner_ranks, rail.ranks) == (1, 3, 4)


@given(progressions)
def test_a_list_is_placed_as_the_range_it_spells(ranks: range) -> None:
    shuffled = random.Random(0).sample(list(ranks), len(ranks))
    assert place(H100, ranks) == place(H100, shuffled) == place(H100, ranks[::-1]) == place(H100, np.array(ranks))


@given(progressions)
def test_a_range_is_counted_as_one_counts_its_ranks(ranks: range) -> None:
    """Against a plain count of the ranks in each group of each level."""
    values, inner, expected = np.array(ranks), 1, []
    for name, gpus in (("nvlink", 8), ("rail", 256), ("spine", 10**9)):
        children = np.unique(values // inner)
        fanout = int(np.unique(children * inner // gpus, return_counts=True)[1].max())
        counts = np.unique(values // inner, return_counts=True)[1]
        if fanout > 1:
            outer = np.unique(values // gpus, return_counts=True)[1]
            hops = len(counts) - len(outer)
            expected.append((name, fanout, hops, int(counts.min()), int(counts.max()), int(outer.max())))
        inner = gpus
    found = place(H100, ranks).crossings
    assert [(c.name, c.fanout, c.hops, c.narrowest, c.inner_ranks, c.ranks) for c in found] == expected


def test_cards_are_shared_by_the_groups_that_run_beside_one_another() -> None:
    """8 cards of 50 GB/s for 8 GPUs; a GPU reaches 45 GB/s alone."""
    strided = place(H100, range(0, 16, 8)).crossings[0]
    assert strided.bandwidth_per_rank(1) == 45e9
    assert strided.bandwidth_per_rank(8) == 45e9
    one_card = example(PROFILE, topology__rail__nics__count=1, topology__spine__nics__count=1)
    shared = place(HardwareProfile.from_dict(one_card), range(0, 16, 8)).crossings[0]
    assert [shared.bandwidth_per_rank(count) for count in (1, 2, 4, 8, 64)] == [45e9, 25e9, 12.5e9, 6.25e9, 6.25e9]
    whole = place(HardwareProfile.from_dict(one_card), range(16)).crossings[-1]
    assert whole.bandwidth_per_rank(1) == 6.25e9


def test_an_oversubscribed_level_narrows_what_crosses_it() -> None:
    """Pods of 256 GPUs with 45 GB/s each, a quarter of which leaves: all at once get a quarter."""
    profile = HardwareProfile.from_dict(example(PROFILE, topology__spine__oversubscription=4.0))
    pair = place(profile, [0, 256]).crossings[0]
    assert pair.bandwidth_per_rank(1) == 45e9
    assert pair.bandwidth_per_rank(128) == pytest.approx(22.5e9)
    assert pair.bandwidth_per_rank(256) == pytest.approx(11.25e9)
    assert pair.bandwidth_per_rank(100_000) == pytest.approx(11.25e9)


@pytest.mark.parametrize(
    "ranks", [[], [0, 0], [-1, 0], range(0), range(-4, 4), [0.5, 1.5], [[0, 1]], ["a"], np.zeros(2, bool)]
)
def test_what_is_no_set_of_ranks_is_refused(ranks: Any) -> None:
    with pytest.raises(PlannerError) as caught:
        place(H100, ranks)
    assert caught.value.key == "ranks"


def test_ranks_beyond_the_topology_are_refused() -> None:
    one_node = example(PROFILE)
    del one_node["topology"]["rail"], one_node["topology"]["spine"]
    with pytest.raises(PlannerError, match="describes at most 8"):
        place(HardwareProfile.from_dict(one_node), range(1, 9))


def test_a_hundred_thousand_gpus_are_a_few_subtrees() -> None:
    assert place(H100, range(0, 100_000, 8)).size == 12_500
    graph = topology_graph(H100, 100_000)
    assert set(graph) == {("spine", 100_000), ("rail", 256), ("rail", 160), ("nvlink", 8), ("gpu", 1)}
    assert graph.edges[("spine", 100_000), ("rail", 256)]["count"] == 390


@pytest.mark.parametrize("gpus", [1, 7, 8, 9, 256, 1000, 4097])
def test_the_graph_holds_every_gpu_once(gpus: int) -> None:
    import networkx

    graph = topology_graph(H100, gpus)
    held = {("gpu", 1): 1}
    for node in reversed(list(networkx.topological_sort(graph))):
        held[node] = held.get(node) or sum(
            held[child] * graph.edges[node, child]["count"] for child in graph[node]
        )
        assert held[node] == graph.nodes[node]["gpus"]
    roots = [node for node in graph if graph.in_degree(node) == 0]
    assert [held[root] for root in roots] == [gpus]


def test_a_cluster_has_gpus() -> None:
    with pytest.raises(PlannerError) as caught:
        topology_graph(H100, 0)
    assert caught.value.key == "gpus"
