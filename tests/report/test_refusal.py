"""That nothing fits, in words: what a terminal shows, what the data holds."""

from __future__ import annotations

import io
from typing import Any

import pytest

from planner.report.refusal import show_refusal
from planner.spec.estimate import Memory
from planner.spec.misfit import Change, Closest, Misfit, seconds_text
from planner.spec.strategy import Strategy
from planner.units import GIB

CLOSEST = Closest(
    strategy=Strategy(tp=4, pp=2, zero=1, recompute="full"),
    stage=1,
    memory=Memory(optimizer_bytes=98.6 * GIB, weights_bytes=49.4 * GIB, context_bytes=5.0 * GIB),
    high_bytes=180.0 * GIB,
    capacity_bytes=80.0 * GIB,
)
MORE = Change(
    flags="--gpus 32", strategy=Strategy(tp=8, dp=4), gpus=32, step_seconds=14.1, memory_high_bytes=71.2 * GIB
)
SHORTER = Change(
    flags="--seq-len 512", strategy=Strategy(tp=8), gpus=8, step_seconds=0.0351, memory_high_bytes=79.0 * GIB
)


def misfit(**keys: Any) -> Misfit:
    given: dict[str, Any] = {"limit": "memory", "gpus": (8,), "candidates": 214, "capacity_bytes": 80.0 * GIB,
                             "closest": CLOSEST, "changes": (MORE, SHORTER)}  # fmt: skip
    return Misfit(**{**given, **keys})


def test_memory_says_what_binds_by_how_much_and_what_fits() -> None:
    assert misfit(failed=("--precision fp8",), untried=("allow recompute",)).lines == (
        "error[memory]: no layout fits 80 GiB on 8 GPUs",
        "  closest: tp4 pp2 zero1, full recompute, needs 153 GiB on stage 1, up to 180 GiB (optimizer 98.6 GiB, "
        "weights 49.4 GiB); 100 GiB too much",
        "  fix: --gpus 32 (fits with up to 71.2 GiB, 14.1 s/step)",
        "   or: --seq-len 512 (fits with up to 79 GiB, 35.1 ms/step)",
        "  does not help: --precision fp8",
        "  not tried: allow recompute",
    )


def test_a_deadline_and_rules() -> None:
    late = misfit(limit="deadline", gpus=(8, 16), deadline_seconds=2.0, best_seconds=2.5, closest=None)
    assert late.rule == "no layout on 8 to 16 GPUs has a step of at most 2.00 s"
    assert late.value == "2.50 s at best, 25 % too long"
    broken = misfit(
        limit="rules", gpus=(1,), closest=None, changes=(), illegal={"heads": 3, "batch": 211},
        broken="tp divides the heads, got 3", failed=("leave tp free",),
    )  # fmt: skip
    assert broken.lines == (
        "error[rules]: none of 214 layouts on one GPU can run",
        "  got: 211 batch, 3 heads; tp divides the heads, got 3",
        "  fix: none found: leave tp free tried, and nothing fits",
    )


def test_the_data_says_the_same() -> None:
    data = misfit().to_dict()
    assert (data["limit"], data["gpus"], data["rule"]) == ("memory", [8], misfit().rule)
    assert data["closest"]["missing_bytes"] == 100.0 * GIB
    assert [change["flags"] for change in data["changes"]] == ["--gpus 32", "--seq-len 512"]
    assert data["changes"][0]["strategy"] == {"tp": 8, "dp": 4}


def test_a_terminal_shows_every_word_within_its_width() -> None:
    found, stream = misfit(failed=tuple(f"change number {count}" for count in range(20))), io.StringIO()
    show_refusal(found, stream)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert " ".join(stream.getvalue().split()) == " ".join(" ".join(found.lines).split())
    assert all(line.startswith(" ") for line in lines[1:])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.774, "8.77 s"), (14.06, "14.1 s"), (9.999, "10.0 s"), (1234.5, "1,234 s"), (0.0351, "35.1 ms"),
     (2.5e-6, "2.50 µs"), (0.0, "0 ns")],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
