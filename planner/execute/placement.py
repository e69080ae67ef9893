"""Where the ranks of a job really are, and which of them takes which place of a plan's mesh."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import itertools
import math
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from planner.errors import PlannerError
from planner.spec.hardware_sources import load_hardware
from planner.spec.plan import Plan
from planner.spec.strategy import Strategy


def places_of(plan: Plan) -> tuple[int, ...]:
    """The rank for every place of a plan's mesh in the running world; all ranks call this together."""
    hosts = hosts_of_ranks(host_of_this_rank())
    if len(set(hosts)) == 1:
        return tuple(range(len(hosts)))
    profile = plan.hardware_profile or load_hardware(plan.hardware)
    return ranks_in_place(hosts, plan.strategy, profile.device.gpus_per_node)


def host_of_this_rank() -> str:
    """Its name, and its network namespace: containers may share a name, and hosts of a test do."""
    namespace = Path("/proc/self/ns/net")
    return socket.gethostname() + (f" {namespace.readlink()}" if namespace.is_symlink() else "")


def hosts_of_ranks(own: str) -> tuple[str, ...]:
    """The host of every rank, each of which tells its own."""
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return tuple(found)


def ranks_in_place(hosts: Sequence[str], strategy: Strategy, gpus_per_node: int) -> tuple[int, ...]:
    """The rank for every place of the mesh, given the host of every rank.

    A plan has its places in order on nodes of so many GPUs. Where ranks were dealt out otherwise they are put in
    order by host. What must share a node and then does not is refused: the nodes are not those of the plan.
    """
    first = {host: number for number, host in reversed(list(enumerate(hosts)))}
    order = sorted(range(len(hosts)), key=lambda rank: (first[hosts[rank]], rank))
    for axis, places in _groups(strategy):
        ranks = [order[place] for place in places]
        apart = {hosts[rank] for rank in ranks}
        if len({place // gpus_per_node for place in places}) == 1 and len(apart) > 1:
            raise PlannerError(
                f"the plan has the ranks of {axis} {len(places)} on one node of {gpus_per_node} GPUs",
                value=f"ranks {', '.join(map(str, ranks))} on {', '.join(sorted(apart))}",
                remedy=_command(strategy.gpus, gpus_per_node),
                key="placement",
            )
        if ranks != sorted(ranks):  # torch numbers the ranks of a group as the world does
            raise PlannerError(
                "the ranks of every host follow one another, or are dealt out in turn",
                value=f"ranks {', '.join(map(str, ranks))} of {axis}, on {', '.join(sorted(apart))}",
                remedy=_command(strategy.gpus, gpus_per_node),
                key="placement",
            )
    return tuple(order)


def _groups(strategy: Strategy) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The places of every group along every axis of the mesh, and of experts."""
    mesh = strategy.mesh()
    names, sizes = tuple(mesh), tuple(mesh.values())
    strides = [math.prod(sizes[index + 1 :]) for index in range(len(sizes))]
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        others = [range(other) for place, other in enumerate(sizes) if place != index]
        steps = [stride for place, stride in enumerate(strides) if place != index]
        for digits in itertools.product(*others):
            first = sum(digit * step for digit, step in zip(digits, steps, strict=True))
            yield name, tuple(first + number * strides[index] for number in range(size))


def _command(gpus: int, gpus_per_node: int) -> str:
    nodes = max(1, gpus // gpus_per_node)
    each = min(gpus, gpus_per_node)
    return (
        f"start on {nodes} host{'s' if nodes > 1 else ''}: torchrun --nnodes {nodes} --nproc-per-node {each} "
        "-m planner.execute PLAN"
    )
