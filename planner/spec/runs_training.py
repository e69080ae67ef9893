"""Tables of training runs, a row each; `runs.py` lists the columns.

What an empty cell means depends on the software, which the words of the row tell (`runs_software.py`). In general
it is the neutral value. The recipes of NVIDIA's NeMo and Megatron Bridge leave out what they always set: sequence
parallel with tp above 1, the optimizer sharded over dp, gradients in fp32 unless the hint says bf16, as many
virtual stages as layers in a dense model's pipeline, tensor-parallel communication overlapped, and no recompute
unless the hint says so. Keys filled in like that are listed in `Run.assumed`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from planner.spec.runs import Counts, MeasuredMemory, Run, Trust
from planner.spec.runs_checks import checked
from planner.spec.runs_csv import Record, Table, words
from planner.spec.runs_hardware import UnknownGpuError, hardware_of
from planner.spec.runs_models import UnknownModelError, model_of
from planner.spec.runs_software import Software, software_of
from planner.units import GB, GIB

_NEEDED = ("gpu", "gpus", "seq_len", "micro_batch", "global_batch", "model|hidden",
           "derived_step_time_s|step_seconds|mem_gb_per_gpu")  # fmt: skip
_SPLIT_BY_EXPERTS = ("nvidia-nemo-bridge",)  # sources whose dense and expert models are told apart
_TRUST: tuple[Trust, ...] = ("A", "B", "C", "D")
_COUNTS: tuple[Counts, ...] = ("allocated", "reserved", "device")
_SPELLED_OUT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8": "fp8"}
_PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "fp8_block", "mxfp8", "nvfp4", "mxfp4")

# words of the model's name and the notes: why a row is not judged
_NOT_OURS = (
    (r"excluded from scoring", "the table itself excludes it"),
    (r"\blora run\b|\blora\b", "LoRA: only full training is estimated"),
    (r"do not use for calibration", "the table itself warns of it"),
    (r"row-?wise", "fp8 with a scale for each row, which is no precision of ours"),
)


class NotJudgedError(Exception):
    """A row that cannot be expressed; says why."""


def read_training(table: Table) -> list[Run]:
    """The runs of a table."""
    table.require(_NEEDED)
    return [checked(_run(record, number)) for number, record in enumerate(table.records, start=1)]


def _run(record: Record, number: int) -> Run:
    notes = record.text("notes")
    origin = words(record.text("family"), record.text("source"))
    text = words(origin, record.text("source_file_or_table"), record.text("stack"), notes)
    software = software_of(origin, text, record.text("gpu"))
    known: dict[str, Any] = {
        "id": record.text("id", f"row {number}"),
        "source": _source(record),
        "where": record.where,
        "gpus": record.whole("gpus"),
        "trust": _trust(record),
        "step_seconds": record.number("derived_step_time_s") or record.number("step_seconds"),
        "memory": _memory(record, text),
        "software": " ".join(filter(None, (software.name, _version(record)))),
        "notes": notes,
    }
    if known["trust"] == "D":
        return Run(**known)
    try:
        return Run(**known, **_what_ran(record, software, text))
    except (NotJudgedError, UnknownModelError, UnknownGpuError) as reason:
        return Run(**known, excluded=str(reason))


def _what_ran(record: Record, software: Software, text: str) -> dict[str, Any]:
    """Model, hardware, workload and strategy."""
    for pattern, reason in _NOT_OURS:
        if re.search(pattern, words(record.text("model"), record.text("notes"))):
            raise NotJudgedError(reason)
    seq_len = record.whole("seq_len")
    for column in ("gpus", "seq_len", "global_batch"):
        if not record.whole(column):
            raise NotJudgedError(f"{column} is not given")
    model = model_of(record, seq_len=seq_len, unfused=software.unfused, dropout=software.dropout)
    hardware = hardware_of(
        record.text("gpu"),
        gpus=record.whole("gpus"),
        memory_gb=record.number("gpu_mem_gb") or None,
        gpus_per_node=record.whole("gpus_per_node"),
        link=record.text("inter_link"),
        changes=dict(software.hardware),
    )
    strategy, assumed = _strategy(record, software, text, model)
    workload = {
        "seq_len": seq_len,
        "global_batch": record.whole("global_batch"),
        "precision": _precision(record, text),
        "stack": record.text("stack", software.stack),
        "loss_in_place": software.stack == "megatron",
    }
    return {
        "model": model, "hardware": hardware, "workload": workload, "strategy": strategy, "assumed": assumed
    }  # fmt: skip


def _source(record: Record) -> str:
    source = record.text("family", record.text("source", Path(record.where.rpartition(":")[0]).stem))
    if source in _SPLIT_BY_EXPERTS:
        return f"{source}-{'moe' if record.whole('experts') > 1 else 'dense'}"
    return source


def _trust(record: Record) -> Trust:
    word = record.text("trust", "B").upper()
    for trust in _TRUST:
        if trust == word:
            return trust
    raise record.wrong("trust", "one of A, B, C, D is needed", "give a letter, or leave the cell empty")


_OVERLAPS_EXPERTS = "26.06"  # first container whose recipes hide the experts' exchange: about 1.3 times faster


def _version(record: Record) -> str:
    """The container, or the date of the release, that a row names."""
    text = record.text("notes") + record.text("source_file_or_table")
    found = re.search(r"(?:container |NeMo |\()(\d\d\.\d\d(?:\.\d\d)?)", text)
    return found[1] if found else ""


def _strategy(
    record: Record, software: Software, text: str, model: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The layout, and which of its keys the row does not state."""
    hint = record.text("config_hint").lower()
    nvidia = software.nvidia_recipes
    tp, pp, cp = map(record.degree, ("tp", "pp", "cp"))
    others = tp * pp * cp
    if record.whole("gpus") % others:
        raise NotJudgedError(f"tp·pp·cp = {others} does not divide the {record.whole('gpus')} GPUs")
    degrees = [key for key in ("tp", "pp", "dp") if key in record.cells]
    if degrees and not any(map(record.has, degrees)):
        raise NotJudgedError("the layout is not given")
    strategy: dict[str, Any] = {
        "tp": tp, "pp": pp, "cp": cp, "ep": record.degree("ep"),
        "dp": record.degree("dp") if record.has("dp") else record.whole("gpus") // others,
        "etp": record.whole("etp") or _number_after(r"\betp (\d{1,6})\b", text),
    }  # fmt: skip
    filled = {
        "microbatch": _microbatch(record, nvidia and pp > 1),
        "vpp": _virtual_stages(record, text, model, nvidia),
        "sp": _sequence_parallel(record, hint, nvidia and tp > 1),
        "zero": _zero(record, nvidia),
        "recompute": _recompute(record, hint),
    }
    strategy |= {key: value for key, (value, _) in filled.items()}
    strategy["dp_replicate"] = _copies(record, strategy)
    strategy["grad_dtype"] = _grad_dtype(record, hint, text, software)
    strategy["overlap"] = {
        "dp": software.overlaps_gradients,
        "tp": _overlaps_tp(hint, record.text("notes").lower(), bool(strategy["sp"]), nvidia),
        "pp": nvidia and strategy["vpp"] > 1,
        "ep": nvidia and "moe" in model and _version(record)[:5] >= _OVERLAPS_EXPERTS,
    }
    return strategy, tuple(key for key, (_, stated) in filled.items() if not stated)


