"""What a person who plans by hand would expect of every plan."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from planner.cost.ways import Arrangement
from planner.search.arranged import module_lines, settled
from planner.spec.hardware import HardwareProfile
from planner.spec.overrides import with_changes
from planner.spec.strategy import Strategy
from tests.search.experts import Case, case

SLACK = 1 + 1e-9
PLAIN: dict[str, Any] = {"schedules": ["1f1b"]}  # one schedule: the others change how stages are filled, no more
SEQ_LEN = 2048
WEAK_SCALING = 1.05  # twice the GPUs with twice the batch: their share of a longer ring, and slower links


@functools.cache
def _case(
    model: str, hardware: str, gpus: int, batch: int, seq_len: int = SEQ_LEN, stack: str = "compiled"
) -> Case:
    return case(model, hardware, gpus, seq_len=seq_len, global_batch=batch, stack=stack)


def _best(given: Case, **wishes: Any) -> Arrangement:
    return given.searched(PLAIN | wishes).best[0].arrangement


def _seconds(given: Case, **wishes: Any) -> float:
    found = given.searched(PLAIN | wishes)
    return found.best[0].seconds if found.best else float("inf")


def _ranks(strategy: Strategy, *axes: str) -> set[int]:
    """Those that differ from rank 0 along these axes only."""
    sizes = {"tp": strategy.tp, "cp": strategy.cp, "dp": strategy.dp, "pp": strategy.pp}
    ranks, stride = {0}, 1
    for axis in strategy.axes:
        if axis in axes:
            ranks = {rank + stride * place for rank in ranks for place in range(sizes[axis])}
        stride *= sizes[axis]
    return ranks


def _expert_ranks(strategy: Strategy) -> set[int]:
    """The first group of ranks that exchange tokens: the innermost of tp, cp and dp."""
    return set(sorted(_ranks(strategy, "tp", "cp", "dp"))[: strategy.ep * strategy.etp])


def _memory(given: Case) -> float:
    return given.profile.device.memory_bytes


# ---- where tensor parallelism ends


@pytest.mark.parametrize(
    ("model", "hardware", "gpus", "batch"),
    [
        ("gpt3-13b", "dgx-a100-80g", 32, 32),
        ("gpt3-13b", "dgx-h100", 32, 4),
        ("gpt3-175b", "dgx-a100-80g", 64, 64),
    ],
)  # fmt: skip
def test_tensor_parallel_stays_on_a_node(model: str, hardware: str, gpus: int, batch: int) -> None:
    given = _case(model, hardware, gpus, batch, stack="megatron")
    strategy = _best(given).strategy
    assert max(_ranks(strategy, "tp")) < given.profile.device.gpus_per_node


def test_memory_alone_drives_tensor_parallel_off_a_node() -> None:
    """Nothing else is left to save memory by: no pipeline, no shards, no sequences to spread."""
    given = _case("gpt3-6.7b", "dgx-h100", 32, 8)
    wishes = {"fix": {"pp": 1, "cp": 1, "zero": 0}, "recompute": ["full"]}
    needed = given.estimated(given.searched(wishes))
    assert needed.strategy.tp <= 8 < 32
    tight = _best(given, **wishes, max_memory_bytes=0.7 * needed.uncertainty.memory_bytes.high).strategy
    assert needed.strategy.tp <= 8 < tight.tp


# ---- slow links


@pytest.mark.parametrize(
    ("model", "hardware"),
    [
        ("gpt3-1.3b", "a100-pcie"), ("gpt3-1.3b", "rtx4090-pcie"),
        ("gpt3-1.3b", "l40s-pcie"), ("gpt3-6.7b", "a100-pcie"), ("gpt3-350m", "rtx3090-pcie"),
    ],
)  # fmt: skip
def test_a_small_model_is_not_cut_over_pcie(model: str, hardware: str) -> None:
    strategy = _best(_case(model, hardware, 8, 64)).strategy
    assert (strategy.tp, strategy.cp) == (1, 1)
    assert strategy.pp * strategy.dp == 8


def test_a_pipeline_beats_tensor_parallel_over_pcie() -> None:
    given = _case("gpt3-6.7b", "a100-pcie", 8, 64)
    pipeline = _seconds(given, fix={"dp": 1, "cp": 1, "tp": 1})
    cut = _seconds(given, fix={"dp": 1, "cp": 1, "pp": 1})
    assert pipeline < cut


# ---- what fits one GPU


@pytest.mark.parametrize(
    ("model", "hardware", "gpus", "batch"),
    [
        ("gpt3-350m", "dgx-a100-80g", 16, 64), ("gpt3-1.3b", "dgx-h100", 8, 64),
        ("gpt3-1.3b", "dgx-a100-80g", 64, 256), ("gpt3-1.3b", "gb200-nvl72", 16, 64),
    ],
)  # fmt: skip
def test_what_fits_one_gpu_is_copied(model: str, hardware: str, gpus: int, batch: int) -> None:
    alone = _case(model, hardware, 1, batch // gpus)
    assert alone.estimated(alone.searched()).fits
    strategy = _best(_case(model, hardware, gpus, batch)).strategy
    assert (strategy.dp, strategy.tp, strategy.pp, strategy.cp) == (gpus, 1, 1, 1)


# ---- experts


@pytest.mark.parametrize("stack", ["compiled", "megatron"])
def test_tokens_go_to_experts_inside_a_node(stack: str) -> None:
    """With memory for any spread of them: nothing but time decides."""
    given = _case("qwen3-30b-a3b", "dgx-h100", 16, 128, 4096, stack).with_memory(1e12)
    fix = {"tp": 1, "cp": 1, "pp": 1, "zero": 1, "recompute": "none"}
    strategy = _best(given, fix=fix).strategy
    assert max(_expert_ranks(strategy)) < given.profile.device.gpus_per_node


@pytest.mark.parametrize("stack", ["compiled", "megatron"])
def test_the_wider_an_exchange_the_slower(stack: str) -> None:
    """Experts spread over one node, two and four."""
    given = _case("qwen3-30b-a3b", "dgx-h100", 32, 128, 4096, stack).with_memory(1e12)
    waits = [
        given.estimated(
            given.searched(
                {"fix": {"tp": 1, "cp": 1, "pp": 1, "zero": 1, "recompute": "none", "ep": ep, "microbatch": 1}}
            )
        ).breakdown.ep_seconds
        for ep in (8, 16, 32)
    ]
    assert waits == sorted(waits)
    assert waits[0] < waits[-1]


def test_the_order_of_ranks_keeps_experts_on_a_node() -> None:
    given = _case("mixtral-8x7b", "dgx-h100", 32, 128, 4096, "megatron")
    strategy = _best(given, fix={"ep": 8, "pp": 2, "tp": 1, "cp": 1, "microbatch": 1, "zero": 1}).strategy
    assert max(_expert_ranks(strategy)) < given.profile.device.gpus_per_node


# ---- what cannot make it slower


def _bandwidths(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every bandwidth of a profile, with its dotted key."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _bandwidths(value, f"{path}{key}.")
        elif key.endswith("bandwidth_gb_per_second"):
            yield path + key, value


def _doubled(profile: HardwareProfile, where: str) -> HardwareProfile:
    changes = {
        key: [2 * item for item in value] if isinstance(value, list) else 2 * value
        for key, value in _bandwidths(profile.to_dict())
        if where in key
    }
    assert changes
    return with_changes(profile, changes)


CASES = [
    ("gpt3-13b", "dgx-a100-80g", 16, "megatron"),
    ("gpt3-1.3b", "a100-pcie", 16, "compiled"),
    ("llama3.1-8b", "dgx-h100", 16, "eager"),
]


@functools.cache
def _clustered(model: str, hardware: str, gpus: int, stack: str) -> tuple[Case, float]:
    """Two sequences for a GPU, and the best step."""
    given = _case(model, hardware, gpus, 2 * gpus, stack=stack)
    return given, _seconds(given)


@pytest.mark.parametrize(("model", "hardware", "gpus", "stack"), CASES)
@pytest.mark.parametrize("where", ["everywhere", "between nodes"])
def test_twice_the_bandwidth_never_worsens(model: str, hardware: str, gpus: int, stack: str, where: str) -> None:
    given, seconds = _clustered(model, hardware, gpus, stack)
    keys = {
        "everywhere": "",
        "between nodes": f"topology.{tuple(given.profile.topology)[-1]}.",
    }
    faster = replace(given, profile=_doubled(given.profile, keys[where]))
    assert _seconds(faster) <= seconds * SLACK


@pytest.mark.parametrize(("model", "hardware", "gpus", "stack"), CASES)
def test_a_constraint_less_never_worsens(model: str, hardware: str, gpus: int, stack: str) -> None:
    given, _ = _clustered(model, hardware, gpus, stack)
    fix: dict[str, Any] = {
        "microbatch": 1, "zero": 1, "order": "tp-cp-dp-pp", "sp": True, "schedule": "1f1b", "vpp": 1, "cp": 1,
        "tp": 4, "pp": 2,
    }  # fmt: skip
    wishes: dict[str, Any] = {"fix": dict(fix), "recompute": ["full"], "max_memory_bytes": 0.8 * _memory(given)}
    before = _seconds(given, **wishes)
    for key in fix:
        del wishes["fix"][key]
        after = _seconds(given, **wishes)
        assert after <= before * SLACK, f"without {key}"
        before = after
    for eased in (
        {"recompute": ["selective", "full"]},
        {"max_memory_bytes": 0},
        {"recompute": ["none", "selective", "full"]},
    ):
        wishes |= eased
        after = _seconds(given, **wishes)
        assert after <= before * SLACK, f"with {eased}"
        before = after


@pytest.mark.parametrize(("model", "hardware", "gpus", "stack"), CASES)
def test_more_memory_never_worsens(model: str, hardware: str, gpus: int, stack: str) -> None:
    given, _ = _clustered(model, hardware, gpus, stack)
    steps = [_seconds(given.with_memory(share * _memory(given))) for share in (0.15, 0.35, 0.6, 1.0, 4.0)]
    for before, after in itertools.pairwise(steps):
        assert after <= before * SLACK
    assert steps[0] > steps[-1], "the least memory does bind"


@pytest.mark.parametrize(
    ("model", "hardware", "stack"),
    [("gpt3-13b", "dgx-a100-80g", "megatron"), ("llama3.1-8b", "dgx-h100", "eager")],
)
def test_twice_the_gpus_with_twice_the_batch_take_hardly_longer(model: str, hardware: str, stack: str) -> None:
    """On nodes joined by a card for each GPU."""
    steps = [_clustered(model, hardware, gpus, stack)[1] for gpus in (8, 16, 32)]
    for before, after in itertools.pairwise(steps):
        assert after <= before * WEAK_SCALING


# ---- what is known to be right


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("model", ["gpt3-175b", "megatron-22b"])
def test_megatrons_pairing_is_in_the_plan(model: str, sp: bool) -> None:
    """Columns then rows in attention and feed-forward, embedding and head cut by vocabulary."""
    given = _case(model, "dgx-a100-80g", 64, 64, stack="megatron")
    best = _best(given, fix={"tp": 8, "pp": 8, "sp": sp, "microbatch": 1, "zero": 0})
    lines = module_lines(given.graph, settled(given.graph, best))
    splits = {path.rpartition(".")[2]: line.split for path, line in lines.items()}
    assert set(splits.values()) >= {"column", "row", "vocab"}
    named = {path: line.split for path, line in lines.items()}
    assert _split(named, "query") == _split(named, "up") == "column", named
    assert _split(named, "out") == _split(named, "down") == "row", named
    assert _split(named, "tokens") == "vocab", named


def _split(lines: Mapping[str, str], name: str) -> str:
    found = {split for path, split in lines.items() if name in path.rpartition(".")[2]}
    assert len(found) == 1, (name, lines)
    return found.pop()
