"""A few processes of this machine that run one function each and send back what it returns."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from planner.errors import EXIT_ANSWER_IS_NO, PlannerError


class RankFailed(PlannerError):  # noqa: N818 - an answer: it ran, and ended badly
    """A process raised, or ended without an answer."""

    exit_code = EXIT_ANSWER_IS_NO


def run_locally(ranks: int, function: Callable[..., Any], *args: Any, seconds: float) -> list[Any]:
    """What `function(*args)` returns on each rank of a gloo world, which ends after so many seconds at the latest.

    A PlannerError of a rank is raised here, so that bad input is told as such.
    """
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    # imported once for all; torch loads the second itself when it builds a module on the meta device
    context.set_forkserver_preload([function.__module__, "torch._dynamo"])
    with tempfile.TemporaryDirectory(prefix="tp-plan-") as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe(duplex=False)
            job = (rank, ranks, str(Path(folder) / "store"), there, seconds, function, args)
            processes.append(context.Process(target=_run_rank, args=job, daemon=True))
            processes[-1].start()
            there.close()
            pipes.append(here)
        ends = time.monotonic() + seconds
        try:
            return [_answer(rank, pipe, ends) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answer(rank: int, pipe: Connection, ends: float) -> Any:
    """A rank's answer; the first that fails is told, not those that then wait for it."""
    kind: str
    value: Any
    try:
        came = pipe.poll(max(0.0, ends - time.monotonic()))
        kind, value = pipe.recv() if came else ("error", "no answer in time")
    except EOFError:
        kind, value = "error", "it ended without an answer"
    if kind == "refused":
        raise PlannerError(**value)
    if kind == "error":
        raise RankFailed(
            "every process runs the step to its end",
            value=f"rank {rank}: {value}",
            remedy="run again with fewer processes (--nproc)",
            key="numerics",
        )
    return value


def _run_rank(
    rank: int,
    ranks: int,
    store: str,
    pipe: Connection,
    seconds: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    answer: tuple[str, Any]
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=seconds),
        )
        answer = ("done", function(*args))
        dist.barrier()
    except PlannerError as error:
        answer = ("refused", error.to_dict())
    except BaseException:
        answer = ("error", traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    os._exit(0)  # destroying a gloo group aborts now and then
