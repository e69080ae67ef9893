"""Findings: what a search may say around a plan, and what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import PlannerError
from planner.spec.findings import Finding
from planner.spec.strategy import Strategy

EASING: dict[str, Any] = {"kind": "easing", "text": "4 GiB more memory", "before": 10.0, "after": 9.4}


def test_plain_data_comes_back() -> None:
    found = Finding(kind="flip", text="inter-node bandwidth × 2.1", key="inter_node_bandwidth", before=2.0,
                    after=1.5, strategy=Strategy(tp=4, pp=8))  # fmt: skip
    assert Finding.from_dict(found.to_dict()) == found
    assert found.to_dict()["strategy"] == {"tp": 4, "pp": 8}


def test_what_is_saved() -> None:
    assert Finding(**EASING).saving == pytest.approx(0.06)
    lost = Finding(kind="runner_up", text="a longer bubble", before=2.0, after=2.5, strategy=Strategy(tp=2))
    assert lost.saving == pytest.approx(-0.25)
    assert Finding(**EASING | {"before": 0.0, "after": 0.0}).saving == 0.0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"text": " "}, "text"),
        ({"after": 10.1}, "after"),
        ({"unit": "bytes"}, "unit"),
        ({"kind": "flip"}, "strategy"),
        ({"kind": "runner_up"}, "strategy"),
        ({"before": -1.0}, "before"),
        ({"kind": "guess"}, "kind"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(PlannerError) as caught:
        Finding.from_dict(EASING | changes)
    assert caught.value.key.endswith(key)


def test_a_limit_may_be_in_bytes() -> None:
    bound = Finding(kind="binding", text="memory of stage 0", before=76.0, after=80.0, unit="bytes")
    assert bound.strategy is None
