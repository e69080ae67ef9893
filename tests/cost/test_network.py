"""Groups of ranks under every rank order, against a walk over all ranks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from planner.cost.collectives import collective_seconds
from planner.cost.network import MeshRows, Network, group_ranks
from planner.spec.strategy import AXES, Strategy
from tests.cost.training_cases import LINK, exact, hardware, layouts

ORDERS = tuple("-".join(order) for order in itertools.permutations(AXES))
SIZES: tuple[dict[str, int], ...] = (
    {"tp": 2, "cp": 2, "dp": 4, "pp": 2, "ep": 4, "etp": 2},
    {"tp": 4, "cp": 1, "dp": 2, "pp": 3, "ep": 2},
    {"tp": 3, "cp": 2, "dp": 6, "pp": 1, "ep": 6, "dp_replicate": 3, "zero": 1},
    {"tp": 1, "cp": 4, "dp": 4, "pp": 2, "ep": 8, "etp": 2, "dp_replicate": 2, "zero": 3},
    {"tp": 2, "cp": 2, "dp": 2, "pp": 4, "ep": 8},
)


def digits(strategy: Strategy) -> list[dict[str, int]]:
    """The place of every rank along each mesh axis, from the contract that plan and executor share."""
    mesh = strategy.mesh()
    return [dict(zip(mesh, place, strict=True)) for place in itertools.product(*map(range, mesh.values()))]


def alike(strategy: Strategy, *free: str) -> list[int]:
    """Ranks that differ from rank 0 along some axes alone."""
    return [
        rank
        for rank, place in enumerate(digits(strategy))
        if all(digit == 0 for axis, digit in place.items() if axis not in free)
    ]


def mesh_of(strategy: Strategy) -> Any:
    keys = ("order", "tp", "cp", "dp", "pp", "ep", "etp", "dp_replicate")
    return (*(getattr(strategy, key) for key in keys), 1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_groups_of_every_order(order: str, sizes: dict[str, int]) -> None:
    strategy = Strategy.from_dict({"order": order, **sizes})
    mesh = mesh_of(strategy)
    expected = {
        "tp": alike(strategy, "tp"),
        "cp": alike(strategy, "cp"),
        "data": alike(strategy, "dp", "dp_replicate", "cp"),
        "shard": alike(strategy, "dp", "cp"),
        "copies": alike(strategy, "dp_replicate"),
    }
    for axis, ranks in expected.items():
        assert group_ranks(axis, mesh).tolist() == ranks, axis  # type: ignore[arg-type]
    stage = [rank for rank, place in enumerate(digits(strategy)) if place.get("pp", 0) == 0]
    experts = np.array(stage).reshape(strategy.expert_dp, strategy.ep, strategy.etp)
    assert group_ranks("etp", mesh).tolist() == experts[0, 0].tolist()
    assert group_ranks("ep", mesh).tolist() == experts[0, :, 0].tolist()
    assert group_ranks("expert_data", mesh).tolist() == experts[:, 0, 0].tolist()


@pytest.mark.parametrize("order", ORDERS)
def test_a_message_takes_as_long_as_between_the_furthest_neighbours(order: str) -> None:
    """Stages, and ranks of a ring: no pair of neighbours is slower than the pair that is priced."""
    profile = hardware("dgx-h100")
    given = {"order": order, "tp": 2, "cp": 2, "dp": 2, "pp": 4}
    strategy = Strategy.from_dict(given)
    rows = MeshRows(layouts(given))
    for axis, free in (("stages", "pp"), ("cp_neighbours", "cp")):
        line = alike(strategy, free)
        pairs = itertools.pairwise(line)
        slowest = max(collective_seconds(profile, "p2p", 1e8, ranks=pair, concurrent_groups=16) for pair in pairs)
        assert Network(profile).seconds("p2p", axis, rows, 1e8)[0] == pytest.approx(slowest)  # type: ignore[arg-type]


def test_a_collective_is_priced_on_its_ranks_beside_the_others() -> None:
    profile = hardware("dgx-h100")
    given = [
        {"tp": 8, "dp": 4},
        {"tp": 4, "dp": 8},
        {"tp": 4, "dp": 8, "order": "dp-tp-cp-pp"},
        {"tp": 2, "dp": 4, "cp": 2, "pp": 2, "order": "pp-tp-cp-dp"},
    ]
    rows = MeshRows(layouts(*given))
    network = Network(profile)
    for axis, free in (("tp", ("tp",)), ("data", ("dp", "cp"))):
        bytes_ = np.array([1e6, 1e7, 1e8, 1e9])
        found = network.seconds("all_reduce", axis, rows, bytes_)  # type: ignore[arg-type]
        for place, keys in enumerate(given):
            ranks = alike(Strategy.from_dict(keys), *free)
            expected = collective_seconds(
                profile, "all_reduce", bytes_[place], ranks=ranks, concurrent_groups=32 // len(ranks)
            )
            assert found[place] == pytest.approx(expected)


def test_copies_of_a_head_are_neighbours_in_tensor_parallelism() -> None:
    """Of eight ranks that have two heads the first four keep the first; of one that has its own it is alone."""
    given = [{"tp": 8, "dp": 4}, {"tp": 8, "dp": 4, "order": "dp-tp-cp-pp"}, {"tp": 2, "dp": 16}]
    rows = MeshRows(layouts(*given), np.array([4.0, 4.0, 1.0]))
    groups = [group_ranks("same_head", rows.meshes[place]).tolist() for place in rows.meshes_of_rows]
    assert groups == [[0, 1, 2, 3], [0, 4, 8, 12], [0]]
    profile = hardware("dgx-h100")
    found = Network(profile).seconds("all_reduce", "same_head", rows, 1e8)
    within = collective_seconds(profile, "all_reduce", 1e8, ranks=range(4), concurrent_groups=8)
    across = collective_seconds(profile, "all_reduce", 1e8, ranks=range(0, 16, 4), concurrent_groups=8)
    assert found.tolist() == pytest.approx([within, across, 0.0])


def test_groups_of_one_cost_nothing() -> None:
    rows = MeshRows(layouts({"dp": 8}, {"dp": 4, "pp": 2}))
    assert Network(exact()).seconds("all_reduce", "tp", rows, 1e9).tolist() == [0.0, 0.0]
    assert Network(exact()).seconds("p2p", "stages", rows, LINK).tolist() == [0.0, 1.0]


def test_equal_ends_do_not_make_equal_groups() -> None:
    """Sizes, first step and last rank agree, what lies between does not."""
    given = [
        {"order": "dp-tp-cp-pp", "dp": 2, "tp": 3, "cp": 4, "pp": 4, "zero": 1},
        {"order": "dp-tp-cp-pp", "dp": 4, "tp": 4, "cp": 2, "pp": 3, "zero": 1},
    ]
    profile = hardware("dgx-h100")
    together = Network(profile).seconds("all_gather", "shard", MeshRows(layouts(*given)), 1e9)
    one_by_one = [
        Network(profile).seconds("all_gather", "shard", MeshRows(layouts(keys)), 1e9)[0] for keys in given
    ]
    assert one_by_one[0] != one_by_one[1]
    assert together.tolist() == one_by_one


def test_equal_groups_are_priced_once() -> None:
    """Whatever else their layouts differ in; groups beside one another on another number of GPUs are others."""
    given = [{"tp": 2, "dp": 4}, {"tp": 2, "dp": 4, "microbatch": 2}, {"tp": 4, "dp": 2}, {"tp": 2, "pp": 4},
             {"tp": 2, "dp": 8}]  # fmt: skip
    rows = MeshRows(layouts(*given))
    assert len(rows) == 5
    groups = rows.groups("tp", 8)
    assert sorted(sorted(group.rows.tolist()) for group in groups) == [[0, 1, 3], [2], [4]]
    assert {tuple(group.ranks) for group in groups} == {(0, 1), (0, 1, 2, 3)}


def test_bytes_may_have_axes_before_the_layouts() -> None:
    rows = MeshRows(layouts({"dp": 4}, {"dp": 2}))
    network = Network(exact())
    bytes_ = np.array([[1e9, 2e9], [3e9, 4e9], [0.0, 1e9]])
    found = network.seconds("all_gather", "data", rows, bytes_)
    assert found.tolist() == [network.seconds("all_gather", "data", rows, row).tolist() for row in bytes_]


def test_nodes_of_experts() -> None:
    network = Network(hardware("dgx-h100"))
    rows = MeshRows(layouts({"dp": 32, "ep": 8}, {"dp": 32, "ep": 32}, {"tp": 4, "dp": 8, "ep": 4, "etp": 4}))
    assert network.nodes("ep", rows).tolist() == [1, 4, 2]
    assert network.leaves_node(np.arange(9))
    assert not network.leaves_node(np.arange(8, 16))
