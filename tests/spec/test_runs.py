"""Tables of runs: the few columns that suffice, what is filled in, what is left out, what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.errors import PlannerError
from planner.spec.runs import Run, read_runs

SHORT = {
    "model": "llama3.1-8b", "gpu": "H100-SXM", "gpus": "16", "seq_len": "8192", "micro_batch": "1",
    "global_batch": "32", "derived_step_time_s": "2.5",
}  # fmt: skip
SHAPE = {"layers": "24", "hidden": "2048", "heads": "16", "model": "ours"}


def write(path: Path, *rows: dict[str, str]) -> Path:
    """A table with the columns of all rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(columns)]
    lines += [",".join(f'"{row.get(column, "")}"' for column in columns) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path, **cells: str) -> Run:
    """The run of a table of one row."""
    (run,) = read_runs(write(path / "runs.csv", SHORT | cells)).runs
    return run


def test_a_short_table_suffices(tmp_path: Path) -> None:
    run = read(tmp_path)
    assert run.judged, run.excluded
    assert (run.hardware, run.gpus, run.step_seconds) == ("dgx-h100", 16, 2.5)
    assert run.workload == {"seq_len": 8192, "global_batch": 32, "precision": "bf16", "stack": "eager",
                            "loss_in_place": False}  # fmt: skip
    assert run.strategy["dp"] == 16
    assert (run.model["ffn"], run.model["vocab"], run.model["norm"]) == (14336, 128256, "rmsnorm")
    assert run.where.endswith("runs.csv:2")


def test_a_shape_without_a_known_name_is_a_gpt_or_with_a_gate_a_llama(tmp_path: Path) -> None:
    gpt = read(tmp_path, **SHAPE)
    assert (gpt.model["ffn"], gpt.model["vocab"], gpt.model.get("tied_embeddings")) == (8192, 51200, True)
    assert gpt.model["max_positions"] == 8192, "learned positions reach as far as the run"
    llama = read(tmp_path, **SHAPE, ffn_type="swiglu", ffn="5632", kv_heads="4")
    assert (llama.model["norm"], llama.model["positions"], llama.model["kv_heads"]) == ("rmsnorm", "rope", 4)
    experts = read(tmp_path, **SHAPE, experts="8", topk="2", moe_ffn="4096", ep="4")
    assert experts.judged, experts.excluded
    assert experts.model["moe"] == {"experts": 8, "top_k": 2, "expert_ffn": 4096}


@pytest.mark.parametrize(
    ("name", "layers", "key", "value"),
    [
        ("Qwen3-30B-A3B", "48", "head_dim", 128),
        ("GPT-OSS-120B", "36", "head_dim", 64),
        ("Llama3.1-405B-proxy-21L", "21", "layers", 21),
        ("Nemotron-4-15B", "32", "ffn_kind", "relu2"),
        ("Llama3-70B-SFT", "80", "kv_heads", 8),
    ],
)
def test_a_bundled_spec_tells_what_the_columns_do_not(
    name: str, layers: str, key: str, value: Any, tmp_path: Path
) -> None:
    run = read(tmp_path, model=name, layers=layers, ffn_type="gelu" if "Nemotron" in name else "swiglu")
    assert run.model[key] == value
    assert run.model["name"] == name


def test_columns_win_over_the_bundled_spec_and_another_shape_is_another_model(tmp_path: Path) -> None:
    assert read(tmp_path, model="GPT3-175B", vocab="51200").model["vocab"] == 51200
    wide = read(tmp_path, model="llama3.1-8b", layers="32", hidden="8192", heads="64")
    assert wide.model["ffn"] == 4 * 8192, "not Llama's"
    cut = read(tmp_path, model="llama3.1-8b", layers="16")
    assert cut.excluded == "hidden of the model are not given, and no bundled spec is llama3.1-8b"


