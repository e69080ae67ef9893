"""The picture: nothing overlaps, nothing is cut, nothing is empty."""

from __future__ import annotations

import struct
from itertools import combinations
from typing import Any

import pytest

from planner.errors import PlannerError
from planner.report.compare_plots import comparison_canvas, comparison_png
from planner.report.compare_verdict import Compared, side_by_side
from tests.report.plans import MODULES, made_up_plan, pipeline, proof


def entries(stages: int, number: int, **keys: Any) -> tuple[Compared, ...]:
    made = [
        made_up_plan({"matmul": 2.0 + place, "tp": 0.5, "bubble": 0.7}, strategy={"tp": 2, "pp": stages},
                     gpus=2 * stages, layers=stages, modules=MODULES, certificate=proof(3.2 + place), **keys)
        for place in range(number)
    ]  # fmt: skip
    names = ["w" * 200, "<script>", "$x_1^{2}$ & \\frac", *(f"plan {place}" for place in range(number))][:number]
    timeline = pipeline(stages, 2 * stages) if stages > 1 else None
    return side_by_side(made, names, [timeline] * number)


CASES = {
    "one": entries(4, 1),
    "two": entries(8, 2),
    "twelve of 64 stages": entries(64, 12),
    "too large": entries(4, 3, gib=120.0),
    "no pipeline": entries(1, 5),
    "models": (*entries(2, 1), *side_by_side([made_up_plan(model="another " * 20)], ["B"])),
}


@pytest.mark.parametrize("name", CASES)
def test_words_are_whole_and_apart(name: str) -> None:
    canvas = comparison_canvas(CASES[name])
    figure = canvas.figure
    renderer = canvas.get_renderer()
    width, height = canvas.get_width_height()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts if text.get_text()]
    for words, box in boxes:
        assert box.x0 >= 0, words
        assert box.y0 >= 0, words
        assert box.x1 <= width, words
        assert box.y1 <= height, words
    for (one, first), (other, second) in combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        along = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert across <= 1.0 or along <= 2.5, (one, other)


@pytest.mark.parametrize("name", CASES)
def test_no_panel_is_empty(name: str) -> None:
    figure = comparison_canvas(CASES[name]).figure
    assert figure.axes
    for axes in figure.axes:
        assert axes.patches or any(len(collection.get_paths()) for collection in axes.collections)


def test_it_is_a_picture_and_the_same_twice() -> None:
    picture = comparison_png(CASES["two"])
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert width == 1430
    assert 800 < height < 3000
    assert comparison_png(CASES["two"]) == picture
    assert len(comparison_png(CASES["twelve of 64 stages"])) < 2_000_000


def test_letters_that_the_font_lacks_do_not_complain(recwarn: pytest.WarningsRecorder) -> None:
    assert comparison_png(side_by_side([made_up_plan()], ["計画 🚀"])).startswith(b"\x89PNG")
    assert [str(warning.message) for warning in recwarn.list if "Glyph" in str(warning.message)] == []


def test_a_picture_that_is_too_tall_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.report.compare_plots._MOST_PIXELS", 500)
    with pytest.raises(PlannerError, match="500 pixels high") as caught:
        comparison_png(CASES["two"])
    assert "html" in caught.value.remedy
