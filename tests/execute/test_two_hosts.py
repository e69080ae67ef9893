"""A run on two hosts: it trains as on one."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
from pathlib import Path

import pytest

from planner.spec.hardware_sources import load_hardware
from planner.spec.measured import load_measured
from planner.spec.plan import Plan
from tests.execute.training import plan_for, trained
from tests.execute.world import run_world
from tests.hosts import Hosts, ended
from tests.tiny import tiny_spec

MEGABITS = 1000
SPEC = tiny_spec("llama", layers=2, vocab=99)


def plan_of_two_nodes(**keys: int) -> Plan:
    """Two ranks, each on a node of its own."""
    node = load_hardware("dgx-h100")
    single = dataclasses.replace(node, device=dataclasses.replace(node.device, gpus_per_node=1))
    return dataclasses.replace(plan_for(SPEC, 4, gpus=2, **keys), hardware_profile=single)


def started(hosts: Hosts, folder: Path, plan: Plan, *flags: str) -> list[subprocess.Popen[str]]:
    """torchrun on both hosts; `--` before the module, for torchrun takes --log for one of its own flags."""
    plan.save(folder / "plan.yaml")
    words = ("-m", "--", "planner.execute", str(folder / "plan.yaml"), "--dtype", "fp64", "--lr", "1e-2")
    return [host.torchrun(1, *words, "--log", str(folder / "log.jsonl"), *flags) for host in hosts]


@pytest.mark.slow
@pytest.mark.parametrize("slow_hosts", [MEGABITS], indirect=True)
def test_tensor_parallel_across_hosts_trains_as_one_process(slow_hosts: Hosts, tmp_path: Path) -> None:
    said = ended(started(slow_hosts, tmp_path, plan_of_two_nodes(tp=2), "--steps", "3"), 120)
    assert [code for code, *_ in said] == [0, 0], said
    (tmp_path / "alone").mkdir()
    (losses,) = run_world(1, functools.partial(trained, plan_for(SPEC, 4), tmp_path / "alone", steps=3))
    log = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log == pytest.approx(losses, rel=1e-9, abs=0)
    assert [entry.rank for entry in load_measured(tmp_path / "measured.json").memory] == [0, 1]