def test_latent_attention_and_first_dense_layers_come_from_the_bundled_spec(tmp_path: Path) -> None:
    run = read(tmp_path, model="DeepSeek-V3", layers="61", hidden="7168", heads="128", experts="256", topk="8",
               moe_ffn="2048", gpus="128", gpu="GB200", ep="64", global_batch="128")  # fmt: skip
    assert run.judged, run.excluded
    assert run.model["mla"]["kv_rank"] == 512
    assert run.model["moe"]["first_dense_layers"] == 3
    assert run.model["moe"]["shared_experts"] == 1
    cut = read(tmp_path, model="DeepSeek-V3-2L", layers="2", hidden="7168", heads="128")
    assert cut.model["moe"]["first_dense_layers"] == 2


def test_empty_cells_of_nvidia_recipes_mean_what_the_recipes_set(tmp_path: Path) -> None:
    cells = {"family": "nvidia-dgxc", "tp": "4", "pp": "2", "model": "Llama3-70B", "layers": "80"}
    run = read(tmp_path, **cells)
    assert run.workload["stack"] == "megatron"
    picked = {key: run.strategy[key] for key in ("sp", "zero", "vpp", "recompute", "grad_dtype")}
    assert picked == {"sp": True, "zero": 1, "vpp": 40, "recompute": "none", "grad_dtype": "fp32"}
    assert run.strategy["overlap"] == {"dp": True, "tp": True, "pp": True, "ep": False}
    assert run.assumed == ("vpp", "sp", "zero", "recompute")
    hinted = read(tmp_path, **cells, config_hint="recompute selective, bf16 grad sync, tp comm overlap false")
    assert (hinted.strategy["recompute"], hinted.strategy["grad_dtype"]) == ("selective", "bf16")
    assert not hinted.strategy["overlap"]["tp"]
    for recipe, assumed in (("same layout and batch", False), ("DIFFERENT layout (pp 8)", True)):
        run = read(tmp_path, **cells, config_hint=f"{recipe}; recompute: rg=selective rmod=[layernorm]")
        assert (run.strategy["recompute"], "recompute" in run.assumed) == ("none", assumed)
    assert read(tmp_path, **cells, vpp="5").strategy["vpp"] == 5
    assert read(tmp_path, **cells, notes="VP printed NA").strategy["vpp"] == 40


def test_empty_cells_of_others_are_neutral(tmp_path: Path) -> None:
    run = read(tmp_path, tp="4", pp="2", model="Llama3-70B", notes="torch.compile")
    assert run.workload["stack"] == "compiled"
    picked = {key: run.strategy[key] for key in ("sp", "zero", "vpp", "recompute")}
    assert picked == {"sp": False, "zero": 0, "vpp": 1, "recompute": "none"}


@pytest.mark.parametrize(
    ("text", "zero", "copies"),
    [
        ("ZeRO-1", 1, 1), ("ZeRO-2 (DeepSpeed)", 2, 1), ("FSDP2 (ZeRO-3)", 3, 1), ("FSDP (group 4)", 3, 4),
        ("FSDP FULL_SHARD", 3, 1), ("FSDP SHARD_GRAD_OP", 2, 1), ("none (no zero_optimization)", 0, 1),
        ("DDP (FSDP=0; Megatron distributed optimizer, ZeRO-1-like, not stated)", 1, 1), ("DDP", 0, 1),
        ("distributed optimizer", 1, 1), ("", 0, 1),
    ],
)  # fmt: skip
def test_sharding_as_people_write_it(text: str, zero: int, copies: int, tmp_path: Path) -> None:
    strategy = read(tmp_path, zero_stage_or_fsdp=text).strategy
    assert (strategy["zero"], strategy["dp_replicate"]) == (zero, copies)


@pytest.mark.parametrize(
    ("precision", "gpu", "notes", "expected"),
    [
        ("fp8", "H100-SXM", "FP8-CS", "fp8"), ("fp8", "GB200", "MXFP8; container 26.02", "mxfp8"),
        ("fp4", "GB300", "", "nvfp4"), ("bfloat16", "H100", "", "bf16"), ("", "H100", "", "bf16"),
        ("fp8", "GB200", '""other quantization granularity: 32x32 i.e. MXFP8""', "mxfp8"),
        ("fp8", "H100-SXM", '""other quantization granularity: 32x32 i.e. MXFP8""', "fp8_block"),
    ],
)  # fmt: skip
def test_fp8_and_fp4_stand_for_several_scalings(
    precision: str, gpu: str, notes: str, expected: str, tmp_path: Path
) -> None:
    assert read(tmp_path, precision=precision, gpu=gpu, notes=notes).workload["precision"] == expected


