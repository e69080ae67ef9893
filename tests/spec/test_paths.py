"""Patterns of module paths: which speaks for a path, and folding equal layers into one line."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from planner.spec.paths import NOTHING, Span, breadth, folded, is_pattern, lookup, unmatched
from tests.spec.spec_strategies import spans, words
from tests.spec.strategies import STEADY

paths = st.tuples(words, st.integers(0, 20), words).map(lambda parts: ".".join(map(str, parts)))


@pytest.mark.parametrize(
    ("pattern", "path", "width"),
    [
        ("head", "head", 1),
        ("head", "heads", 0),
        ("layers.0-79.mlp", "layers.79.mlp", 80),
        ("layers.0-79.mlp", "layers.80.mlp", 0),
        ("layers.0,2,4-7.mlp", "layers.5.mlp", 6),
        ("layers.0,2,4-7.mlp", "layers.3.mlp", 0),
        ("layers.*.mlp", "layers.3.mlp", math.inf),
        ("layers.*", "layers.3.mlp", 0),
        ("a.0-1.b.0-2", "a.1.b.2", 6),
        ("layers.0-9", "layers.x", 0),
    ],
)
def test_breadth(pattern: str, path: str, width: float) -> None:
    assert breadth(pattern, path) == width


def test_the_narrowest_pattern_speaks_and_of_equals_the_last() -> None:
    table = {"layers.*.mlp": "all", "layers.0-9.mlp": "ten", "layers.3.mlp": "one", "layers.5-5.mlp": "x"}
    said = [lookup(table, f"layers.{layer}.mlp") for layer in (3, 5, 9, 10)]
    assert said == ["one", "x", "ten", "all"]
    assert lookup({"a.1": 1, "a.1-1": 2}, "a.1") == 2
    assert lookup(table, "head") is None


def test_equal_layers_fold() -> None:
    table = {f"layers.{layer}.{name}": split for layer in range(4) for name, split in (("up", "c"), ("down", "r"))}
    table |= {"layers.2.up": "replicate", "head": "vocab"}
    assert folded(table) == {
        "layers.0-1,3.up": "c",
        "layers.2.up": "replicate",
        "layers.0-3.down": "r",
        "head": "vocab",
    }


@settings(max_examples=100, **STEADY)
@given(st.dictionaries(paths | words, st.sampled_from("abc"), max_size=12))
def test_folding_loses_nothing(table: dict[str, str]) -> None:
    short = folded(table)
    assert all(map(is_pattern, short))
    assert {path: lookup(short, path) for path in table} == table


@settings(max_examples=100, **STEADY)
@given(spans() | st.just(NOTHING))
def test_spans_have_a_plain_form(span: Span) -> None:
    assert Span.from_plain(span.to_plain()) == span
    assert len(span) == sum(number in span for number in range(1100))


@pytest.mark.parametrize(
    "plain", ["9-3", "-1", "a", "", "1-2-3", 1.0, True, None, "1 - 2", "9" * 400, 10**400, "٣"]
)
def test_what_is_no_span(plain: object) -> None:
    with pytest.raises(ValueError, match="range"):
        Span.from_plain(plain)


@pytest.mark.parametrize("text", ["", "a..b", "a b", "a.", "layers.3-1.x", "layers.0,9-8"])
def test_what_is_no_pattern(text: str) -> None:
    assert not is_pattern(text)


def test_a_star_beside_what_differs_matches_nothing() -> None:
    assert breadth("blocks.*.mlp", "blocks.0.ffn") == 0
    patterns = ["blocks.*.mlp", "blocks.*.ffn", "head"]
    assert unmatched(patterns, ["blocks.0.ffn", "norm"]) == ["blocks.*.mlp", "head"]
