"""A run's steps: a rank that waits for others is watched."""

from __future__ import annotations

import functools
from pathlib import Path

from tests.execute.training import plan_for, watched_reductions
from tests.execute.world import run_world
from tests.tiny import tiny_spec


def test_a_rank_is_watched_while_it_hears_whether_to_go_on(tmp_path: Path) -> None:
    plan = plan_for(tiny_spec("llama", layers=2, vocab=99), 4, gpus=2, dp_replicate=2)
    for watched in run_world(2, functools.partial(watched_reductions, plan, tmp_path, steps=2)):
        assert len(watched) >= 2, "each of two steps ends with the ranks' word whether to go on"
        assert all(watched)