def test_memory_says_what_it_counts(tmp_path: Path) -> None:
    def memory(**cells: str) -> tuple[float, str]:
        found = read(tmp_path, mem_gb_per_gpu="10", **cells).memory
        assert found is not None
        return found.bytes, found.counts

    assert memory() == (10e9, "device")
    assert memory(notes="memory = max_memory_allocated/1e9") == (10e9, "allocated")
    assert memory(notes="memory GiB (reserved)") == (10 * 1024**3, "reserved")
    assert memory(memory_counts="allocated") == (10e9, "allocated")
    with pytest.raises(PlannerError, match="one of allocated, reserved, device"):
        memory(memory_counts="virtual")


def test_old_software_has_unfused_attention_and_dropout(tmp_path: Path) -> None:
    run = read(tmp_path, **SHAPE, source="bigscience-workshop/bigscience", precision="fp16", recompute="full")
    assert (run.model["attention"], run.model["dropout"], run.strategy["grad_dtype"]) == ("unfused", 0.1, "fp16")
    assert run.strategy["overlap"]["dp"] is False
    accumulated = read(tmp_path, **SHAPE, source="bigscience-workshop/bigscience", precision="bf16")
    assert accumulated.strategy["grad_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("cells", "software", "stack"),
    [
        ({"source": "NVIDIA/Megatron-LM README"}, "Megatron as NVIDIA runs it", "megatron"),
        ({"source": "somebody", "notes": "Megatron-LM on our own cluster"}, "Megatron-LM", "megatron"),
        ({"source": "NVIDIA", "notes": "arXiv 2104.04473"}, "Megatron-LM before flash attention", "megatron"),
        (
            {"notes": "Megatron-LM", "gpu": "V100-SXM2-32GB", "seq_len": "1024"},
            "Megatron-LM before flash attention",
            "megatron",
        ),
        ({"source": "NVIDIA", "notes": "MaxText/XLA"}, "XLA", "compiled"),
        ({"source": "mosaicml/llm-foundry", "notes": "on NVIDIA H100"}, "torch", "eager"),
        ({"source": "pytorch/torchtitan", "notes": "FSDP+compile"}, "torch", "compiled"),
        ({"source": "pytorch/torchtitan", "notes": "without compile"}, "torch", "eager"),
    ],
)
def test_the_software_is_told_from_words(cells: dict[str, str], software: str, stack: str, tmp_path: Path) -> None:
    run = read(tmp_path, **cells)
    assert (run.software, run.workload["stack"]) == (software, stack)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"gpu": "TPU v4"}, "no profile for the GPU TPU v4"),
        ({"gpu": "A100"}, "no profile for the GPU A100"),
        ({"gpu": "B200 (power limited)"}, "no profile for the GPU B200 (power limited)"),
        ({"micro_batch": ""}, "micro_batch is not given"),
        ({"derived_step_time_s": ""}, "neither a step time nor memory is given"),
        ({"trust": "D"}, "trust D: unusable"),
        ({"tp": "", "pp": ""}, "the layout is not given"),
        ({"tp": "3"}, "tp·pp·cp = 3 does not divide the 16 GPUs"),
        ({"dp": "4"}, "tp·pp·cp·dp = 16 GPUs (gpus: 4)"),
        ({"micro_batch": "3"}, "dp·microbatch = 48 divides the global batch (global_batch: 32)"),
        ({"notes": "LoRA run"}, "LoRA: only full training is estimated"),
        ({"recompute": "sometimes"}, "recompute 'sometimes' is not understood"),
        ({"zero_stage_or_fsdp": "sharded"}, "zero_stage_or_fsdp 'sharded' is not understood"),
        ({"precision": "posit8"}, "precision 'posit8' is not understood"),
        ({"model": "Nemotron-H-56B"}, "layers of the model are not given, and no bundled spec is Nemotron-H-56B"),
        ({"ep": "2"}, "ep needs a model with experts (ep: 2)"),
    ],
)
def test_what_cannot_be_judged_is_kept_with_its_reason(cells: dict[str, str], reason: str, tmp_path: Path) -> None:
    run = read(tmp_path, **cells)
    assert not run.judged
    assert run.excluded == reason


