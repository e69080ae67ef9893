"""The process groups of a strategy: which ranks share a weight's pieces, its copies, a sequence, experts."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from planner.errors import PlannerError
from planner.spec.plan import CollectiveAxis
from planner.spec.strategy import Strategy

_DENSE = ("pp", "dp_replicate", "dp", "tp")
_EXPERT = ("pp", "dp_replicate", "dp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks of one group, and where this rank stands among them."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    name: str = ""  # of the group


ALONE = Peers(None, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meshes:
    """Every group that one rank belongs to.

    State is sharded over the ranks of dp and of cp together, since those that share a sequence hold equal
    weights too: the mesh dim `dp` has dp_shard·cp ranks. Experts have a mesh of their own over tp·cp·dp.
    """

    strategy: Strategy
    dense: DeviceMesh
    experts: DeviceMesh | None
    tp: Peers
    cp: Peers
    ep: Peers
    etp: Peers
    same_kv_head: Peers  # tp ranks that hold copies of one kv head
    pp: Peers
    ends: Peers  # the first and the last stage's ranks that hold the same part of a tied table
    pp_rank: int
    data_rank: int  # position among the ranks of dp and cp
    axes: dict[str, CollectiveAxis]  # by name of the group

    @property
    def state_mesh(self) -> DeviceMesh:
        """Copies × shards of the state of dense modules."""
        return self.dense["dp_replicate", "dp"]

    @property
    def expert_state_mesh(self) -> DeviceMesh:
        """Copies × shards of the state of experts."""
        assert self.experts is not None
        return self.experts["dp_replicate", "dp"]

    @property
    def data_ranks(self) -> int:
        """Ranks that read different tokens."""
        return self.strategy.dp * self.strategy.cp


def build_meshes(
    strategy: Strategy,
    *,
    device_type: str = "cpu",
    kv_heads: int = 0,
    experts: bool = False,
    tied: bool = False,
    places: Sequence[int] = (),
) -> Meshes:
    """The groups of this rank in the running world; every rank of it must call this with the same values.

    `places` gives the rank for every place of the mesh, where that is not its own number.
    """
    world = dist.get_world_size()
    if world != strategy.gpus:
        raise PlannerError(
            f"the strategy's degrees take {strategy.gpus} ranks",
            value=f"{world} ranks",
            remedy=f"start {strategy.gpus} processes, or change the degrees",
            key="gpus",
        )
    ranks = _canonical_ranks(strategy, places)
    copies = strategy.dp_replicate if strategy.zero else strategy.dp * strategy.cp
    shards = strategy.dp * strategy.cp // copies
    dense = DeviceMesh(device_type, ranks.reshape(strategy.pp, copies, shards, strategy.tp), mesh_dim_names=_DENSE)
    tp, cp, heads = _peers_along(ranks, 4), _peers_along(ranks, 3), _same_kv_head(ranks, kv_heads)
    ep = etp = ALONE
    pp, ends = _peers_along(ranks, 0), _ends(ranks, strategy, tied=tied)
    axes = _axes_of(dense, strategy)
    expert_mesh: DeviceMesh | None = None
    if experts:
        expert_ranks = _expert_ranks(strategy, ranks, copies)
        expert_mesh = DeviceMesh(device_type, expert_ranks, mesh_dim_names=_EXPERT)
        ep, etp = _peers_along(expert_ranks, 3), _peers_along(expert_ranks, 4)
        axes |= _axes_of(expert_mesh, strategy)
    own_groups: tuple[tuple[Peers, CollectiveAxis], ...] = (
        (tp, "tp"), (cp, "cp"), (heads, "tp"), (ep, "ep"), (etp, "etp"), (pp, "pp"), (ends, "pp"),
    )  # fmt: skip
    axes |= {peers.group.group_name: axis for peers, axis in own_groups if peers.group is not None}
    pp_rank, _, _, _ = dense.get_coordinate() or (0, 0, 0, 0)
    own = (ranks == dist.get_rank()).nonzero()[0].tolist()
    return Meshes(
        strategy=strategy,
        dense=dense,
        experts=expert_mesh,
        tp=tp,
        cp=cp,
        ep=ep,
        etp=etp,
        same_kv_head=heads,
        pp=pp,
        ends=ends,
        pp_rank=pp_rank,
        data_rank=(own[1] * ranks.shape[2] + own[2]) * ranks.shape[3] + own[3],
        axes=axes,
    )


def with_kv_heads(meshes: Meshes, kv_heads: int) -> Meshes:
    """The same groups where it is known only now how many heads of keys there are; for every rank to call."""
    heads = _same_kv_head(_canonical_ranks(meshes.strategy), kv_heads)
    if heads.group is None:
        return meshes
    return replace(meshes, same_kv_head=heads, axes=meshes.axes | {heads.group.group_name: "tp"})


def first_rank_of_stage(strategy: Strategy, stage: int) -> int:
    """The rank of a pipeline stage that is first along every other axis."""
    return int(_canonical_ranks(strategy)[stage].flatten()[0])


def _canonical_ranks(strategy: Strategy, places: Sequence[int] = ()) -> torch.Tensor:
    """Ranks as [pp, dp_replicate, dp, cp, tp], whatever the order in which they are placed."""
    mesh = strategy.mesh()
    numbers = torch.tensor(places or range(strategy.gpus), device="cpu")
    placed = numbers.reshape(tuple(mesh.values()) or (1,))
    wanted = ("pp", "dp_replicate", "dp", "cp", "tp")
    present = [axis for axis in wanted if axis in mesh]
    if present:
        placed = placed.permute([list(mesh).index(axis) for axis in present])
    return placed.reshape([mesh.get(axis, 1) for axis in wanted])


def _expert_ranks(strategy: Strategy, ranks: torch.Tensor, copies: int) -> torch.Tensor:
    """Neighbouring ranks of a pipeline stage share an expert's matrix, then the experts, then their copies."""
    holders = ranks[0].numel() // (strategy.ep * strategy.etp)
    kept = copies if strategy.zero else holders
    if holders % kept:
        raise PlannerError(
            f"dp_replicate divides the {holders} ranks that hold the same experts",
            value=kept,
            remedy="lower dp_replicate, ep or etp",
            key="dp_replicate",
        )
    return ranks.reshape(strategy.pp, kept, holders // kept, strategy.ep, strategy.etp)


def _peers_along(ranks: torch.Tensor, dim: int) -> Peers:
    """Groups along one dim of the ranks, made anew: a mesh may give several dims one group in common."""
    if ranks.shape[dim] == 1:
        return ALONE
    return _peers_in(ranks.movedim(dim, -1).flatten(0, -2).tolist())


def _same_kv_head(ranks: torch.Tensor, kv_heads: int) -> Peers:
    """tp ranks in runs of tp/kv_heads where there are fewer kv heads than ranks; 0 where none are known of."""
    tp = ranks.shape[-1]
    if not kv_heads or kv_heads >= tp:
        return ALONE
    return _peers_in(ranks.reshape(-1, tp // kv_heads).tolist())


def _ends(ranks: torch.Tensor, strategy: Strategy, *, tied: bool) -> Peers:
    """Pairs of a first and a last stage; where a V brings both to one rank there is no pair."""
    if not tied or strategy.pp == 1 or strategy.schedule == "zbv":
        return ALONE
    own = torch.stack((ranks[0].flatten(), ranks[-1].flatten()), 1).tolist()
    between = [[rank] for rank in ranks[1:-1].flatten().tolist()]
    return _peers_in(own + between)


def _peers_in(groups: list[list[int]]) -> Peers:
    own = next(group for group in groups if dist.get_rank() in group)
    group, _ = dist.new_subgroups_by_enumeration(groups)
    if len(own) == 1 or group is None:
        return ALONE
    return Peers(group, own.index(dist.get_rank()), len(own), group.group_name)


def _axes_of(mesh: DeviceMesh, strategy: Strategy) -> dict[str, CollectiveAxis]:
    """The groups over which state is sharded and copied, by name. Without sharding the copies are the dp ranks."""
    copies: CollectiveAxis = "dp_replicate" if strategy.zero else "dp"
    dims: tuple[tuple[str, CollectiveAxis], ...] = (("dp_replicate", copies), ("dp", "dp"))
    return {mesh.get_group(name).group_name: axis for name, axis in dims if mesh[name].size() > 1}
