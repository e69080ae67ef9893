"""A run on two hosts: it trains as on one, and tells which ranks it lost where one host is lost."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
from pathlib import Path

import pytest

from planner.spec.hardware_sources import load_hardware
from planner.spec.measured import load_measured
from planner.spec.plan import Plan
from tests.execute.training import plan_for, trained
from tests.execute.world import run_world
from tests.hosts import ADDRESSES, Hosts, ended
from tests.tiny import tiny_spec

MEGABITS = 1000
LONGEST_SECONDS = 60  # for what takes about ten
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


def in_the_middle(hosts: Hosts, folder: Path) -> list[subprocess.Popen[str]]:
    """Both launchers of a run that has done its first step, and has many more."""
    launchers = started(hosts, folder, plan_of_two_nodes(pp=2), "--steps", "100000", "--timeout", "4")
    progress = launchers[0].stderr
    assert progress is not None
    said = list(itertools.takewhile(lambda line: not line.startswith("step 1 of"), progress))
    assert launchers[0].poll() is None, "".join(said)
    return launchers


def require_named(said: tuple[int, str, str], lost: int) -> None:
    """What a launcher ends with when the other host is lost."""
    code, out, error = said
    assert code == 1, error
    assert out == ""
    assert f"error[rank.{lost}]: rank {lost} is gone, and the run with it" in error
    assert f"rank {lost} (stage {lost})" in error
    assert ADDRESSES[lost] in error


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


@pytest.mark.slow
@pytest.mark.parametrize("slow_hosts", [MEGABITS], indirect=True)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_whose_processes_are_killed_is_named(slow_hosts: Hosts, tmp_path: Path, lost: int) -> None:
    launchers = in_the_middle(slow_hosts, tmp_path)
    slow_hosts[lost].kill()
    require_named(ended(launchers, LONGEST_SECONDS)[1 - lost], lost)


@pytest.mark.slow
@pytest.mark.parametrize("slow_hosts", [MEGABITS], indirect=True)
@pytest.mark.parametrize("cut", [0, 1])
def test_hosts_whose_link_is_cut_name_each_other(slow_hosts: Hosts, tmp_path: Path, cut: int) -> None:
    launchers = in_the_middle(slow_hosts, tmp_path)
    slow_hosts[cut].unplug()
    first, second = ended(launchers, LONGEST_SECONDS)
    require_named(first, 1)
    require_named(second, 0)