def _microbatch(record: Record, one_is_usual: bool) -> tuple[int, bool]:
    if record.whole("micro_batch"):
        return record.whole("micro_batch"), True
    if one_is_usual:
        return 1, False
    raise NotJudgedError("micro_batch is not given")


def _virtual_stages(record: Record, text: str, model: dict[str, Any], nvidia: bool) -> tuple[int, bool]:
    """NVIDIA's dense recipes give each layer a virtual stage, also where their tables print NA."""
    pp = record.degree("pp")
    if record.whole("vpp") or pp == 1:
        return (record.whole("vpp", 1) if pp > 1 else 1), True
    layers = int(model["layers"])
    if nvidia and "moe" not in model and layers % pp == 0:
        return layers // pp, False
    return (2, False) if re.search(r"\binterleaved\b", text) else (1, not nvidia)


def _sequence_parallel(record: Record, hint: str, usual: bool) -> tuple[bool, bool]:
    stated = record.flag("sp")
    if stated is not None:
        return stated, True
    if record.degree("tp") == 1:
        return False, True
    told = re.search(r"sequence_parallel[ =](true|false)", hint)
    if told and "different layout" not in hint:
        return told[1] == "true", True
    return usual, False


def _zero(record: Record, nvidia: bool) -> tuple[int, bool]:
    """0 to 3 from what people write: ZeRO-1, FSDP2, SHARD_GRAD_OP, distributed optimizer, DDP, none."""
    text = record.text("zero_stage_or_fsdp").lower()
    if not text:
        return (1, False) if nvidia else (0, False)
    stage = re.search(r"zero[ -]?(?:stage )?([0-3])", text)
    if stage:
        return int(stage[1]), True
    if "shard_grad_op" in text:
        return 2, True
    if re.match(r"(?!.*\bfsdp=0)(.*\bfsdp|.*full_shard|.*hybrid_shard)", text):
        return 3, True
    if "distributed optimizer" in text:
        return 1, True
    if re.match(r"none|ddp|no\b|0", text):
        return 0, True
    raise NotJudgedError(f"zero_stage_or_fsdp {record.text('zero_stage_or_fsdp')!r} is not understood")


