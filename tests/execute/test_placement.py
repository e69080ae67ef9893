"""Which rank takes which place of a mesh, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from planner.errors import PlannerError
from planner.execute.mesh import build_meshes
from planner.execute.placement import hosts_of_ranks, ranks_in_place
from planner.spec.strategy import Strategy
from tests.execute.world import run_world


def hosts(text: str) -> list[str]:
    return [f"host-{letter}" for letter in text]


@pytest.mark.parametrize(
    ("keys", "placed", "per_node", "wanted"),
    [
        ({"tp": 4}, "aaaa", 8, [0, 1, 2, 3]),
        ({"tp": 2, "dp": 2}, "aabb", 2, [0, 1, 2, 3]),
        ({"tp": 2, "dp": 2}, "bbaa", 2, [0, 1, 2, 3]),  # which node comes first is all the same
        ({"tp": 2, "dp": 2}, "abab", 2, [0, 2, 1, 3]),
        ({"tp": 2, "pp": 2, "dp": 2}, "abababab", 4, [0, 2, 4, 6, 1, 3, 5, 7]),
        ({"tp": 4}, "aabb", 2, [0, 1, 2, 3]),  # the plan too has tp on two nodes
        ({"tp": 2, "dp": 2}, "aaaa", 2, [0, 1, 2, 3]),  # nearer than planned
        ({"tp": 2, "dp": 4, "order": "tp-cp-dp-pp"}, "aabbccdd", 2, list(range(8))),
        ({}, "a", 8, [0]),
    ],
)
def test_ranks_go_where_the_plan_has_them(
    keys: dict[str, Any], placed: str, per_node: int, wanted: list[int]
) -> None:
    assert list(ranks_in_place(hosts(placed), Strategy.from_dict(keys), per_node)) == wanted


@pytest.mark.parametrize(
    ("keys", "placed", "per_node", "said"),
    [
        ({"tp": 4}, "aabb", 4, "the plan has the ranks of tp 4 on one node of 4 GPUs"),
        ({"dp": 4, "pp": 2}, "aabbccdd", 4, "the plan has the ranks of dp 4 on one node of 4 GPUs"),
        ({"tp": 2, "dp": 2}, "abba", 2, "the ranks of every host follow one another, or are dealt out in turn"),
    ],
)
def test_other_nodes_than_were_planned_for(keys: dict[str, Any], placed: str, per_node: int, said: str) -> None:
    strategy = Strategy.from_dict(keys)
    with pytest.raises(PlannerError) as refused:
        ranks_in_place(hosts(placed), strategy, per_node)
    assert refused.value.rule == said
    nodes = strategy.gpus // per_node
    assert f"torchrun --nnodes {nodes} --nproc-per-node {per_node} " in refused.value.remedy


def test_a_mesh_of_ranks_that_were_dealt_out() -> None:
    """tp peers share a host although the launcher dealt ranks out in turn."""
    found = run_world(4, _peers, {"tp": 2, "dp": 2}, "abab")
    assert [names for names, _ in found] == [("host-a", "host-b", "host-a", "host-b")] * 4
    assert [peers for _, peers in found] == [(0, 2), (1, 3), (0, 2), (1, 3)]


def _peers(keys: dict[str, Any], placed: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names = hosts_of_ranks(hosts(placed)[dist.get_rank()])
    strategy = Strategy.from_dict(keys)
    meshes = build_meshes(strategy, kv_heads=2, places=ranks_in_place(names, strategy, 2))
    assert meshes.tp.group is not None
    assert meshes.dense["tp"].get_local_rank() == meshes.tp.rank
    return names, tuple(dist.get_process_group_ranks(meshes.tp.group))
