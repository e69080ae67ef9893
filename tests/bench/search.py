"""What planning takes beside its targets: python tests/bench/search.py [NAME …] [--limit SECONDS]

Every case is `tp-plan plan` in a process of its own on one core, its graph cached: CPU seconds and peak memory are
of that whole process, interpreter, imports and the plan's text included. (A process inherits the peak of the one
that made it, so this one stays small.) A case that passes the limit is ended and told as such. The last line is
the slope of log CPU seconds over log candidates: below 1, time grows slower.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

from planner.spec.strategy import Strategy  # noqa: E402

PEAK_MB = 600.0
FEWEST_TO_FIT = 3
MLP = '''"""Three feed-forward blocks."""

import torch
from torch import nn


def block(width):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def model():
    return nn.Sequential(*(block(1024) for _ in range(3))), lambda b, s: {"input": torch.zeros(b, s, 1024)}
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan to make."""

    model: str
    gpus: int
    batch: int
    target_seconds: float = 0.0  # 0: there is none
    seq_len: int = 8192
    wishes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model} on {self.gpus}"

    def arguments(self, model: str) -> list[str]:
        """The command after `tp-plan`."""
        given = {"hardware": "dgx-h100", "gpus": self.gpus, "seq-len": self.seq_len, "global-batch": self.batch}
        return ["plan", model, *(f"--{key}={value}" for key, value in given.items()), *self.wishes, "--json", "-q"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a process took."""

    cpu_seconds: float
    peak_mb: float
    answer: dict[str, Any] | None  # none: ended at the limit
    exit_code: int


CASES = (
    Case(model="mlp", gpus=8, batch=64, seq_len=128, target_seconds=0.7),
    Case(model="llama3.1-8b", gpus=8, batch=128, target_seconds=1.0),
    Case(model="llama3.1-70b", gpus=64, batch=256, target_seconds=2.0),
    Case(model="llama3.1-405b", gpus=1024, batch=1024, target_seconds=5.0),
    Case(model="llama3.1-405b", gpus=16_384, batch=4096, target_seconds=10.0),
    Case(model="deepseek-v3", gpus=2048, batch=4096, target_seconds=15.0),
)


def taken(arguments: list[str], *, limit_seconds: float) -> Taken:
    """Run `tp-plan` with these arguments, ended once it has run so long."""
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "planner", *arguments],
            stdout=told,
            env=_environment(),
            preexec_fn=_on_one_core,
        )
        ended = threading.Event()

        def end() -> None:
            ended.set()
            os.kill(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_seconds, end)
        timer.start()
        _, status, used = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        text = told.read()
    return Taken(
        cpu_seconds=used.ru_utime + used.ru_stime,
        peak_mb=used.ru_maxrss * 1024 / 1e6,
        answer=None if ended.is_set() or not text else json.loads(text),
        exit_code=process.returncode,
    )


def _environment() -> dict[str, str]:
    """One thread; compiled files are kept, as where pip installed them."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "OMP_NUM_THREADS": "1"}


def _on_one_core() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def slope(found: list[tuple[float, float]]) -> float:
    """Of log seconds over log candidates."""
    candidates, seconds = ([math.log(value) for value in column] for column in zip(*found, strict=True))
    return statistics.linear_regression(candidates, seconds).slope


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases whose name holds one of these words")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a case may run")
    given = parser.parse_args()
    print(
        f"{'plan':26}{'CPU s':>9}{'target':>8}{'peak MB':>9}{'target':>8}"
        f"{'candidates':>13}{'solved':>9}{'gap':>8}  best"
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mlp.py"
        file.write_text(MLP)
        for case in CASES:
            if given.names and not any(word in case.name for word in given.names):
                continue
            model = f"{file}:model" if case.model == "mlp" else case.model
            run = [sys.executable, "-m", "planner", "trace", model, "-q"]
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL, env=_environment())  # into the cache
            cost = taken(case.arguments(model), limit_seconds=given.limit)
            line = f"{case.name:26}{cost.cpu_seconds:>9.2f}{case.target_seconds:>8.1f}"
            line += f"{cost.peak_mb:>9.0f}{PEAK_MB:>8.0f}"
            if cost.answer is None or "certificate" not in cost.answer:
                print(f"{line}  " + ("not done" if cost.answer is None else f"exit {cost.exit_code}"), flush=True)
                continue
            proof = cost.answer["certificate"]
            strategy = Strategy.from_dict(cost.answer["strategy"])
            gap = 1.0 - proof["bound"] / proof["objective"] if proof["objective"] else 0.0
            print(
                f"{line}{proof['candidates']:>13,}{proof['solved']:>9,}{gap:>8.2%}  {strategy.label}", flush=True
            )
            if case.model != "mlp":
                found.append((float(proof["candidates"]), cost.cpu_seconds))
    if len(found) >= FEWEST_TO_FIT:
        print(f"time against candidates: slope {slope(found):.2f} over {len(found)} plans (1: in proportion)")


if __name__ == "__main__":
    main()
