"""What is minimised, in its own unit, and the step that a number of GPUs has to stay below to be better.

    step_seconds     T
    gpus             g, where T is at most the deadline
    cost_per_token   price / 3600 · g · T / tokens

At one number of GPUs each of them rises with T, so the shortest step is the best layout whatever is minimised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from planner.spec.wishes import Wishes
from planner.spec.workload import TrainWorkload

_HOUR_SECONDS = 3600.0


def value_of(wishes: Wishes, workload: TrainWorkload, gpus: int, step_seconds: float) -> float:
    """The objective of a step on so many GPUs."""
    if wishes.minimize == "gpus":
        return float(gpus)
    if wishes.minimize == "cost_per_token":
        return step_seconds * _cost_per_step_second(wishes, workload, gpus)
    return step_seconds


def step_limit_seconds(wishes: Wishes, workload: TrainWorkload, gpus: int, best: float) -> float:
    """Only steps below this are better than an objective of `best`, infinite where there is none yet."""
    if wishes.minimize == "gpus":
        return math.nextafter(wishes.deadline_seconds, math.inf) if gpus < best else 0.0
    if wishes.minimize == "cost_per_token":
        return best / _cost_per_step_second(wishes, workload, gpus)
    return best


def in_order(wishes: Wishes, gpus: Iterable[int]) -> tuple[int, ...]:
    """Numbers of GPUs as they are tried: first those where a good limit for the others is likely."""
    return tuple(sorted(set(gpus), reverse=wishes.minimize == "step_seconds"))


def _cost_per_step_second(wishes: Wishes, workload: TrainWorkload, gpus: int) -> float:
    return wishes.price_per_gpu_hour / _HOUR_SECONDS * gpus / workload.tokens