def test_a_wrong_cell_names_its_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", SHORT, SHORT | {"gpus": "many"})
    with pytest.raises(PlannerError) as caught:
        read_runs(path)
    assert (caught.value.where, caught.value.key, caught.value.value) == (f"{path}:3", "gpus", "many")
    for cells in ({"trust": "E"}, {"sp": "maybe"}, {"tp": "2.5"}, {"derived_step_time_s": "-1"}, {"pp": "inf"}):
        with pytest.raises(PlannerError) as caught:
            read(tmp_path, **cells)
        assert caught.value.key == next(iter(cells))
        assert caught.value.where.endswith(":2")


def test_a_torn_table_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", SHORT, SHORT)
    text = path.read_text()
    path.write_text(text[:-20])
    with pytest.raises(PlannerError) as caught:
        read_runs(path)
    assert caught.value.where == f"{path}:3"
    path.write_text(text.splitlines()[0] + "\na,b\n")
    with pytest.raises(PlannerError, match="a cell for each of the 7 columns"):
        read_runs(path)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "a header and a row"),
        ("gpu,gpus\n", "a header and a row"),
        ("gpu,gpus\nH100,8\n", "has the column seq_len"),
        ("gpu,gpu\nH100,8\n", "a name of its own"),
        ('gpu,gpus\n"H100,8\n', "not sound CSV"),
        ("case,mem_max_allocated_bytes\na,1\n", "has the column platform"),
        ("n_gpus,iteration_time_ms\n8,1\n", "has the column global_batch"),
    ],
)
def test_what_is_no_table_of_runs(text: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(PlannerError, match=rule):
        read_runs(path)


def test_a_missing_file_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="cannot be read"):
        read_runs(tmp_path / "none.csv")
    with pytest.raises(PlannerError, match="a table of runs is given"):
        read_runs([])


def test_blank_lines_and_text_over_several_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    header = ",".join([*SHORT, "notes"])
    path.write_text(f'\ufeff{header}\n\n{",".join(SHORT.values())},"two\nlines"\n')
    (run,) = read_runs([path]).runs
    assert (run.notes, run.where) == ("two\nlines", f"{path}:3")


EMPTY = (
    "id", "family", "source", "kv_heads", "head_dim", "ffn", "ffn_type", "vocab", "experts", "topk", "moe_ffn",
    "gpu_mem_gb", "gpus_per_node", "inter_link", "precision", "sp", "pp", "vpp", "cp", "ep", "etp", "dp",
    "zero_stage_or_fsdp", "recompute", "mem_gb_per_gpu", "memory_counts", "trust", "notes", "config_hint", "stack",
)  # fmt: skip
WHOLE = SHORT | SHAPE | {"tp": "2"} | dict.fromkeys(EMPTY, "")
ODD = (
    "0", "-1", "1e400", "nan", "8.5", "1e300", "9" * 5000, "text", "", "a,b", "½", "0x10", "\x00", "∞",
    "4x . Gb/s", "99999x 1 Gb/s", "0 Gb/s", f"FSDP (group {'9' * 5000})", f"ETP {'9' * 5000}", "MoE, ETP 0",
)  # fmt: skip


@pytest.mark.parametrize("column", WHOLE)
def test_no_cell_brings_the_reader_down(column: str, tmp_path: Path) -> None:
    assert read_runs(write(tmp_path / "whole.csv", WHOLE)).judged
    for cell in ODD:
        path = write(tmp_path / "runs.csv", WHOLE | {column: cell})
        try:
            (run,) = read_runs(path).runs
        except PlannerError as error:
            assert error.remedy  # noqa: PT017
        else:
            assert run.judged or run.excluded
