"""Small questions to the planner: a tiny model on a cluster in round numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.search.answers import Answer, Question, answer, runners_up
from planner.search.plans import plan_of
from planner.spec.hardware import HardwareProfile
from planner.spec.plan import Plan
from planner.spec.wishes import Wishes
from tests.cost.training_cases import exact, tiny, workload
from tests.tiny import tiny_spec

LAYERS = 4
SLOW = 1e-3  # of a GPU's rates, as if the model were so much larger


def cluster(*, link_gb: float = 0.05, memory_gib: float = 1.0, **changes: Any) -> HardwareProfile:
    """GPUs that compute slowly, on a link of so many GB/s."""
    return exact(
        **{
            "device__peak_tflops__bf16": 500.0 * SLOW,
            "device__memory_bandwidth_gb_per_second": 1000.0 * SLOW,
            "device__memory_gib": memory_gib,
            "topology__flat__bandwidth_gb_per_second": link_gb,
            "topology__flat__latency_us": 5.0,
            **changes,
        }
    )


def question(
    model: str = "llama",
    profile: HardwareProfile | None = None,
    *,
    batch: int = 16,
    length: int = 96,
    **wishes: Any,
) -> Question:
    """A question about a tiny model of four layers; `wishes` are keys of Wishes as plain data."""
    return Question(
        spec=dataclasses.replace(tiny_spec(model), layers=LAYERS),
        graph=tiny(model, LAYERS),
        profile=profile or cluster(),
        workload=workload(seq_len=length, global_batch=batch),
        wishes=Wishes.from_dict(wishes),
    )


def planned(given: Answer) -> Plan:
    """The plan of an answer."""
    asked = given.question
    return plan_of(
        model="tiny", hardware="exact", graph=asked.graph, profile=asked.profile, workload=asked.workload,
        arrangement=given.found.best[0].arrangement, command="tp-plan plan tiny", model_digest="0" * 64,
        hardware_digest="0" * 64, certificate=given.found.certificate, runners_up=runners_up(given),
    )  # fmt: skip


def best_seconds(asked: Question, gpus: int) -> float:
    """The shortest step."""
    return answer(asked, (gpus,)).found.best[0].seconds
