"""Training estimates a second on one core: python tests/bench/estimate.py [MODEL] [GPUS] [COUNT]

Many legal layouts are priced in one call, time and memory, then one estimate in full; beside both stands a plain
loop of numpy, so that a slow machine is seen for what it is. Last come the functions that take the time.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when numpy is first imported

# instead of this folder, whose file names are those of standard modules
sys.path[0] = str(Path(__file__).resolve().parents[2])

import cProfile  # noqa: E402
import pstats  # noqa: E402

import numpy as np  # noqa: E402

import planner  # noqa: E402
from planner.cost.estimates import training_estimate  # noqa: E402
from planner.cost.training import TrainingCost  # noqa: E402
from planner.spec.legality import violations  # noqa: E402
from planner.spec.model import ModelSpec  # noqa: E402
from planner.spec.strategy import Strategy  # noqa: E402
from planner.spec.workload import TrainWorkload  # noqa: E402

HARDWARE = "dgx-h100"
ROUNDS = 5
TARGET_RATE, TARGET_MS = 3_000, 50
SHOWN = 18  # functions


def legal_layouts(model: ModelSpec, workload: TrainWorkload, gpus: int, count: int) -> list[Strategy]:
    """So many of all legal layouts, evenly spread over them."""
    degrees = [2**power for power in range(11)]
    schedules = [("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zbv", 2), ("gpipe", 1)]
    found = []
    for tp, pp, cp in itertools.product(degrees[:5], degrees[:6], degrees[:3]):
        if gpus % (tp * pp * cp):
            continue
        others = itertools.product(degrees[:3], (0, 1, 3), (False, True), ("none", "selective", "full"), schedules)
        for microbatch, zero, sp, recompute, (schedule, vpp) in others:
            keys = {
                "tp": tp, "pp": pp, "cp": cp, "vpp": vpp, "microbatch": microbatch, "zero": zero, "sp": sp,
                "recompute": recompute, "schedule": schedule,
            }  # fmt: skip
            strategy = Strategy.from_dict(keys, gpus=gpus)
            if not violations(model, workload, strategy, gpus):
                found.append(strategy)
    return [found[place] for place in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of one call: others on the machine do not count."""
    began = time.process_time()
    run()
    return time.process_time() - began


def median_seconds(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Of several calls."""
    return statistics.median(seconds(run) for _ in range(rounds))


def yardstick() -> None:
    """A million numbers through a few operations."""
    numbers = np.linspace(1.0, 2.0, 1_000_000)
    for _ in range(10):
        numbers = np.maximum(numbers * 1.01, np.sqrt(numbers))


def where_time_goes(run: Callable[[], Any]) -> None:
    """The functions with the most time of their own, and those with the most in all."""
    profile = cProfile.Profile()
    profile.runcall(run)
    for order in ("tottime", "cumulative"):
        stats: Any = pstats.Stats(profile).sort_stats(order)
        print(f"\n{order:>10} {'share':>6} {'calls':>9}  function")
        for key in stats.fcn_list[:SHOWN]:
            calls, _, own, cumulative, _ = stats.stats[key]
            taken = own if order == "tottime" else cumulative
            file, line, name = key
            place = f"{Path(file).name}:{line} {name}" if line else name
            print(f"{taken:9.3f}s {taken / stats.total_tt:6.1%} {calls:9,}  {place}")


def main(arguments: Sequence[str]) -> None:
    """Print rates, then profiles."""
    name, gpus, count = [*arguments, *("llama3.1-405b", "1024", "3000")[len(arguments) :]]
    model, profile = planner.load_model(name), planner.load_hardware(HARDWARE)
    assert isinstance(model, ModelSpec)
    workload = TrainWorkload(seq_len=8192, global_batch=2048, precision="bf16")
    graph = planner.trace(name)
    layouts = legal_layouts(model, workload, int(gpus), int(count))
    groups = len({(item.pp, item.vpp, item.schedule) for item in layouts})
    print(f"{name} on {gpus} GPUs of {HARDWARE}: {len(layouts):,} legal layouts with {groups} kinds of stages")

    def many() -> None:
        TrainingCost(graph, profile, workload).costs(layouts)

    def one() -> None:
        training_estimate(graph, profile, workload, layouts[len(layouts) // 2])

    def asked() -> None:
        planner.estimate(name, HARDWARE, int(gpus), workload, layouts[len(layouts) // 2])

    taken, stick = median_seconds(many), median_seconds(yardstick)
    rate = len(layouts) / taken
    slow = "" if rate >= TARGET_RATE else f"  below {TARGET_RATE:,}"
    print(f"{'many at once':32} {rate:10,.0f} a second   {taken / stick:6.1f} yardsticks{slow}")
    for label, run in (("one, graph at hand", one), ("planner.estimate, graph cached", asked)):
        taken = median_seconds(run, rounds=15)
        slow = "" if taken * 1e3 <= TARGET_MS else f"  above {TARGET_MS} ms"
        print(f"{label:32} {taken * 1e3:10.1f} ms         {taken / stick:6.1f} yardsticks{slow}")
    print(f"{'yardstick':32} {stick * 1e3:10.1f} ms")
    where_time_goes(many)
    where_time_goes(asked)


if __name__ == "__main__":
    main(sys.argv[1:])