def _copies(record: Record, strategy: dict[str, Any]) -> int:
    """Copies of the sharded state where the group that shards it is smaller than dp."""
    group = _number_after(r"group(?: of)? (\d{1,6})\b", record.text("zero_stage_or_fsdp").lower())
    return strategy["dp"] // group if 1 < group < strategy["dp"] and strategy["dp"] % group == 0 else 1


def _recompute(record: Record, hint: str) -> tuple[str, bool]:
    """none, selective or full.

    A hint of the same layout that names modules beside the attention's core (norms, projections), some layers, or
    nothing states that next to nothing is computed again: none.
    """
    text = record.text("recompute").lower()
    if text:
        for word, meaning in (("none", "none"), ("no", "none"), ("false", "none"), ("select", "selective"),
                              ("full", "full"), ("true", "full"), ("yes", "full")):  # fmt: skip
            if text.startswith(word):
                return meaning, True
        raise NotJudgedError(f"recompute {record.text('recompute')!r} is not understood")
    if "recompute selective" in hint or re.search(r'rg="selective".*core_attn', hint):
        return "selective", True
    return "none", "recompute none" in hint or bool(re.search(r"same layout.*recompute: ", hint))


def _grad_dtype(record: Record, hint: str, text: str, software: Software) -> str:
    if "bf16 grad" in hint:
        return "bf16"
    half = software.half_gradients and record.text("precision") == "fp16" and "fp32_allreduce" not in text
    return "fp16" if half else "fp32"


def _overlaps_tp(hint: str, notes: str, sp: bool, nvidia: bool) -> bool:
    if nvidia:
        return sp and "tp comm overlap false" not in hint
    return bool(re.search(r"async ?tp", notes))


def _precision(record: Record, text: str) -> str:
    """fp8 and fp4 stand for several scalings, which the notes name."""
    precision = record.text("precision", "bf16").lower()
    precision = _SPELLED_OUT.get(precision, precision)
    if precision == "fp4":
        return "mxfp4" if "mxfp4" in text else "nvfp4"
    if precision == "fp8" and "other quantization granularity" in text:
        return "fp8_block" if record.text("gpu").startswith("H") else "mxfp8"
    if precision == "fp8" and "mxfp8" in text:
        return "mxfp8"
    if precision not in _PRECISIONS:
        raise NotJudgedError(f"precision {record.text('precision')!r} is not understood")
    return precision


def _memory(record: Record, text: str) -> MeasuredMemory | None:
    """`mem_gb_per_gpu` is in GB unless the notes say GiB, and counts what they say, or what the device shows.

    Alpa prints the most that was allocated, in GiB, and calls it GB (`GB = 1 << 30` in its util.py).
    """
    size = record.number("mem_gb_per_gpu")
    if not size:
        return None
    stated = record.text("memory_counts").lower()
    if stated and stated not in _COUNTS:
        raise record.wrong("memory_counts", f"one of {', '.join(_COUNTS)} is needed", "give one of these words")
    unit = GIB if re.search(r"mem[^|;]*\bgib\b|\balpa\b", text) else GB
    for counts in _COUNTS:
        if stated == counts:
            return MeasuredMemory(bytes=size * unit, counts=counts)
    if re.search(r"max_memory_allocated|max allocated|peak allocated|\balpa\b", text):
        return MeasuredMemory(bytes=size * unit, counts="allocated")
    if re.search(r"\breserved\b|peak_memory_usage|torchtitan", text):
        return MeasuredMemory(bytes=size * unit, counts="reserved")
    return MeasuredMemory(bytes=size * unit, counts="device")


def _number_after(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 1
