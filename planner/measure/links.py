"""The calls behind the cases of several ranks: collectives, messages, and both beside computation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from planner.measure.cases import CollectiveCase, LaunchCase, OverlapCase, PeerCase
from planner.measure.clock import Batch, host_seconds, settle, timed
from planner.measure.world import World
from planner.units import MIB

_OVERLAP_BYTES = {"cpu": 4 * MIB, "cuda": 256 * MIB}
_OVERLAP_DIM = {"cpu": 256, "cuda": 4096}
_WORK_DIM, _WORK_PRODUCTS = 256, 8  # on a CPU before each call: milliseconds
_MOST_CALLS = 20  # of a sample


def no_part(calls: int) -> float:
    """What a rank times that only looks on."""
    return 0.0


def collective(case: CollectiveCase, world: World) -> Batch:
    """`bytes_`: the buffer, the whole output of a gather, the whole input of a scatter, one rank's sends."""
    group = world.group(case.groups)
    if group is None:
        return no_part
    size = len(case.groups[0])
    count = max(size, case.bytes_ // 4 // size * size)  # fp32 elements, in equal parts
    whole, part = torch.zeros(count, device=world.device), torch.zeros(count // size, device=world.device)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_to_all": _all_to_all(whole, group),
        "broadcast": lambda: dist.broadcast(whole, group=group, group_src=0),
    }
    return _in_a_step(calls[case.collective], world.device)


def _in_a_step(call: Callable[[], Any], device: str) -> Batch:
    """A call as steps have them. On a CPU it comes after some work: ranks do not come to it at the same moment.

    What a rank waits for those that come later belongs to the call.
    """
    if device == "cuda":
        return timed(call, device)
    left, right = (torch.ones(_WORK_DIM, _WORK_DIM) for _ in range(2))

    def batch(calls: int) -> float:
        spent = 0.0
        calls = min(calls, _MOST_CALLS)  # planned by their own time, without the work before each
        for _ in range(calls):
            for _ in range(_WORK_PRODUCTS):
                torch.mm(left, right)
            start = time.perf_counter()
            call()
            spent += time.perf_counter() - start
        return spent / calls

    return batch


def _all_to_all(whole: Tensor, group: dist.ProcessGroup) -> Callable[[], Any]:
    received = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(received, whole, group=group)


def peer(case: PeerCase, world: World) -> Batch:
    """Half of a message there and back."""
    group = world.group(case.pairs)
    if group is None:
        return no_part
    first, second = next(pair for pair in case.pairs if world.rank in pair)
    message = torch.zeros(max(1, case.bytes_ // 4), device=world.device)

    def there_and_back() -> None:
        if world.rank == first:
            dist.send(message, dst=second, group=group)
            dist.recv(message, src=second, group=group)
        else:
            dist.recv(message, src=first, group=group)
            dist.send(message, dst=first, group=group)

    both = _in_a_step(there_and_back, world.device)
    return lambda calls: both(calls) / 2


def launch(case: LaunchCase, world: World) -> Batch:
    """Host time of issuing a collective of a few bytes."""
    group = world.group((tuple(range(world.size)),))
    value = torch.zeros(world.size, device=world.device)
    if world.device == "cuda":
        return host_seconds(lambda: dist.all_reduce(value, group=group), world.device)

    def batch(calls: int) -> float:
        spent = 0.0
        for _ in range(calls):  # one in flight at a time, or its own threads compete with the issuing one
            start = time.perf_counter()
            work = dist.all_reduce(value, group=group, async_op=True)
            spent += time.perf_counter() - start
            assert work is not None
            work.wait()
        return spent / calls

    return batch


def overlap(case: OverlapCase, world: World) -> Batch:
    """Products and an all-reduce that take about as long, alone or at the same time.

    Computation is told per product, communication per all-reduce.
    """
    group = world.group((tuple(range(world.size)),))
    device, dim = world.device, _OVERLAP_DIM[world.device]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    left, right = (torch.zeros(dim, dim, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    buffer = torch.zeros(_OVERLAP_BYTES[device] // 4, device=device)

    def communicate() -> Any:
        return dist.all_reduce(buffer, group=group, async_op=True)

    products = _matching_products(left, right, out, communicate, world)

    def compute() -> None:
        for _ in range(products):
            torch.mm(left, right, out=out)

    if case.what == "compute_alone":
        alone = timed(compute, device)
        return lambda calls: alone(calls) / products
    if case.what == "communication_alone":
        return timed(lambda: communicate().wait(), device)
    cuda: Any = torch.cuda  # its streams are untyped
    side = cuda.Stream() if device == "cuda" else None

    def batch(calls: int) -> float:
        spent = 0.0
        for _ in range(calls):
            settle(device)
            start = time.perf_counter()
            work = communicate()
            compute()
            if case.what == "compute_beside":
                if side:
                    torch.cuda.current_stream().synchronize()
                spent += (time.perf_counter() - start) / products
            if side:
                with torch.cuda.stream(side):
                    work.wait()
                side.synchronize()
            else:
                work.wait()
            if case.what == "communication_beside":
                spent += time.perf_counter() - start
        return spent / calls

    return batch


def _matching_products(
    left: Tensor, right: Tensor, out: Tensor, communicate: Callable[[], Any], world: World
) -> int:
    """How many products take as long as the collective; the same on every rank."""
    alone = timed(lambda: communicate().wait(), world.device)
    product = timed(lambda: torch.mm(left, right, out=out), world.device)
    alone(1), product(1)
    rows = world.gather([alone(3), product(3)])
    seconds, one = max(row[0] for row in rows), max(row[1] for row in rows)
    return max(1, min(2000, round(seconds / one)))
