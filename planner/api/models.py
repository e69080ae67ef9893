"""Models: those that are bundled, their graphs, and what a graph costs at one size."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.spec.files import bundled_names, require_apart, write_text
from planner.spec.graph import Graph
from planner.spec.model import ModelSpec, load_bundled
from planner.spec.sources import ModelLike, UserModule, resolve_model
from planner.spec.summary import GraphSummary, summarise
from planner.spec.yaml_text import dump_yaml
from planner.trace import graphs


def list_models() -> list[ModelSpec]:
    """The bundled models, by name."""
    return [ModelSpec.from_dict(load_bundled(name)) for name in bundled_names("model_specs")]


def trace(
    model: ModelLike,
    *,
    dtype: str = "bf16",
    lengths: Sequence[int] = (),
    use_cache: bool = True,
    output: str | Path | None = None,
) -> Graph:
    """The operator graph of a model; written as YAML where `output` is given.

    `lengths` are the three sequence lengths at which a user's own module is traced.
    """
    if output is not None and isinstance(model, str | Path):
        require_apart({"output": str(output)}, {"model": str(model)})
    found = resolve_model(model)
    _require_lengths(lengths, found)
    if isinstance(found, UserModule):
        graph = graphs.graph_of_file(
            found.path, found.function, dtype=dtype, lengths=tuple(lengths), use_cache=use_cache
        )
    elif isinstance(found, Graph):
        graph = found  # `tp-plan trace … -o` wrote it
    else:
        graph = graphs.graph_of_spec(found, dtype=dtype, use_cache=use_cache)
    if output is not None:
        write_text(Path(output), dump_yaml(graph.to_dict()))
    return graph


def explain(
    model: ModelLike,
    *,
    microbatch: int = 1,
    seq_len: int = 0,
    kv_len: int = 0,
    dtype: str = "bf16",
    lengths: Sequence[int] = (),
    use_cache: bool = True,
) -> GraphSummary:
    """A model's operators with parameters, FLOPs and bytes at one microbatch and sequence length.

    `kv_len` asks for decoding: each of `seq_len` new tokens (1 unless given) attends to a cache of that many.
    """
    found = resolve_model(model)
    microbatch = whole("microbatch", microbatch, least=1)
    seq_len, kv_len = whole("seq_len", seq_len, least=0), whole("kv_len", kv_len, least=0)
    length = seq_len or (1 if kv_len else _usual_length(found))
    if isinstance(found, ModelSpec):
        _require_fitting(found, length, kv_len)
    if kv_len and kv_len < length:
        raise PlannerError(
            "kv_len counts the cached tokens and the new ones",
            value=kv_len,
            remedy=f"give at least the {length} new tokens",
            key="kv_len",
        )
    graph = trace(found, dtype=dtype, lengths=lengths, use_cache=use_cache)
    return summarise(graph, microbatch, length, kv_len or None)


def _usual_length(found: ModelSpec | UserModule | Graph) -> int:
    """The model's context, at most 4096 tokens; of a user's own module nobody knows it."""
    if not isinstance(found, ModelSpec):
        return 1024
    return found.vision.tokens if found.vision else min(4096, found.max_positions)


def _require_fitting(spec: ModelSpec, length: int, kv_len: int) -> None:
    """A model runs at the lengths that it is built for."""
    if kv_len and spec.kind != "decoder":
        raise PlannerError(
            "decoding against a cache is for decoders",
            value=f"kv_len {kv_len} for kind: {spec.kind}",
            remedy="leave kv_len out, or give a model of kind: decoder",
            key="kv_len",
        )
    if spec.vision and length != spec.vision.tokens:
        raise PlannerError(
            "the image sets the sequence length of a vision model",
            value=length,
            remedy=f"leave seq_len out ({spec.vision.tokens} tokens), or change image_size or patch_size",
            key="seq_len",
        )
    longest = spec.max_positions if spec.positions == "learned" and not spec.vision else math.inf
    for key, value in (("seq_len", length), ("kv_len", kv_len)):
        if value > longest:
            raise PlannerError(
                f"the table of learned positions has {longest} entries",
                value=value,
                remedy=f"give a {key} of at most {longest}, or raise max_positions",
                key=key,
            )


def whole(key: str, value: Any, least: int) -> int:
    """A size that may be 0 only where that means the usual one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise PlannerError(f"{key} is at least 1", value=value, remedy=f"give a positive {key}", key=key)
    return int(value)


def _require_lengths(lengths: Sequence[int], found: ModelSpec | UserModule | Graph) -> None:
    if not lengths:
        return
    if not isinstance(found, UserModule):
        raise PlannerError(
            "lengths belong to file.py:callable; what a spec builds is traced at lengths of our choice",
            value=list(lengths),
            remedy="leave lengths out; seq_len says at which length the graph is evaluated",
            key="lengths",
        )
    whole = all(isinstance(length, int) and length >= 1 for length in lengths)
    if not whole or len(lengths) != 3 or len(set(lengths)) != 3:
        raise PlannerError(
            "a module is traced at three different sequence lengths",
            value=list(lengths),
            remedy="give three, such as 64,128,192",
            key="lengths",
        )
