"""Sweeps: every point the answer of its own question, interrupts, and what cannot be varied."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from planner.errors import PlannerError
from planner.search.answers import answer
from planner.search.optimize import Search
from planner.search.sweeps import pareto, swept
from planner.search.variations import varied
from planner.spec.overrides import with_changes
from planner.spec.sweep import points_of, vary_of
from tests.cost.training_cases import hardware
from tests.search.questions import best_seconds, cluster, question


def test_every_point_is_the_answer_of_its_question() -> None:
    asked = question(profile=cluster(link_gb=0.5))
    found = swept(asked, 8, {"intra_node_bandwidth": ["0.1x:10x"]})
    assert found.keys == ("intra_node_bandwidth",)
    assert [point.values[0] for point in found.points] == list(found.values[0])
    assert "1x" in found.values[0]
    for point in found.points:
        changed, _ = varied(asked, 8, {"intra_node_bandwidth": point.values[0]})
        assert point.step_seconds == pytest.approx(best_seconds(changed, 8), rel=1e-12)
        assert point.tokens_per_second_per_gpu == pytest.approx(asked.workload.tokens / point.step_seconds / 8)
    steps = [point.step_seconds for point in found.points]
    assert all(slow >= fast * (1 - 1e-12) for slow, fast in itertools.pairwise(steps))
    labels = [point.label for point in found.points]
    assert len(set(labels)) > 1
    assert len(found.changes) == sum(one != other for one, other in itertools.pairwise(labels))


def test_more_memory_never_worsens_and_too_little_is_told() -> None:
    found = swept(question(), 4, {"max_memory": [m / 2**20 for m in (500, 1100, 1500, 2000, 4000, 9000)]})
    assert found.points[0].strategy is None
    assert found.points[0].reason == "nothing fits"
    steps = [point.step_seconds for point in found.points if point.strategy]
    assert len(steps) >= 3
    assert all(slow >= fast * (1 - 1e-12) for slow, fast in itertools.pairwise(steps))
    for point in found.points:
        assert point.memory_high_bytes <= float(point.values[0]) * 2**30


def test_a_map_of_gpus_and_batch() -> None:
    found = swept(question(), 4, {"gpus": ["2:8"], "global_batch": [8, 12]})
    assert found.values == ((2, 4, 8), (8, 12))
    assert found.asked == len(found.points) == 6
    point = found.at(4, 12)
    assert point is not None
    assert point.gpus == 4
    assert point.step_seconds == pytest.approx(best_seconds(question(batch=12), 4))
    assert found.rows[3] == {
        "gpus": 4, "global_batch": 12, "best": point.label, "step_seconds": point.step_seconds,
        "tokens_per_second_per_gpu": point.tokens_per_second_per_gpu, "memory_bytes": point.memory_bytes,
        "reason": "",
    } | {"gpus": 4}  # fmt: skip
    assert found.to_dict()["asked"] == 6


def test_a_point_that_cannot_run_says_so_and_the_others_stand() -> None:
    found = swept(question(fix="dp=2,tp=1,pp=1,cp=1"), 2, {"gpus": [2, 3]})
    assert found.points[0].strategy is not None
    assert found.points[1].strategy is None
    assert "product" in found.points[1].reason
    with pytest.raises(PlannerError):
        swept(question(fix="dp=2,tp=1,pp=1,cp=1"), 2, {"gpus": [3, 5]})


def test_an_interrupt_keeps_what_was_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, batch, calls = question(), Search._batch, []

    def interrupts(self: Search, rows: Any, *, usual: bool = False) -> None:
        calls.append(usual)
        if sum(calls) == 3:
            raise KeyboardInterrupt
        batch(self, rows, usual=usual)

    monkeypatch.setattr(Search, "_batch", interrupts)
    found = swept(asked, 4, {"seq_len": [48, 96, 192, 384]})
    assert found.interrupted
    assert len(found.points) == 2
    assert found.asked == 4


def test_the_front_falls_in_memory_and_in_speed() -> None:
    found = pareto(question(recompute=["none", "full"]), 4, points=6)
    assert len(found.points) >= 3
    for one, other in itertools.pairwise(found.points):
        assert other.memory_high_bytes < one.memory_high_bytes
        assert other.tokens_per_second_per_gpu <= one.tokens_per_second_per_gpu * (1 + 1e-12)
    best = answer(question(recompute=["none", "full"]), (4,)).found.best[0]
    assert found.points[0].step_seconds == pytest.approx(best.seconds)


def test_relaxing_a_constraint_never_worsens() -> None:
    tight = question(fix="tp=2", max_memory_bytes=2.0 * 2**20, recompute=["full"])
    best = best_seconds(tight, 4)
    for loose in (
        question(max_memory_bytes=2.0 * 2**20, recompute=["full"]),
        question(fix="tp=2", recompute=["full"]),
        question(fix="tp=2", max_memory_bytes=2.0 * 2**20),
    ):
        assert best_seconds(loose, 4) <= best * (1 + 1e-12)


def test_the_names_of_parameters() -> None:
    asked = question()
    changed, gpus = varied(
        asked, 4, {"memory": "2x", "memory_bandwidth": "0.5x", "peak_flops": "2x", "gpus": "2x",
                   "workload.seq_len": 192, "topology.flat.latency_us": 7.0, "global_batch": "0.5x",
                   "max_memory": 3},
    )  # fmt: skip
    device, before = changed.profile.device, asked.profile.device
    assert gpus == 8
    assert device.memory_gib == 2 * before.memory_gib
    assert device.memory_bandwidth == before.memory_bandwidth / 2
    assert {key: value / 2 for key, value in device.peak_tflops.items()} == before.peak_tflops
    assert (changed.workload.seq_len, changed.workload.global_batch) == (192, 8)
    assert changed.profile.topology["flat"].latency_us == 7.0
    assert changed.wishes.max_memory_bytes == 3 * 2**30
    assert asked == question()


def test_bandwidths_between_nodes_and_inside_them() -> None:
    asked = question(profile=hardware("dgx-h100"))
    changed, _ = varied(asked, 8, {"inter_node_bandwidth": "0.5x"})
    assert changed.profile == with_changes(asked.profile, {"inter_node_bandwidth": "0.5x"})


@pytest.mark.parametrize(
    ("vary", "key"),
    [
        ({}, "vary"),
        ({"gpus": [2], "seq_len": [48], "global_batch": [8]}, "vary"),
        ({"bandwith": ["2x"]}, "vary"),
        ({"topology.spine.latency_us": [2]}, "topology.spine.latency_us"),
        ({"peak_flops": [100]}, "peak_flops"),
        ({"gpus": [0]}, "gpus"),
        ({"gpus": ["many"]}, "gpus"),
        ({"max_memory": [-1]}, "max_memory"),
        ({"seq_len": ["long"]}, "seq_len"),
        ({"seq_len": ["1:2:3"]}, "vary"),
        ({"seq_len": ["8x:4"]}, "vary"),
        ({"seq_len": [200, "100:50"]}, "vary"),
        ({"seq_len": []}, "vary"),
        ({"inter_node_bandwidth": ["2x"]}, "inter_node_bandwidth"),
    ],
)
def test_what_cannot_be_varied_is_refused(vary: dict[str, list[Any]], key: str) -> None:
    with pytest.raises(PlannerError) as caught:
        swept(question(), 4, vary)
    assert caught.value.key == key
    assert caught.value.remedy


def test_ranges() -> None:
    assert points_of("seq_len", ["1024:8192"]) == (1024, 2048, 4096, 8192)
    assert points_of("bandwidth", ["0.25x:4x"]) == (
        "0.25x", "0.371x", "0.552x", "0.82x", "1x", "1.22x", "1.81x", "2.69x", "4x",
    )  # fmt: skip
    assert points_of("bandwidth", ["0.125x:2x"])[4:7] == ("0.61x", "1x", "1.35x")
    assert points_of("bandwidth", ["2x:4x"])[::7] == ("2x", "4x")
    assert points_of("latency", ["1.5:12"])[::7] == (1.5, 12.0)
    assert len(points_of("batch", ["10:100"])) == 8
    assert points_of("precision", ["bf16", "fp8", "bf16"]) == ("bf16", "fp8")
    assert points_of("seq_len", ["4:4"]) == (4,)
    assert vary_of(["inter-node-bandwidth=0.5x,2x", "gpus=8:16"]) == {
        "inter_node_bandwidth": ("0.5x", "2x"), "gpus": (8, 16),
    }  # fmt: skip
    for wrong in (["gpus"], ["gpus="], ["=4"], ["gpus=4", "gpus=8"], ["gpus=4,,8"]):
        with pytest.raises(PlannerError):
            vary_of(wrong)
