"""Starting the workers of a measurement, following them, and ending them all when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from planner.errors import PlannerError
from planner.measure.request import LOST_PEER, MeasurementError, Request

News = dict[str, Any]

_OTHERS_SECONDS = 2.0  # that the others have to fail too, so that the one that began it can be named
_ENDING_SECONDS = 3.0
_LOOPBACK = "lo"
_QUIETLY = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # as a run has them: new tensors on a CPU then fault a page in 2 MiB
# a worker finds this package wherever it was imported from, and no modules of the folder that it is started in
_WORKER = (
    f"import sys; sys.path[:] = [*filter(None, sys.path), {str(Path(__file__).parents[2])!r}]; "
    "from planner.measure.worker import main; main()"
)


@dataclass(frozen=True, slots=True)
class Started:
    """One worker."""

    rank: int
    process: subprocess.Popen[bytes]
    errors: Path


def under_torchrun() -> bool:
    """Whether a launcher has made this process one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def measure(request: Request, nproc: int, hear: Callable[[News], None]) -> None:
    """Run the workers to their end: all of them, or under torchrun the one of this rank.

    An interrupt ends the workers and goes on; the records that they have written stay.
    """
    with tempfile.TemporaryDirectory(prefix="tp-plan-profile-") as scratch:
        folder = Path(scratch)
        started: list[Started] = []
        try:
            if under_torchrun():
                started.append(_start(request, int(os.environ["RANK"]), {}, folder))
            else:
                # one by one, so that an interrupt finds those already started
                started.extend(
                    _start(request, rank, _environment(rank, nproc, folder), folder) for rank in range(nproc)
                )
            _follow(started, hear)
        finally:
            _end(started)


def _environment(rank: int, nproc: int, folder: Path) -> dict[str, str]:
    """What torchrun would set, with a file to meet at instead of a port that another may take."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = {
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(nproc),
        "TP_PLAN_PROFILE_RENDEZVOUS": f"file://{folder}/rendezvous",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // nproc))),
    }
    if "GLOO_SOCKET_IFNAME" not in os.environ and Path("/sys/class/net", _LOOPBACK).exists():
        own["GLOO_SOCKET_IFNAME"] = _LOOPBACK
    return own


def _start(request: Request, rank: int, environment: dict[str, str], folder: Path) -> Started:
    errors = folder / f"errors-{rank}"
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, request.to_json()],
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends
            stdout=subprocess.PIPE,
            stderr=file,
            env={**_QUIETLY, **_HUGE_PAGES, **os.environ, **environment},
            start_new_session=True,  # an interrupt of the terminal reaches this process alone
        )
    return Started(rank, process, errors)


def _follow(started: list[Started], hear: Callable[[News], None]) -> None:
    news: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for worker in started:
        threading.Thread(target=_read, args=(worker.process.stdout, news), daemon=True).start()
    while True:
        codes = [worker.process.poll() for worker in started]
        try:
            hear(json.loads(news.get(timeout=0.05)))
            continue
        except queue.Empty:
            pass
        if any(codes):
            raise _failure(started)
        if all(code == 0 for code in codes):
            return


def _read(lines: IO[bytes] | None, news: queue.SimpleQueue[bytes]) -> None:
    assert lines is not None
    for line in lines:
        if line.startswith(b"{"):
            news.put(line)


def _failure(started: list[Started]) -> PlannerError:
    """The error of the rank that began it: one that failed by itself, else one that answers no more."""
    until = time.monotonic() + _OTHERS_SECONDS
    while time.monotonic() < until and any(worker.process.poll() is None for worker in started):
        time.sleep(0.05)
    codes = {worker.rank: worker.process.poll() for worker in started}
    alone = [worker for worker in started if codes[worker.rank] not in (0, None, LOST_PEER)]
    silent = [worker for worker in started if codes[worker.rank] is None]
    lost = [worker for worker in started if codes[worker.rank] == LOST_PEER]
    culprit = (alone or silent or lost)[0]
    said = _last_line(culprit.errors)
    if said.startswith("{"):
        told = json.loads(said)
        return PlannerError(told["rule"], value=told["value"], remedy=told["remedy"], key=told["key"])
    code = codes[culprit.rank]
    if code is None:
        said = "answers no more"
    elif not said or code < 0:
        said = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
    return MeasurementError(
        f"rank {culprit.rank} failed, and the measurement with it",
        value=said,
        remedy="mend that rank and run again with the same output: what is measured is kept",
        key=f"rank.{culprit.rank}",
    )


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _end(started: list[Started]) -> None:
    for worker in started:
        if worker.process.poll() is None:
            worker.process.terminate()
    until = time.monotonic() + _ENDING_SECONDS
    for worker in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=max(0.1, until - time.monotonic()))
        _sweep(worker)
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            if pipe is not None:
                pipe.close()


def _sweep(worker: Started) -> None:
    """Kill what is left of a worker's session: a compiler that it started would hold its output open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
