"""The one place that says whether a strategy can run: search, estimate and executor all ask here.

A rule is a function of the case that returns what is broken, or None. RULES names them, so that a search can
count why candidates fell away, READS their keys, so that it asks once. Rules about a runtime hold for the stacks
that this package executes; `stack: megatron` describes runs of another program and is bound by arithmetic alone.
The vocabulary needs no rule: it is padded (`padded_vocab`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from planner.errors import PlannerError
from planner.spec.model import ModelSpec
from planner.spec.orders import ONE_STAGE_A_RANK, SPLIT_BACKWARD, in_two_parts
from planner.spec.strategy import Recompute, Strategy
from planner.spec.workload import ServeWorkload, TrainWorkload, Workload

_FARTHEST = 10_000  # how far from a degree a legal neighbour is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A broken rule: its name in RULES, the key to change, the rule, the actual value, the remedy."""

    name: str
    key: str
    rule: str
    value: str
    remedy: str


class Case(NamedTuple):
    """What is asked. A module without a spec has no model: its splits are judged operator by operator."""

    model: ModelSpec | None
    workload: Workload
    strategy: Strategy
    gpus: int


class Broken(NamedTuple):
    """A rule's finding: key, rule, value, remedy."""

    key: str
    rule: str
    value: object
    remedy: str


def violations(
    model: ModelSpec | None, workload: Workload, strategy: Strategy, gpus: int
) -> tuple[Violation, ...]:
    """Every rule that the strategy breaks, in the order of RULES; empty where it can run."""
    case = Case(model, workload, strategy, gpus)
    findings = ((name, rule(case)) for name, rule in RULES.items())
    return tuple(
        Violation(name=name, key=found.key, rule=found.rule, value=str(found.value), remedy=found.remedy)
        for name, found in findings
        if found is not None
    )


def require_legal(model: ModelSpec | None, workload: Workload, strategy: Strategy, gpus: int) -> None:
    """Raise for the first broken rule and name the others."""
    found = violations(model, workload, strategy, gpus)
    if not found:
        return
    first, *others = found
    also = "".join(f"; and {item.rule} ({item.key}: {item.value})" for item in others)
    raise PlannerError(first.rule, value=first.value, remedy=first.remedy + also, key=first.key)


def require_word(strategy: Strategy, recompute: Recompute, *, key: str) -> None:
    """Raise where a block cannot recompute so under a strategy that leaves it to each block."""
    found = _word(strategy, recompute)
    if found is not None:
        raise PlannerError(found.rule, value=found.value, remedy=found.remedy, key=key)


