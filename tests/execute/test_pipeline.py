"""Pipelines by every schedule: loss, every gradient and a step of AdamW are those of one process, in fp64."""

from __future__ import annotations

from typing import Any

import pytest

from tests.execute.test_runner import check

# model, ranks, and keys of the strategy; `layers` by virtual stage, `sequences` of the step, `blocks` as in a plan
TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "gpipe": ("llama", {"schedule": "gpipe", "layers": (3, 1)}),
    "1f1b": ("opt", {"layers": (1, 3)}),
    "interleaved": ("qwen3", {"vpp": 2, "layers": (2, 1, 0, 1)}),
    "zb": ("llama", {"vpp": 2, "schedule": "zb"}),
    "zbv": ("qwen3", {"vpp": 2, "schedule": "zbv", "layers": (1, 1, 2, 0)}),
    "tied, in a V": ("gpt", {"vpp": 2, "schedule": "zbv", "layers": (0, 1, 2, 1)}),
    "tied, zb": ("gemma2", {"vpp": 2, "schedule": "zb"}),
    "latent attention, zb": ("deepseek", {"vpp": 2, "schedule": "zb"}),
    "rounds, run again": ("llama", {"vpp": 2, "schedule": "interleaved", "recompute": "full"}),
    "recompute of some blocks": ("gpt", {"vpp": 2, "blocks": {"blocks.1": "full", "blocks.2-3": "selective"}}),
}

FOUR: dict[str, tuple[str, dict[str, Any]]] = {
    "four stages, two of them empty": ("gpt", {"pp": 4, "layers": (2, 0, 0, 2)}),
    "four stages, interleaved": ("gemma2", {"pp": 4, "vpp": 2, "model": {"layers": 6}}),
    "four stages in a V": (
        "llama",
        {"pp": 4, "vpp": 2, "schedule": "zbv", "sequences": 7, "model": {"layers": 6}},
    ),
    "tensors, zb": ("llama", {"pp": 2, "tp": 2, "sp": True, "vpp": 2, "schedule": "zb"}),
    "tensors, tied, selective": ("gpt", {"pp": 2, "tp": 2, "sp": True, "recompute": "selective"}),
    "replicated": ("opt", {"pp": 2, "zero": 0}),
    "sharded optimizer": ("gpt", {"pp": 2, "zero": 1}),
    "sharded weights in a V": ("llama", {"pp": 2, "zero": 3, "vpp": 2, "schedule": "zbv"}),
    "context": ("gpt", {"pp": 2, "cp": 2, "zero": 1, "layers": (1, 3)}),
    "experts, zb": ("mixtral", {"pp": 2, "ep": 2, "zero": 1, "vpp": 2, "schedule": "zb"}),
    "latent attention and experts": ("deepseek", {"pp": 2, "tp": 2, "ep": 2, "sp": True, "layers": (1, 3)}),
    "fewer kv heads than ranks": ("qwen3", {"pp": 1, "tp": 4, "sp": True}),
    "experts over all": ("mixtral", {"tp": 2, "ep": 4, "zero": 1}),
    "copies of shards": ("llama", {"zero": 3, "dp_replicate": 2}),
}

EIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "tensors, stages, shards, recompute": (
        "gemma2", {"pp": 2, "tp": 2, "sp": True, "zero": 3, "recompute": "full", "layers": (3, 1)},
    ),
    "experts, stages, copies of shards": (
        "mixtral", {"pp": 2, "ep": 2, "zero": 3, "dp_replicate": 2, "vpp": 2, "sequences": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TWO)
def test_two_stages(case: str) -> None:
    model, keys = TWO[case]
    check(model, 2, pp=2, **keys)


@pytest.mark.parametrize("case", FOUR)
def test_four_ranks(case: str) -> None:
    model, keys = FOUR[case]
    check(model, 4, **{"sequences": 8} | keys)


@pytest.mark.parametrize("case", EIGHT)
def test_eight_ranks(case: str) -> None:
    model, keys = EIGHT[case]
    check(model, 8, **{"sequences": 8} | keys)
