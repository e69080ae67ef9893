"""A step of a pipeline whose ranks exchange gradients and parameters once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost.steps import OnceAStep, StageWork, Step, step

Schedule = Literal["gpipe", "1f1b"]


def case(ahead: Any, back: Any, reduce: Any, gather: Any, *, last: float = 0.1, hop: float = 0.0) -> Any:
    def column(values: Any) -> Any:
        return np.array(values, dtype=float)[:, None]

    work = StageWork(ahead=column(ahead), back=column(back), weight=column(back) * 0, hop=np.array([hop]))
    once = OnceAStep(
        reduce=column(reduce),
        gather=column(gather),
        last=column(reduce) * 0 + last,
        alone=column(reduce) * 0.0,
        optimizer=column(reduce) * 0.01,
        overlapped=np.array([True]),
    )
    return work, once


def taken(work: StageWork, once: OnceAStep, microbatches: int = 4, schedule: Schedule = "1f1b") -> Step:
    pp = len(work.ahead)
    return step(schedule, work, once, rank_of=np.arange(pp), microbatches=np.array([microbatches]), pp=pp, vpp=1)


def test_one_rank_shows_what_outlasts_its_microbatch() -> None:
    found = taken(*case([1.0], [2.0], [5.0], [1.5]))
    assert found.pipeline[0] == pytest.approx(12.0)
    assert found.exposed[0] == pytest.approx((5 - 2) + (1.5 - 1))
    assert found.optimizer[0] == pytest.approx(0.05)


def test_the_last_bucket_is_never_hidden() -> None:
    found = taken(*case([1.0], [2.0], [1.0], [0.5]))
    assert found.exposed[0] == pytest.approx(0.1 * 1.0 + 0.1 * 0.5)


def test_a_rank_that_waits_for_others_hides_its_exchanges() -> None:
    """Rank 1 starts a forward late and ends a backward early; rank 0 does neither."""
    hidden = taken(*case([1.0, 1.0], [2.0, 2.0], [0.0, 3.5], [0.0, 1.5]))
    shown = taken(*case([1.0, 1.0], [2.0, 2.0], [3.5, 0.0], [1.5, 0.0]))
    assert hidden.exposed[0] == pytest.approx(0.0)
    assert shown.exposed[0] == pytest.approx(1.5 + 0.5)


times = st.floats(0.01, 3.0)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda pp: st.tuples(*(st.lists(times, min_size=pp, max_size=pp) for _ in range(4)))
    ),
    st.integers(1, 9),
    st.sampled_from(["gpipe", "1f1b"]),
    st.floats(0.0, 0.5),
    st.data(),
)
def test_more_of_anything_never_makes_a_faster_step(
    lists: Any, microbatches: int, schedule: Schedule, hop: float, data: Any
) -> None:
    work, once = case(*lists, hop=hop)
    # what runs alone is a size of its own, a bucket's or a block's
    once = replace(once, last=np.minimum(1.0, 0.05 / once.reduce))
    before = taken(work, once, microbatches, schedule).seconds[0]
    rank = data.draw(st.integers(0, len(work.ahead) - 1))
    more = data.draw(times)
    name = data.draw(st.sampled_from(["ahead", "back", "weights", "optimizer"]))
    if name == "weights":
        grown = np.ones_like(once.reduce)
        grown[rank] += more
        reduce = once.reduce * grown
        once = replace(once, reduce=reduce, gather=once.gather * grown, last=np.minimum(1.0, 0.05 / reduce))
    elif name == "optimizer":
        once = replace(once, optimizer=once.optimizer + more * (np.arange(len(work.ahead)) == rank)[:, None])
    else:
        longer = getattr(work, name).copy()
        longer[rank] += more
        work = replace(work, **{name: longer})
    after = taken(work, once, microbatches, schedule).seconds[0]
    assert after >= before - 1e-12
