"""Two tables of Megatron-LM runs, each known by a column of its own.

Timings (`iteration_time_ms`): GPTs on A100 nodes of eight with 800 Gb/s between nodes; fp16, attention written
out, dropout, full recompute, 1F1B, no sequence parallel, a vocabulary of 51,200.

Memory (`mem_max_allocated_bytes`): peak bytes allocated by Megatron's own functional tests, with their arguments.
They run on eight GPUs, or on the four of one GB200 host where the case ends in `_1node`. Left-out arguments have
Megatron's defaults: a feed-forward of 4·hidden (two thirds of it with a gate), dropout .1, learned positions, tied
embeddings, experts split over tp; and the vocabulary of their tokenizer, padded to a multiple of 128·tp: GPT-2's,
and for BERT its own in lower case. (The bytes left between steps are less than the states of BERT with GPT-2's.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from planner.spec.runs import MeasuredMemory, Run
from planner.spec.runs_checks import checked
from planner.spec.runs_csv import Record, Table
from planner.spec.runs_hardware import hardware_of

_TIMINGS = ("n_gpus", "global_batch", "micro_batch", "hidden_size", "attention_heads", "n_layers",
            "sequence_length", "tensor_parallelism", "data_parallelism", "pipeline_parallelism")  # fmt: skip
_MEMORY = ("case", "platform", "family", "layers", "hidden", "heads", "seq_len", "micro_batch", "global_batch",
           "tp", "pp", "cp", "ep", "sp", "recompute")  # fmt: skip
_DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
_NETWORK = "8x 100 Gb/s per node"
_GPT2_VOCAB = 50_257
_BERT_VOCAB = 30_522
_SOFTWARE = "Megatron-LM"

_PLATFORMS = (("gb200", "GB200"), ("h100", "H100-SXM"), ("a100", "A100-SXM-80GB"))
_KINDS = {"gpt": "decoder", "moe": "decoder", "bert": "encoder", "t5": "encoder_decoder"}
_NOT_OURS = (  # in the name of a case: why it is not judged
    (r"_grpo_", "reinforcement learning: not a training step alone"),
    (r"cudagraph", "CUDA graphs keep memory of their own"),
    (r"offload", "offloading is not modelled"),
    (r"_muon", "the Muon optimizer is not modelled"),
    (r"_mla(_|$)", "latent attention whose sizes are not given"),
)


def read_timings(table: Table) -> list[Run]:
    """The runs of a table of timings; the file's name is their source."""
    table.require(_TIMINGS)
    source = Path(table.name).stem
    return [checked(_timing(record, source, number)) for number, record in enumerate(table.records, start=1)]


def _timing(record: Record, source: str, number: int) -> Run:
    seq_len, milliseconds = record.whole("sequence_length"), record.number("iteration_time_ms")
    return Run(
        id=f"{source} {number}",
        source=source,
        where=record.where,
        gpus=record.whole("n_gpus"),
        hardware=hardware_of("A100-SXM-80GB", gpus=record.whole("n_gpus"), link=_NETWORK),
        model={
            "name": f"GPT {record.whole('hidden_size')}x{record.whole('n_layers')}",
            "layers": record.whole("n_layers"), "hidden": record.whole("hidden_size"),
            "heads": record.whole("attention_heads"), "ffn": 4 * record.whole("hidden_size"), "vocab": 51_200,
            "max_positions": seq_len, "tied_embeddings": True, "attention": "unfused", **_DROPOUT,
        },
        workload={"seq_len": seq_len, "global_batch": record.whole("global_batch"), "precision": "fp16",
                  "stack": "megatron"},
        strategy={
            "tp": record.whole("tensor_parallelism"), "pp": record.whole("pipeline_parallelism"),
            "dp": record.whole("data_parallelism"), "microbatch": record.whole("micro_batch"),
            "recompute": "full", "grad_dtype": "fp16", "overlap": {"dp": False},
        },
        step_seconds=milliseconds / 1e3 if milliseconds else None,
        trust="A",
        software=f"{_SOFTWARE} before flash attention",
    )  # fmt: skip


_LONG = 4096  # tokens


def read_memory(table: Table) -> list[Run]:
    """The runs of a table of peak bytes."""
    table.require(_MEMORY)
    return [checked(_case(record)) for record in table.records]


