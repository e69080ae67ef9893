"""Megatron's two tables: what a row without a word about it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.spec.hardware_sources import load_hardware
from planner.spec.runs import Run, read_runs
from tests.spec.test_runs import write

TIMING = {
    "n_gpus": "16", "global_batch": "64", "micro_batch": "2", "hidden_size": "2048", "attention_heads": "16",
    "n_layers": "24", "sequence_length": "1024", "tensor_parallelism": "2", "data_parallelism": "4",
    "pipeline_parallelism": "2", "iteration_time_ms": "812.5",
}  # fmt: skip
CASE = {
    "family": "gpt", "case": "gpt3_mcore_te_tp2_pp2", "env": "dev", "platform": "dgx_h100", "layers": "12",
    "hidden": "512", "heads": "8", "kv_groups": "", "ffn": "", "swiglu": "", "vocab_arg": "", "seq_len": "1024",
    "micro_batch": "4", "global_batch": "32", "tp": "2", "pp": "2", "layers_per_vstage": "", "cp": "1", "ep": "1",
    "etp": "", "sp": "False", "dist_optimizer": "False", "zero_strategy": "", "experts": "", "topk": "",
    "moe_ffn": "", "recompute": "none", "bf16": "True", "fp16": "False", "fp8": "", "attention_backend": "",
    "untied": "False", "mem_max_allocated_bytes": "1000000000",
}  # fmt: skip


def case(path: Path, **cells: str) -> Run:
    """The run of a table of one case."""
    (run,) = read_runs(write(path / "memory.csv", CASE | cells)).runs
    return run


def test_timings(tmp_path: Path) -> None:
    (run,) = read_runs(write(tmp_path / "timings.csv", TIMING)).runs
    assert run.judged, run.excluded
    assert (run.source, run.step_seconds, run.gpus) == ("timings", 0.8125, 16)
    assert (run.model["vocab"], run.model["attention"], run.model["ffn"]) == (51200, "unfused", 8192)
    assert run.workload == {"seq_len": 1024, "global_batch": 64, "precision": "fp16", "stack": "megatron"}
    assert (run.strategy["recompute"], run.strategy.get("sp", False)) == ("full", False)
    outer = list(load_hardware(run.hardware).topology.values())[-1]
    assert outer.bandwidth_gb_per_second == 12.5, "800 Gb/s of a node, shared by its eight GPUs"


def test_memory_is_what_was_allocated_on_eight_gpus(tmp_path: Path) -> None:
    run = case(tmp_path)
    assert run.judged, run.excluded
    assert run.memory is not None
    assert (run.memory.bytes, run.memory.counts, run.step_seconds) == (1e9, "allocated", None)
    assert (run.gpus, run.strategy["dp"]) == (8, 2)
    assert (run.model["ffn"], run.model["vocab"], run.model["dropout"]) == (2048, 50432, 0.1)
    assert run.source == "megatron-memory-gpt"


def test_one_host_of_gb200_has_four_gpus(tmp_path: Path) -> None:
    run = case(tmp_path, case="gpt3_mcore_te_tp2_pp2_1node", platform="dgx_gb200")
    assert (run.gpus, run.strategy["dp"], run.hardware) == (4, 1, "gb200-nvl72")
    assert case(tmp_path, case="gpt3_mcore_te_tp2_pp2_1node").gpus == 8, "a host of H100 has eight"


@pytest.mark.parametrize(
    ("cells", "key", "value"),
    [
        ({"swiglu": "True"}, "ffn", 1344),
        ({"ffn": "3000"}, "ffn", 3000),
        ({"vocab_arg": "131073"}, "vocab", 131328),
        ({"family": "bert"}, "vocab", 30720),
        ({"untied": "True"}, "tied_embeddings", False),
        ({"kv_groups": "2.0"}, "kv_heads", 2),
        ({"case": "gpt3_mcore_te_rope_embeddings"}, "positions", "rope"),
        ({}, "attention", "flash"),
        ({"case": "gpt3_mcore_tp2_pp2"}, "attention", "unfused"),
        ({"attention_backend": "local"}, "attention", "unfused"),
        ({"platform": "dgxa100_dracooci"}, "attention", "unfused"),
        ({"platform": "dgxa100_dracooci", "attention_backend": "flash"}, "attention", "flash"),
        ({"experts": "8", "topk": "2"}, "moe", {"experts": 8, "top_k": 2, "expert_ffn": 2048}),
    ],
)
def test_models(cells: dict[str, str], key: str, value: Any, tmp_path: Path) -> None:
    assert case(tmp_path, **cells).model[key] == value


@pytest.mark.parametrize(
    ("cells", "key", "value"),
    [
        ({"dist_optimizer": "True"}, "zero", 1),
        ({"zero_strategy": "optim_grads_params"}, "zero", 3),
        ({"layers_per_vstage": "1.0"}, "vpp", 6),
        ({"experts": "8", "topk": "2"}, "etp", 2),
        ({"etp": "4"}, "etp", 1),
        ({"fp16": "True", "bf16": "False"}, "grad_dtype", "fp16"),
        ({"recompute": "full"}, "recompute", "full"),
        (
            {"case": "gpt3_mcore_te_tp2_pp2_multi_dist_optimizer_instances", "dist_optimizer": "True"},
            "dp_replicate",
            2,
        ),
    ],
)
def test_strategies(cells: dict[str, str], key: str, value: Any, tmp_path: Path) -> None:
    run = case(tmp_path, **cells)
    assert run.judged, run.excluded
    assert run.strategy[key] == value


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"case": "gpt_grpo_tp1"}, "reinforcement learning: not a training step alone"),
        ({"case": "gpt3_mcore_te_attn_cudagraph"}, "CUDA graphs keep memory of their own"),
        ({"case": "gpt3_mcore_te_fine_grained_offloading"}, "offloading is not modelled"),
        ({"case": "gpt3_mcore_te_tp2_pp2_mla"}, "latent attention whose sizes are not given"),
        ({"family": "hybrid"}, "the architecture hybrid is not expressible"),
        ({"platform": "dgx_tpu"}, "the platform dgx_tpu is not known"),
        ({"layers": ""}, "layers is not given"),
        ({"tp": "4", "pp": "4"}, "tp·pp·cp = 16 does not divide the 8 GPUs of the case"),
        ({"mem_max_allocated_bytes": ""}, "neither a step time nor memory is given"),
    ],
)
def test_what_is_left_out(cells: dict[str, str], reason: str, tmp_path: Path) -> None:
    assert case(tmp_path, **cells).excluded == reason
