"""Several processes that talk over gloo: each runs one function and sends back what it returns.

They are started once and run one job after another, each job in a world of its own size. A job that fails ends
them all: the next one starts new ones. Groups of ended jobs stay alive and serve the next job that asks for groups
of the same ranks: making one takes time, and destroying a gloo group aborts now and then.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

_LONGEST_SECONDS = 240
_MOST_GROUPS = 1000  # of one job

_pool: list[tuple[BaseProcess, Connection]] = []
_meeting: list[tempfile.TemporaryDirectory[str]] = []  # where those of the pool find one another
_jobs = 0


def run_world(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each rank. A rank that fails fails the test with its traceback."""
    global _jobs
    _jobs += 1
    workers = _workers(ranks)
    for rank, (_, pipe) in enumerate(workers):
        pipe.send((_jobs, rank, ranks, function, args))
    answers = [_answer(pipe) for _, pipe in workers]
    failures = [text for failed, text in answers if failed]
    if failures:
        end_workers()
    assert not failures, "\n".join(failures)
    return [value for _, value in answers]


@atexit.register
def end_workers() -> None:
    """Kill all that were started."""
    while _pool:
        process, pipe = _pool.pop()
        process.kill()
        process.join()
        pipe.close()
    while _meeting:
        _meeting.pop().cleanup()


def _workers(count: int) -> list[tuple[BaseProcess, Connection]]:
    context = multiprocessing.get_context("forkserver")
    # imported once for all workers; torch loads the second itself when it builds a module on the meta device
    context.set_forkserver_preload(["tests.execute.cases", "torch._dynamo"])
    if not _meeting:
        _meeting.append(tempfile.TemporaryDirectory(prefix="worlds-"))
    while len(_pool) < count:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, Path(_meeting[0].name)), daemon=True)
        process.start()
        there.close()
        _pool.append((process, here))
    return _pool[:count]


def _answer(pipe: Connection) -> tuple[bool, Any]:
    if not pipe.poll(_LONGEST_SECONDS):
        return True, "a rank did not answer in time"
    try:
        failed, value = pipe.recv()
    except (EOFError, ConnectionResetError):
        return True, "a rank ended without an answer"
    return failed, value


def _work(pipe: Connection, stores: Path) -> None:
    torch.set_num_threads(1)
    groups = _Groups(stores)
    while True:
        try:
            job, rank, ranks, function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            groups.begin(job, rank, ranks)
            answer = (False, function(*args))
            dist.barrier()
        except BaseException:
            answer = (True, f"rank {rank}: {traceback.format_exc()}")
        pipe.send(answer)
        if answer[0]:
            os._exit(1)  # others may wait for this rank for ever
        distributed_c10d._update_default_pg(None)


class _Groups:
    """The groups of one process: what an ended job has made, the next one gets that asks for the same."""

    def __init__(self, stores: Path) -> None:
        self.stores = stores
        self.make = distributed_c10d.new_group
        self.worlds: dict[int, Any] = {}
        self.kept: dict[str, list[Any]] = {}
        self.given: Counter[str] = Counter()
        self.ranks = 0
        for user in (dist, device_mesh, distributed_c10d):
            user.new_group = self.new_group

    def begin(self, job: int, rank: int, ranks: int) -> None:
        """A world of so many ranks, whose groups have names that all of them agree on, and no other job."""
        self.given.clear()
        self.ranks = ranks
        distributed_c10d._world.group_count = job * _MOST_GROUPS
        if ranks in self.worlds:
            distributed_c10d._update_default_pg(self.worlds[ranks])
            return
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.stores / str(job)}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=120),
        )
        self.worlds[ranks] = distributed_c10d._get_default_group()

    def new_group(self, *args: Any, **keys: Any) -> Any:
        """torch's, which every rank calls in the same order."""
        asked = repr((self.ranks, args, keys))
        kept = self.kept.setdefault(asked, [])
        if self.given[asked] == len(kept):
            kept.append(self.make(*args, **keys))
        self.given[asked] += 1
        return kept[self.given[asked] - 1]
