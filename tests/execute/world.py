"""Several processes that talk over gloo: each runs one function and sends back what it returns.

They are started once and run one job after another, each job in a world of its own size. A job that fails ends
them all: the next one starts new ones. Groups of ended jobs stay alive: torch's caches know them, they join the
same processes as those of the next job, and destroying a gloo group aborts now and then.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_LONGEST_SECONDS = 240
_MOST_JOBS = 2  # each group of an ended job has threads, one of which looks a hundred times a second
_MOST_GROUPS = 1000  # of one job

_pool: list[tuple[BaseProcess, Connection]] = []
_jobs = 0


def run_world(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each rank. A rank that fails fails the test with its traceback."""
    global _jobs
    _jobs += 1
    if _jobs % _MOST_JOBS == 0:
        end_workers()
    with tempfile.TemporaryDirectory() as folder:
        workers = _workers(ranks)
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((_jobs, rank, ranks, str(Path(folder) / "store"), function, args))
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


def _workers(count: int) -> list[tuple[BaseProcess, Connection]]:
    context = multiprocessing.get_context("forkserver")
    # imported once for all workers; torch loads the second itself when it builds a module on the meta device
    context.set_forkserver_preload(["tests.execute.cases", "torch._dynamo"])
    while len(_pool) < count:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there,), daemon=True)
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


def _work(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    torch.set_num_threads(1)
    while True:
        try:
            job, rank, ranks, store, function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            distributed_c10d._world.group_count = (
                job * _MOST_GROUPS
            )  # names that all ranks agree on, and no other job
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=ranks,
                timeout=datetime.timedelta(seconds=120),
            )
            answer = (False, function(*args))
            dist.barrier()
        except BaseException:
            answer = (True, f"rank {rank}: {traceback.format_exc()}")
        pipe.send(answer)
        if answer[0]:
            os._exit(1)  # others may wait for this rank for ever
        distributed_c10d._update_default_pg(None)