def _case(record: Record) -> Run:
    case, platform = record.text("case"), record.text("platform")
    peak = record.number("mem_max_allocated_bytes")
    known: dict[str, Any] = {
        "id": f"{case} {platform} {record.text('env')}".strip(),
        "source": f"megatron-memory-{record.text('family')}",
        "where": record.where,
        "memory": MeasuredMemory(bytes=peak, counts="allocated", rank="last") if peak else None,
        "trust": "A",
        "software": _SOFTWARE,
    }
    reason = _why_not(record, case, platform)
    if reason:
        return Run(**known, excluded=reason)
    gpu = next(gpu for word, gpu in _PLATFORMS if word in platform)
    gpus = 4 if case.endswith("_1node") and gpu == "GB200" else 8
    tp, pp, cp = map(record.degree, ("tp", "pp", "cp"))
    if gpus % (tp * pp * cp):
        return Run(**known, excluded=f"tp·pp·cp = {tp * pp * cp} does not divide the {gpus} GPUs of the case")
    return Run(
        **known,
        gpus=gpus,
        hardware=hardware_of(gpu, gpus=gpus),
        model=_model(record, case, platform),
        workload={
            "seq_len": record.whole("seq_len"), "global_batch": record.whole("global_batch"),
            "precision": _precision(record), "stack": "megatron",
        },
        strategy=_strategy(record, case, gpus // (tp * pp * cp)),
    )  # fmt: skip


def _why_not(record: Record, case: str, platform: str) -> str:
    for pattern, reason in _NOT_OURS:
        if re.search(pattern, case):
            return reason
    if record.text("family") not in _KINDS:
        return f"the architecture {record.text('family')} is not expressible"
    if not any(word in platform for word, _ in _PLATFORMS):
        return f"the platform {platform} is not known"
    for column in ("layers", "hidden", "heads", "seq_len", "micro_batch", "global_batch"):
        if not record.whole(column):
            return f"{column} is not given"
    return ""


def _model(record: Record, case: str, platform: str) -> dict[str, Any]:
    hidden, gated, tp = record.whole("hidden"), bool(record.flag("swiglu")), record.degree("tp")
    ffn = record.whole("ffn", hidden * 8 // 3 // 64 * 64 if gated else 4 * hidden)
    multiple = 128 * tp
    tokens = _BERT_VOCAB if record.text("family") == "bert" else _GPT2_VOCAB
    model: dict[str, Any] = {
        "name": f"{record.text('family')} {hidden}x{record.whole('layers')}",  # one name for one shape
        "kind": _KINDS[record.text("family")],
        "layers": record.whole("layers"),
        "hidden": hidden,
        "heads": record.whole("heads"),
        "kv_heads": record.whole("kv_groups", record.whole("heads")),
        "ffn": ffn,
        "ffn_kind": "swiglu" if gated else "gelu",
        "vocab": -(-record.whole("vocab_arg", tokens) // multiple) * multiple,
        "positions": "rope" if "rope" in case else "learned",
        "max_positions": record.whole("seq_len"),
        "tied_embeddings": not record.flag("untied"),
        "bias": "disable_bias_linear" not in case,
        "attention": "unfused" if _unfused(record, case, platform) else "flash",
        **_DROPOUT,
    }
    if model["kind"] == "encoder":
        model |= {"norm_position": "pre", "token_types": 2, "head": "mlm"}
    if record.whole("experts") > 1:
        model["moe"] = {
            "experts": record.whole("experts"), "top_k": record.whole("topk", 2),
            "expert_ffn": record.whole("moe_ffn", ffn),
        }  # fmt: skip
    return model


def _unfused(record: Record, case: str, platform: str) -> bool:
    """Where no argument says so: without Transformer Engine, and on the platforms that lack its fused kernels.

    Not with long sequences, whose scores would not fit.
    """
    stated = record.text("attention_backend")
    if stated or record.whole("seq_len") >= _LONG:
        return stated in ("unfused", "local")
    return "_te_" not in case or "dracooci" in platform


def _precision(record: Record) -> str:
    return next((word for word in ("fp8", "fp16", "bf16") if record.text(word) not in ("", "False")), "fp32")


def _strategy(record: Record, case: str, dp: int) -> dict[str, Any]:
    tp, pp = record.degree("tp"), record.degree("pp")
    per_stage = record.whole("layers_per_vstage")
    sharded = record.text("zero_strategy") == "optim_grads_params"
    fp16, experts = _precision(record) == "fp16", record.whole("experts") > 1
    return {
        "tp": tp,
        "pp": pp,
        "cp": record.degree("cp"),
        "ep": record.degree("ep"),
        "etp": record.whole("etp", tp) if experts else 1,
        "dp": dp,
        "vpp": max(1, record.whole("layers") // pp // per_stage) if per_stage and pp > 1 else 1,
        "microbatch": record.whole("micro_batch"),
        "zero": 3 if sharded else 1 if record.flag("dist_optimizer") else 0,
        "dp_replicate": 2 if "multi_dist_optimizer_instances" in case and dp % 2 == 0 else 1,
        "sp": bool(record.flag("sp")),
        "recompute": record.text("recompute", "none"),
        "grad_dtype": "fp16" if fp16 else "fp32",
        "overlap": {"dp": "overlap_grad_reduce" in case},
    }
