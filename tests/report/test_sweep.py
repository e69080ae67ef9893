"""A sweep on a terminal and as a picture."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from planner.errors import PlannerError
from planner.report.sweep import show_sweep, sweep_png
from planner.spec.strategy import Strategy
from planner.spec.sweep import Sweep, SweepPoint, Value
from planner.units import GIB

DEEP, WIDE = Strategy(pp=4, dp=2), Strategy(tp=2, dp=4, zero=1)


def point(*values: Value, strategy: Strategy | None = WIDE, step: float = 2.0, **keys: Any) -> SweepPoint:
    if strategy is None:
        return SweepPoint(values=values, gpus=8, reason="nothing fits")
    return SweepPoint(
        values=values, gpus=8, strategy=strategy, step_seconds=step, objective=step,
        tokens_per_second_per_gpu=1000.0 / step, memory_bytes=40.0 * GIB, memory_high_bytes=48.0 * GIB, **keys,
    )  # fmt: skip


CURVE = Sweep(
    keys=("inter_node_bandwidth",),
    values=(("0.25x", "0.5x", "1x", "2x"),),
    points=(point("0.25x", strategy=None), point("0.5x", strategy=DEEP, step=4.0), point("1x"), point("2x")),
)
MAP = Sweep(
    keys=("gpus", "global_batch"),
    values=((8, 16), (64, 128)),
    points=(point(8, 64), point(8, 128, strategy=DEEP), point(16, 64, strategy=None), point(16, 128, gap=0.1)),
)
FRONT = Sweep(
    keys=("max_memory",), values=((80.0, 46.5),), points=(point(80.0), point(46.5, strategy=DEEP, step=4.0))
)


def shown(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> str:
    show_sweep(sweep)
    return capsys.readouterr().out


def test_the_table_says_where_the_best_changes(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(CURVE, capsys)
    assert text.startswith("2 layouts are the best somewhere on 4 points.")
    assert "between inter_node_bandwidth 0.5x and 1x: pp4 dp2 → tp2 dp4 zero1" in text
    assert "nothing fits at 1 of 4 points" in text
    rows = [line.split() for line in text.splitlines() if re.match(r"\d", line)][1:]
    assert [row[0] for row in rows] == ["0.25x", "0.5x", "1x", "2x"]
    assert "changes" in rows[2]
    assert "changes" not in rows[3]
    assert rows[3][-2:] == ["500", "40.0"]


def test_a_map_has_a_row_for_each_point_and_says_what_is_not_proven(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(MAP, capsys)
    assert "gpus 16, global_batch 128: not proven, at most 10 % from the best" in text
    assert sum(line.startswith(("8 ", "16 ")) for line in text.splitlines()) == 4


def test_an_interrupted_sweep_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    cut = Sweep(keys=CURVE.keys, values=CURVE.values, points=CURVE.points[:2], interrupted=True)
    assert "Interrupted: 2 of 4 points were solved." in shown(cut, capsys)
    nothing = Sweep(keys=CURVE.keys, values=CURVE.values, points=CURVE.points[:1])
    assert "Nothing fits at any of 1 points." in shown(nothing, capsys)
    one = Sweep(keys=CURVE.keys, values=CURVE.values, points=CURVE.points[2:])
    assert "tp2 dp4 zero1 is the best at every point that fits." in shown(one, capsys)


def test_another_objective_has_its_own_column(capsys: pytest.CaptureFixture[str]) -> None:
    cheap = Sweep(keys=CURVE.keys, values=CURVE.values, points=CURVE.points, minimize="cost_per_token")
    assert "objective" in shown(cheap, capsys)
    assert "objective" not in shown(CURVE, capsys)


@pytest.mark.parametrize("sweep", [CURVE, MAP, FRONT], ids=["curve", "map", "front"])
def test_pictures(sweep: Sweep) -> None:
    from matplotlib.image import imread

    picture = sweep_png(sweep)
    assert picture == sweep_png(sweep)
    pixels = imread(io.BytesIO(picture))
    assert pixels.shape[0] > 300
    assert len({tuple(colour) for row in (pixels * 255).astype(int)[::4, ::4] for colour in row}) > 4


def test_a_picture_of_nothing_is_refused() -> None:
    empty = Sweep(keys=CURVE.keys, values=CURVE.values, points=CURVE.points[:1])
    with pytest.raises(PlannerError) as caught:
        sweep_png(empty)
    assert caught.value.key == "output"
