"""A few processes of this machine that run one function each and send back what it returns."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
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
            return _answers(pipes, ends)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answers(pipes: Sequence[Connection], ends: float) -> list[Any]:
    """Those of all ranks as they come: the first that fails is told, not one that waits for it."""
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        missing = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in found}
        ready = wait(list(missing), max(0.0, ends - time.monotonic()))
        if not ready:
            raise _failed(min(missing.values()), "no answer in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            found[missing[pipe]] = _answer(missing[pipe], pipe)
    return [found[rank] for rank in range(len(pipes))]


def _answer(rank: int, pipe: Connection) -> Any:
    kind: str
    value: Any
    try:
        kind, value = pipe.recv()
    except EOFError:
        kind, value = "error", "it ended without an answer"
    if kind == "refused":
        raise PlannerError(**value)
    if kind == "error":
        raise _failed(rank, value)
    return value


def _failed(rank: int, value: str) -> RankFailed:
    return RankFailed(
        "every process runs the step to its end",
        value=f"rank {rank}: {value}",
        remedy="run again with fewer processes (--nproc)",
        key="numerics",
    )


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

    threading.Thread(target=_end_with_parent, daemon=True).start()
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
    except BaseException as error:
        answer = ("error", traceback.format_exception_only(error)[-1].strip())
    pipe.send(answer)
    pipe.close()
    os._exit(0)  # destroying a gloo group aborts now and then


def _end_with_parent() -> None:
    """A parent that was killed kills no child, and this one would wait for the others, holding its output open."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