def padded_vocab(vocab: int, tp: int) -> int:
    """The vocabulary as split over tp: rounded up to a multiple of it, the rows added are never chosen."""
    return -(-vocab // tp) * tp


def nearest_batches(workload: TrainWorkload, strategy: Strategy) -> tuple[int, ...]:
    """The nearest global batches below and above that the degrees and the schedule can run."""
    unit = strategy.dp * strategy.microbatch
    torch_runs = workload.stack != "megatron"

    def first(counts: Iterable[int]) -> tuple[int, ...]:
        runs = (count for count in counts if not torch_runs or _schedule_runs(strategy, count))
        return tuple(count * unit for count in [next(runs, 0)] if count)

    whole, rest = divmod(workload.global_batch, unit)
    below = first(range(whole - (rest == 0), 0, -1))
    return below + first(range(whole + 1, whole + 2 * strategy.pp + 2))


def _schedule_runs(strategy: Strategy, count: int) -> bool:
    """Whether torch's schedule takes this many microbatches."""
    if strategy.pp == 1 or strategy.schedule in ("gpipe", "zbv"):
        return True
    if strategy.schedule == "1f1b":
        return count >= strategy.pp
    return count % max(1, count // strategy.pp) == 0


def _gpus(c: Case) -> Broken | None:
    if c.strategy.gpus == c.gpus:
        return None
    serve = c.workload.mode == "serve"
    product = "replicas·tp·pp·attention_dp" if serve else "tp·pp·cp·dp"
    spread, degree = ("replicas", c.strategy.replicas) if serve else ("dp", c.strategy.dp)
    others = max(1, c.strategy.gpus // degree)
    fits = c.gpus % others == 0 and c.gpus >= others
    remedy = f"set {spread} to {c.gpus // others}" if fits else f"give a multiple of {others} GPUs"
    return Broken("gpus", f"{product} = {c.gpus} GPUs", c.strategy.gpus, remedy)


def _mode(c: Case) -> Broken | None:
    neutral = (
        {"dp": 1, "cp": 1, "vpp": 1, "microbatch": 1, "zero": 0, "dp_replicate": 1}
        if c.workload.mode == "serve"
        else {"attention_dp": 1, "replicas": 1}
    )
    for key, value in neutral.items():
        if getattr(c.strategy, key) != value:
            other = "training" if c.workload.mode == "serve" else "serving"
            return Broken(key, f"{key} belongs to {other}", getattr(c.strategy, key), f"leave {key} out")
    return None


def _serving(c: Case) -> Broken | None:
    if c.model is None or c.workload.mode == "train" or c.model.kind == "decoder":
        return None
    return Broken("mode", "serving generates tokens with a decoder", c.model.kind, "use mode: train")


def _heads(c: Case) -> Broken | None:
    if c.model is None or c.model.heads % c.strategy.tp == 0:
        return None
    value = f"{c.model.heads} heads, tp {c.strategy.tp}"
    return Broken("tp", "tp divides the attention heads", value, _nearest_tp(c.model, c.strategy.tp))


def _kv_heads(c: Case) -> Broken | None:
    if c.model is None or _kv_heads_split(c.model, c.strategy.tp):
        return None
    rule = "tp divides the kv heads, or is a multiple of them (each is then replicated)"
    value = f"{c.model.kv_heads} kv heads, tp {c.strategy.tp}"
    return Broken("tp", rule, value, _nearest_tp(c.model, c.strategy.tp))


def _ffn(c: Case) -> Broken | None:
    if c.model is None:
        return None
    for width in _dense_widths(c.model):
        if width % c.strategy.tp:
            value = f"width {width}, tp {c.strategy.tp}"
            remedy = _nearest_tp(c.model, c.strategy.tp)
            return Broken("tp", "tp divides the width of the feed-forward", value, remedy)
    return None


def _experts(c: Case) -> Broken | None:
    s = c.strategy
    if c.model is None or (s.ep == 1 and s.etp == 1):
        return None
    if c.model.moe is None:
        key = "ep" if s.ep > 1 else "etp"
        return Broken(key, f"{key} needs a model with experts", getattr(s, key), f"leave {key} out")
    if c.model.moe.experts % s.ep:
        return Broken("ep", f"ep divides the {c.model.moe.experts} experts", s.ep,
                      _nearest_divisors(c.model.moe.experts, s.ep, "ep"))  # fmt: skip
    if c.model.moe.expert_ffn % s.etp:
        return Broken("etp", f"etp divides an expert's width, {c.model.moe.expert_ffn}", s.etp,
                      _nearest_divisors(c.model.moe.expert_ffn, s.etp, "etp"))  # fmt: skip
    return None


def _expert_ranks(c: Case) -> Broken | None:
    s = c.strategy
    taken = s.ep * s.etp
    if c.workload.mode == "serve":
        ranks = s.tp * s.attention_dp
        if c.model is None or c.model.moe is None or taken == ranks:
            return None
        return Broken("ep", f"ep·etp = tp·attention_dp, {ranks}", taken, f"give ep and etp of product {ranks}")
    ranks = s.tp * s.cp * s.dp
    if ranks % taken == 0:
        return None
    return Broken("ep", f"ep·etp divides tp·cp·dp, {ranks}", taken, _nearest_divisors(ranks, taken, "ep·etp"))


def _replicate(c: Case) -> Broken | None:
    s = c.strategy
    if s.dp % s.dp_replicate:
        remedy = _nearest_divisors(s.dp, s.dp_replicate, "dp_replicate")
        return Broken("dp_replicate", f"dp_replicate divides dp, {s.dp}", s.dp_replicate, remedy)
    if s.zero == 0 and s.dp_replicate not in (1, s.dp):
        return Broken("dp_replicate", "with zero 0 nothing is sharded: every dp rank is a copy",
                      s.dp_replicate, "leave dp_replicate out, or set zero to 1 or more")  # fmt: skip
    return None


def _expert_copies(c: Case) -> Broken | None:
    w, s = c.workload, c.strategy
    if isinstance(w, ServeWorkload) or w.stack == "megatron" or c.model is None or c.model.moe is None:
        return None
    if s.zero == 0 or s.dp % s.dp_replicate or s.tp * s.cp * s.dp % (s.ep * s.etp):
        return None
    if s.expert_dp % s.dp_replicate == 0:
        return None
    return Broken("dp_replicate", f"dp_replicate divides the {s.expert_dp} ranks that hold the same experts",
                  s.dp_replicate, _nearest_divisors(s.expert_dp, s.dp_replicate, "dp_replicate"))  # fmt: skip


def _positions(c: Case) -> Broken | None:
    if c.model is None:
        return None
    longest = c.workload.longest_context if isinstance(c.workload, ServeWorkload) else c.workload.seq_len
    key = "seq_len" if c.workload.mode == "train" else "input_len"
    if c.model.vision is not None:
        tokens = c.model.vision.tokens
        if longest == tokens:
            return None
        return Broken(key, f"an image is {tokens} tokens for this model", longest, f"set seq_len to {tokens}")
    if c.model.positions != "learned" or longest <= c.model.max_positions:
        return None
    return Broken(key, f"the model has learned {c.model.max_positions} positions", longest,
                  f"use at most {c.model.max_positions} tokens, or raise max_positions")  # fmt: skip


def _context(c: Case) -> Broken | None:
    cp = c.strategy.cp
    if cp == 1 or isinstance(c.workload, ServeWorkload) or c.workload.seq_len % (2 * cp) == 0:
        return None
    return Broken("cp", f"2·cp = {2 * cp} divides the sequence: each rank takes a chunk from both ends",
                  f"seq_len {c.workload.seq_len}",
                  _nearest_multiples(c.workload.seq_len, 2 * cp, "seq_len"))  # fmt: skip


def _sequence(c: Case) -> Broken | None:
    s = c.strategy
    if not s.sp or s.tp == 1 or isinstance(c.workload, ServeWorkload):
        return None  # sp with tp 1 splits nothing
    if c.workload.seq_len % (s.cp * s.tp) == 0:
        return None
    remedy = _nearest_multiples(c.workload.seq_len, s.cp * s.tp, "seq_len") + ", or leave sp out"
    rule = f"with sp, cp·tp = {s.cp * s.tp} divides the sequence"
    return Broken("sp", rule, f"seq_len {c.workload.seq_len}", remedy)


def _layers(c: Case) -> Broken | None:
    """The embedding and the head may be stages of their own, as in the published layouts of Llama 405B."""
    stages = c.strategy.pp * c.strategy.vpp
    if c.model is None or c.model.layers + 2 >= stages:
        return None
    rule = f"pp·vpp is at most the {c.model.layers} layers, embedding and head"
    return Broken("pp", rule, stages, f"use pp·vpp of at most {c.model.layers + 2}")


def _two_towers(c: Case) -> Broken | None:
    if c.model is None or c.model.kind != "encoder_decoder":
        return None
    for key in ("pp", "cp"):
        if getattr(c.strategy, key) > 1:
            return Broken(key, "every decoder layer reads the whole encoder: no pipeline or context parallel",
                          getattr(c.strategy, key), f"set {key} to 1 and use tp or dp")  # fmt: skip
    return None


def _batch(c: Case) -> Broken | None:
    if isinstance(c.workload, ServeWorkload):
        return None
    unit = c.strategy.dp * c.strategy.microbatch
    if c.workload.global_batch % unit == 0:
        return None
    return Broken("global_batch", f"dp·microbatch = {unit} divides the global batch", c.workload.global_batch,
                  _batch_remedy(c.workload, c.strategy))  # fmt: skip


def _virtual_stages(c: Case) -> Broken | None:
    s = c.strategy
    if s.pp == 1:
        if s.vpp > 1:
            return Broken("vpp", "virtual stages need a pipeline", s.vpp, "set vpp to 1, or pp above 1")
        if s.schedule not in ONE_STAGE_A_RANK:
            return Broken("schedule", f"{s.schedule} needs a pipeline", "pp 1", "leave schedule out")
        return None
    if s.schedule in ONE_STAGE_A_RANK and s.vpp > 1:
        return Broken("vpp", f"{s.schedule} has one stage a rank", s.vpp, "use schedule interleaved, or vpp 1")
    if s.schedule in ("interleaved", "zb") and s.vpp < 2:
        return Broken("vpp", f"{s.schedule} needs two or more stages a rank", s.vpp, "set vpp to 2, or use 1f1b")
    if s.schedule == "zbv" and s.vpp != 2:
        return Broken("vpp", "zbv has two stages a rank", s.vpp, "set vpp to 2")
    return None


def _microbatches(c: Case) -> Broken | None:
    w, s = c.workload, c.strategy
    if isinstance(w, ServeWorkload) or w.stack == "megatron" or w.global_batch % (s.dp * s.microbatch):
        return None
    count = s.microbatches(w.global_batch)
    if _schedule_runs(s, count):
        return None
    rule = (
        f"1f1b needs at least pp = {s.pp} microbatches"
        if s.schedule == "1f1b"
        else f"{s.schedule} needs whole rounds: microbatches divisible by {count // s.pp}"
    )
    return Broken("global_batch", rule, f"{count} microbatches", _batch_remedy(w, s))


def _zero(c: Case) -> Broken | None:
    if isinstance(c.workload, ServeWorkload) or c.workload.stack == "megatron":
        return None
    if c.strategy.zero != 2 or c.strategy.pp == 1:
        return None
    rule = "a pipeline keeps gradients whole until its last microbatch: zero 2 would be zero 1"
    return Broken("zero", rule, 2, "use zero 1 or 3 with pp")


def _compiled(c: Case) -> Broken | None:
    if c.workload.stack != "compiled" or c.strategy.schedule not in SPLIT_BACKWARD:
        return None
    return Broken("schedule", "a compiled backward cannot be split in two as zb and zbv need",
                  c.strategy.schedule, "use interleaved, or stack: eager")  # fmt: skip


def _run_again(c: Case) -> Broken | None:
    return _word(c.strategy, c.strategy.recompute)


def _word(strategy: Strategy, recompute: str) -> Broken | None:
    if not in_two_parts(strategy.schedule, strategy.pp) or recompute in ("none", "auto"):
        return None
    return Broken("recompute", "zb and zbv run backward in two parts, and a block would run again for either",
                  recompute, "set recompute to none, or schedule to interleaved")  # fmt: skip


RULES: dict[str, Callable[[Case], Broken | None]] = {
    "gpus": _gpus,
    "mode": _mode,
    "serving": _serving,
    "heads": _heads,
    "kv_heads": _kv_heads,
    "ffn": _ffn,
    "experts": _experts,
    "expert_ranks": _expert_ranks,
    "dp_replicate": _replicate,
    "expert_copies": _expert_copies,
    "positions": _positions,
    "context": _context,
    "sequence": _sequence,
    "layers": _layers,
    "encoder_decoder": _two_towers,
    "batch": _batch,
    "virtual_stages": _virtual_stages,
    "microbatches": _microbatches,
    "zero": _zero,
    "compiled": _compiled,
    "run_again": _run_again,
}

# the keys that decide whether a training strategy breaks a rule; the others may take any value
READS: dict[str, tuple[str, ...]] = {
    "gpus": ("tp", "pp", "dp", "cp", "attention_dp", "replicas"), "mode": ("attention_dp", "replicas"),
    "serving": (), "heads": ("tp",), "kv_heads": ("tp",), "ffn": ("tp",), "experts": ("ep", "etp"),
    "expert_ranks": ("tp", "cp", "dp", "ep", "etp"), "dp_replicate": ("dp", "zero", "dp_replicate"),
    "expert_copies": ("tp", "cp", "dp", "ep", "etp", "zero", "dp_replicate"), "positions": (),
    "context": ("cp",), "sequence": ("tp", "cp", "sp"), "layers": ("pp", "vpp"), "encoder_decoder": ("pp", "cp"),
    "batch": ("dp", "microbatch"), "virtual_stages": ("pp", "vpp", "schedule"),
    "microbatches": ("dp", "microbatch", "pp", "schedule"), "zero": ("zero", "pp"), "compiled": ("schedule",),
    "run_again": ("pp", "schedule", "recompute"),
}  # fmt: skip


def _batch_remedy(workload: TrainWorkload, strategy: Strategy) -> str:
    batches = nearest_batches(workload, strategy)
    return "set global_batch to " + " or ".join(map(str, batches)) + ", or change dp, microbatch or pp"


def _kv_heads_split(model: ModelSpec, tp: int) -> bool:
    """As many kv heads as heads: the rule about heads speaks for both."""
    return model.kv_heads == model.heads or model.kv_heads % tp == 0 or tp % model.kv_heads == 0


def _dense_widths(model: ModelSpec) -> tuple[int, ...]:
    """Widths that tp cuts: of the dense feed-forward where a layer has one, and of the shared experts."""
    moe = model.moe
    if moe is None:
        return (model.ffn,)
    return (model.ffn,) * (moe.first_dense_layers > 0 or moe.every > 1) + (moe.shared_ffn,)


def _nearest_tp(model: ModelSpec, near: int) -> str:
    def fits(tp: int) -> bool:
        whole = all(size % tp == 0 for size in (model.heads, *_dense_widths(model)))
        return whole and _kv_heads_split(model, tp)

    below = next(tp for tp in range(min(near - 1, model.heads), 0, -1) if fits(tp))
    above = [tp for tp in range(near + 1, min(2 * near, model.heads) + 1) if fits(tp)][:1]
    return "set tp to " + " or ".join(map(str, [below, *above]))


def _nearest_divisors(number: int, near: int, key: str) -> str:
    """`set tp to 4 or 8`: the divisors of a number around a value that is none."""
    near = min(near, number + 1)
    below = next((d for d in range(near - 1, max(0, near - _FARTHEST), -1) if number % d == 0), 0)
    above = next((d for d in range(near + 1, min(2 * near, near + _FARTHEST)) if number % d == 0), 0)
    return f"set {key} to {below or math.gcd(number, near)}" + (f" or {above}" if above else "")


def _nearest_multiples(number: int, of: int, key: str) -> str:
    below = number // of * of
    return f"set {key} to " + " or ".join(str(value) for value in (below, below + of) if value)
