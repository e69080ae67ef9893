"""Collectives along mesh axes: which ranks form a group under a rank order, and what their exchange costs.

Rank r has the digits of the mesh axes in `order`, innermost first. Experts take the ranks of one pipeline stage
in that order: etp innermost, then ep, then the copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from planner.cost.collectives import CollectiveCost, CollectiveKind, collective_cost
from planner.cost.layouts import Floats, Ints, Layouts
from planner.spec.hardware import HardwareProfile

GroupAxis = Literal[
    "tp", "same_head", "cp", "cp_neighbours", "data", "shard", "copies", "ep", "ep_node", "etp", "expert_data",
    "stages",
]  # fmt: skip
Ranks: TypeAlias = np.ndarray[Any, Any]
# order, tp, cp, dp, pp, ep, etp, dp_replicate, tp ranks with the same head of keys and values
Mesh: TypeAlias = tuple[str, int, int, int, int, int, int, int, int]


class Network:
    """Prices collectives of many layouts on one cluster, each distinct group once."""

    def __init__(self, profile: HardwareProfile) -> None:
        self.profile = profile
        self._costs: dict[Any, CollectiveCost] = {}

    def seconds(self, kind: CollectiveKind, axis: GroupAxis, layouts: MeshRows, bytes_: Any) -> Floats:
        """Seconds of one collective on every layout, the last axis of the bytes; these follow its convention."""
        counts = np.asarray(bytes_, dtype=np.float64)
        counts = np.broadcast_to(counts, (*counts.shape[:-1], len(layouts)))
        result = np.zeros(counts.shape)
        for group in layouts.groups(axis, self._node_gpus):
            if len(group.ranks) > 1:
                result[..., group.rows] = self._cost(kind, group).seconds(counts[..., group.rows])
        return result

    def nodes(self, axis: GroupAxis, layouts: MeshRows) -> Ints:
        """Nodes that a group spreads over: sets of GPUs joined without network cards."""
        found = np.ones(len(layouts), dtype=np.int64)
        for group in layouts.groups(axis, self._node_gpus):
            found[group.rows] = len(np.unique(group.ranks // self._node_gpus))
        return found

    def leaves_node(self, ranks: np.ndarray[Any, Any]) -> bool:
        """Whether some ranks can reach one another through network cards only."""
        return bool(len(np.unique(ranks // self._node_gpus)) > 1)

    @cached_property
    def _node_gpus(self) -> int:
        """GPUs in the largest group that needs no network cards."""
        sizes = [level.gpus for level in self.profile.topology.values() if level.nics is None and level.gpus]
        return max(sizes, default=1)

    def _cost(self, kind: CollectiveKind, group: Group) -> CollectiveCost:
        key = (kind, group.key)
        if key not in self._costs:
            together = max(1, group.gpus // len(group.ranks))
            self._costs[key] = collective_cost(self.profile, kind, group.ranks, together)
        return self._costs[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layouts whose groups along an axis hold the same ranks of equally large clusters."""

    ranks: Ranks
    gpus: int
    rows: Ints

    @property
    def key(self) -> tuple[bytes, int]:
        """What its cost depends on."""
        return self.ranks.tobytes(), self.gpus


class MeshRows:
    """The distinct meshes among layouts, and which rows have which.

    `same_head` counts the neighbours in tp that keep copies of one head of keys and values.
    """

    def __init__(self, layouts: Layouts, same_head: Floats | None = None) -> None:
        alike = np.ones(len(layouts)) if same_head is None else same_head
        columns = np.stack(
            [
                layouts.tp, layouts.cp, layouts.dp, layouts.pp, layouts.ep, layouts.etp, layouts.dp_replicate,
                alike.astype(np.int64),
            ]
        )  # fmt: skip
        orders, numbers = np.unique(layouts.order, return_inverse=True)
        keyed = np.concatenate([numbers.reshape(1, -1), columns]).T
        distinct, inverse = np.unique(keyed, axis=0, return_inverse=True)
        self.meshes: list[Mesh] = [(str(orders[row[0]]), *map(int, row[1:])) for row in distinct]  # type: ignore[misc]
        self.meshes_of_rows: Ints = inverse.reshape(-1)
        self._groups: dict[GroupAxis, list[Group]] = {}

    def __len__(self) -> int:
        return len(self.meshes_of_rows)

    def groups(self, axis: GroupAxis, node_gpus: int) -> list[Group]:
        """The distinct groups along an axis; `node_gpus` are joined without network cards."""
        if axis not in self._groups:
            alike: dict[tuple[bytes, int], tuple[Ranks, list[int]]] = {}
            for place, mesh in enumerate(self.meshes):
                ranks = _node_part(mesh, node_gpus) if axis == "ep_node" else group_ranks(axis, mesh)
                alike.setdefault((ranks.tobytes(), _gpus(mesh)), (ranks, []))[1].append(place)
            self._groups[axis] = [
                Group(ranks=ranks, gpus=gpus, rows=np.flatnonzero(np.isin(self.meshes_of_rows, places)))
                for (_, gpus), (ranks, places) in alike.items()
            ]
        return self._groups[axis]


def _node_part(mesh: Mesh, node_gpus: int) -> Ranks:
    """Of an expert group, the ranks on the first one's node."""
    ranks = group_ranks("ep", mesh)
    inside: Ranks = ranks[ranks // node_gpus == ranks[0] // node_gpus]
    return inside


def group_ranks(axis: GroupAxis, mesh: Mesh) -> np.ndarray[Any, Any]:
    """The ranks of the first group along an axis; of neighbours, the two that are furthest apart."""
    order, tp, cp, dp, pp, ep, etp, copies, same_head = mesh
    sizes = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
    strides, stride = {}, 1
    for name in order.split("-"):
        strides[name] = stride
        stride *= sizes[name]
    if axis == "stages":
        return np.array([0, strides["pp"] * (pp - 1)]) if pp > 1 else np.array([0])
    if axis == "cp_neighbours":
        return np.array([0, strides["cp"] * (cp - 1)]) if cp > 1 else np.array([0])
    if axis == "same_head":
        return np.arange(same_head) * strides["tp"]
    if axis in ("tp", "cp"):
        return np.arange(sizes[axis]) * strides[axis]
    if axis in ("data", "shard", "copies"):
        inner = np.arange(dp // copies) if axis == "shard" else np.arange(dp)
        if axis == "copies":
            inner = np.arange(copies) * (dp // copies)
        others = np.zeros(1, dtype=np.int64) if axis == "copies" else np.arange(cp) * strides["cp"]
        return np.sort((inner[:, None] * strides["dp"] + others[None, :]).reshape(-1))
    first, step, count = {
        "etp": (0, 1, etp), "ep": (0, etp, ep), "expert_data": (0, ep * etp, tp * cp * dp // (ep * etp)),
    }[axis]  # fmt: skip
    places = first + step * np.arange(count)
    ranks = np.zeros(count, dtype=np.int64)
    for name in order.split("-"):
        if name != "pp":
            ranks += places % sizes[name] * strides[name]
            places = places // sizes[name]
    return np.sort(ranks)


def _gpus(mesh: Mesh) -> int:
    return mesh[1] * mesh[2] * mesh[3] * mesh[4]
