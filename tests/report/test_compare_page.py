"""The page: whole, alone, small, escaped, and reachable by keys."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from planner.report.compare_page import comparison_html
from planner.report.compare_verdict import Compared, side_by_side
from planner.spec.estimate import Memory
from tests.report.plans import MODULES, made_up_plan, pipeline, proof

EVIL = '<script>alert("x")</script>'
_VOID = {"meta"}


class Reader(HTMLParser):
    """Collects tags and attributes, and sees to it that what opens closes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def entries(stages: int = 4, number: int = 2, microbatches: int = 8) -> tuple[Compared, ...]:
    plans = [
        made_up_plan({"matmul": 2.0 + place, "tp": 0.5}, strategy={"tp": 2, "pp": stages}, gpus=2 * stages,
                     layers=stages, modules=MODULES, certificate=proof(2.5 + place))
        for place in range(number)
    ]  # fmt: skip
    timeline = pipeline(stages, microbatches, hop=0.05)
    return side_by_side(plans, timelines=[timeline] * number)


def test_the_verdict_is_the_first_heading() -> None:
    page = comparison_html(entries())
    (title,) = re.findall(r"<h1>(.*?)</h1>", page)
    assert title == "A is 1.40x faster than B: 1.00\xa0s less matrix products."
    assert page.index("<h1>") < page.index("<h2")


def test_it_is_whole_and_stands_alone() -> None:
    page = comparison_html(entries())
    found = Reader(page)
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "img", "iframe")]
    assert not re.search(r"(?:https?:)?//|url\(|@import", page)
    anchors = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    assert {attributes["href"] for attributes in found.of("a")} == {f"#{anchor}" for anchor in anchors}
    assert "prefers-color-scheme:dark" in page
    assert "@media print" in page
    assert comparison_html(entries()) == page


def test_what_scrolls_is_reached_by_keys_and_drawings_have_words() -> None:
    found = Reader(comparison_html(entries()))
    scrolling = [attributes for _, attributes in found.tags if "scroll" in attributes.get("class", "").split()]
    assert len(scrolling) == 5, "two stages' memory, two pipelines, one table"
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in scrolling)
    assert all(each["role"] == "img" and each["aria-label"] for each in found.of("svg"))


def test_names_are_escaped_and_may_be_long() -> None:
    plans = [made_up_plan(model=EVIL), made_up_plan(model='"><b onclick=x>')]
    page = comparison_html(side_by_side(plans, [EVIL, "y" * 200]))
    Reader(page)
    assert "<script" not in page
    assert "<b " not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)" in page
    assert "y" * 200 in page
    assert "No plan is called faster" in page


def test_pieces_stand_where_the_chart_says() -> None:
    found = Reader(comparison_html(side_by_side([made_up_plan({"matmul": 3.0, "tp": 1.0})])))
    first, second = found.of("rect")[:2]
    assert (first["class"], first["x"], first["width"]) == ("matmul", "0", "3000")
    assert (second["class"], second["x"], second["width"]) == ("tp", "3000", "1000")


def test_a_line_with_gaps_ends_where_its_last_piece_ends() -> None:
    page = comparison_html(entries(stages=2, number=1, microbatches=2))
    path = next(each for each in Reader(page).of("path") if each["class"] == "forward")
    lengths = [int(length) for length in re.findall(r"h(\d+)", path["d"])]
    assert sum(lengths) == pytest.approx(4000 * 2 / 9.1, abs=4), "two forwards of a second in 9.1 s"
    gaps = [int(gap) for gap in re.findall(r"m(\d+) 0", path["d"])]
    last = 4000 * 3.05 / 9.1  # stage 0: F F, then each backward as it comes
    assert sum(lengths) + sum(gaps) <= last


def test_one_plan_is_described_by_facts() -> None:
    page = comparison_html(entries(number=1))
    assert '<h2 id="facts">Facts</h2>' in page
    assert "The same in all" not in page
    assert "Differences" not in page


def test_what_does_not_fit_is_marked() -> None:
    page = comparison_html(side_by_side([made_up_plan(gib=100.0), made_up_plan()]))
    assert '<td class="bad">no, 30.0 GiB</td>' in page
    assert "does not fit: up to 30.0 GiB too much" in page


@pytest.mark.parametrize(("stages", "number", "microbatches"), [(64, 12, 256), (64, 1, 64), (1, 12, 1)])
def test_many_stages_and_plans_stay_small(stages: int, number: int, microbatches: int) -> None:
    made = entries(stages, number, microbatches)
    every = Memory(**dict.fromkeys(Memory().parts, 1e9))
    for entry in made:
        object.__setattr__(entry.plan.estimate, "memory_per_stage", (every,) * stages)
    page = comparison_html(made)
    Reader(page)
    assert len(page.encode()) < 2_000_000
    if stages > 1:
        labels = re.findall(r">(stage \d+)</span>", page)
        assert labels[0] == "stage 0"
        assert labels[-1] == f"stage {stages - 1}"
