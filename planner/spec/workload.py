"""What is to be computed: one training step, or the requests that a deployment serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from planner.errors import PlannerError
from planner.spec.codec import Range, decode, encode, nearest
from planner.spec.model import ModelSpec
from planner.spec.yaml_text import Source

Mode = Literal["train", "serve"]
Precision = Literal[
    "fp32", "bf16", "fp16", "fp8", "fp8_block", "mxfp8", "nvfp4", "mxfp4", "int8", "int4"
]  # fmt: skip
KvPrecision = Literal["fp32", "bf16", "fp16", "fp8"]
Optimizer = Literal["adamw", "sgd"]
Stack = Literal["eager", "compiled", "megatron", "cuda_graph"]
Context = Literal["gather", "ring"]  # how ranks of cp come by the keys and values of the others
Engine = Literal["vllm", "sglang", "tensorrt_llm"]

Length = Annotated[int, Range(1, 1_000_000_000)]
Imbalance = Annotated[float, Range(1.0, 1000.0)]
Milliseconds = Annotated[float, Range(0.0, 1e9)]

_LONGEST_DEFAULT_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainWorkload:
    """One optimizer step over `global_batch` sequences of `seq_len` tokens."""

    mode: Literal["train"] = "train"
    seq_len: Length
    global_batch: Length  # sequences a step, over all replicas and microbatches
    precision: Precision  # of the matrix products; master weights and optimizer stay fp32
    optimizer: Optimizer = "adamw"
    stack: Stack = "eager"  # whose launch behaviour and memory layout: plain torch unless stated
    imbalance: Imbalance = 1.0  # tokens that the busiest expert rank gets, over their mean
    loss_in_place: bool = True  # gradients overwrite probabilities, as here and in Megatron; not F.cross_entropy

    def to_dict(self) -> dict[str, Any]:
        """YAML data without the keys that stand at their default."""
        data: dict[str, Any] = encode(self, omit_defaults=True)
        return {"mode": self.mode} | data

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.seq_len * self.global_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeWorkload:
    """Requests of one shape, `concurrency` of them in flight over the whole deployment."""

    mode: Literal["serve"]
    input_len: Length
    output_len: Length
    concurrency: Length
    precision: Precision  # of the weights
    kv_precision: KvPrecision = "bf16"
    engine: Engine = "vllm"
    stack: Stack = "cuda_graph"
    max_ttft_ms: Milliseconds = 0.0  # time to first token at most this; 0: no limit
    max_tpot_ms: Milliseconds = 0.0  # time per output token at most this; 0: no limit

    def to_dict(self) -> dict[str, Any]:
        """YAML data without the keys that stand at their default."""
        data: dict[str, Any] = encode(self, omit_defaults=True)
        return data

    @property
    def longest_context(self) -> int:
        """Tokens of a request when its last one is generated."""
        return self.input_len + self.output_len


Workload: TypeAlias = TrainWorkload | ServeWorkload


def stack_of_run(*, compiled: bool) -> Stack:
    """The software of a run of ours, as a workload names it."""
    return "compiled" if compiled else "eager"


def workload_from_dict(data: Any, source: Source | None = None, *, model: ModelSpec | None = None) -> Workload:
    """A workload from plain data with its defaults; the default sequence length follows the model."""
    if isinstance(data, (TrainWorkload, ServeWorkload)):
        return data
    if not isinstance(data, Mapping):
        raise PlannerError(
            "a workload is a mapping of keys to values",
            value=data,
            remedy="give keys such as seq_len and global_batch",
            key="workload",
            where=(source or Source()).place(()),
        )
    mode = data.get("mode", "train")
    if mode not in ("train", "serve"):
        raise PlannerError(
            "one of train, serve is needed",
            value=mode,
            remedy=nearest(str(mode), ("train", "serve")),
            key="mode",
            where=(source or Source()).place(("mode",)),
        )
    if mode == "serve":
        return decode(ServeWorkload, {**_serve_defaults(), **data}, source)
    return decode(TrainWorkload, {**_train_defaults(model), **data}, source)


def _train_defaults(model: ModelSpec | None) -> dict[str, Any]:
    """A pre-training step of about a million tokens, no longer than the model's positions."""
    tokens = _LONGEST_DEFAULT_TOKENS
    if model is not None:
        tokens = model.vision.tokens if model.vision else min(tokens, model.max_positions)
    return {"seq_len": tokens, "global_batch": 256, "precision": "bf16"}


def _serve_defaults() -> dict[str, Any]:
    """Chat-like requests."""
    return {"input_len": 1024, "output_len": 256, "concurrency": 32, "precision": "bf16"}
