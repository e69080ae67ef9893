"""The graph of a spec or of a user's file: from the cache, or traced now."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from planner.errors import PlannerError
from planner.spec.files import read_text
from planner.spec.graph import Graph
from planner.spec.model import ModelSpec
from planner.trace import cache

WORKING_DTYPES = ("bf16", "fp16", "fp32")


def graph_of_spec(spec: ModelSpec, *, dtype: str = "bf16", use_cache: bool = True) -> Graph:
    """The training graph of a bundled architecture."""
    _require_dtype(dtype)
    content = spec.to_dict()
    for label in ("name", "parameters", "reference"):
        content.pop(label, None)
    digest = cache.digest_of({"spec": content, "dtype": dtype})
    cached = cache.load(digest) if use_cache else None
    if cached is not None:
        return dataclasses.replace(cached, name=spec.name)
    from planner.models import build_model
    from planner.trace.inputs import example_for, lengths_for
    from planner.trace.tracer import trace_module, working_dtype

    torch_dtype = working_dtype(dtype)
    module = build_model(spec, device="meta", dtype=torch_dtype)
    graph = trace_module(module, example_for(spec, torch_dtype), name=spec.name, lengths=lengths_for(spec))
    return _kept(graph, digest, {})


def graph_of_file(
    path: Path, function: str, *, dtype: str = "bf16", lengths: Sequence[int] = (), use_cache: bool = True
) -> Graph:
    """The graph of `path:function`, which returns (module, example)."""
    _require_dtype(dtype)
    content = hashlib.sha256(read_text(path).encode()).hexdigest()
    digest = cache.digest_of(
        {"file": content, "place": str(path.resolve()), "function": function, "dtype": dtype, "lengths": lengths}
    )
    cached = cache.load(digest) if use_cache else None
    if cached is not None:
        return cached
    from planner.models.user_module import in_dtype, loaded
    from planner.trace.tracer import LENGTHS, trace_module, working_dtype

    with loaded(path, function) as (module, example, sources):
        module, example = in_dtype(module, example, working_dtype(dtype))
        graph = trace_module(module, example, name=f"{path.stem}:{function}", lengths=lengths or LENGTHS)
        graph = dataclasses.replace(graph, own=True)
    return _kept(graph, digest, sources)


def _kept(graph: Graph, digest: str, sources: dict[str, str]) -> Graph:
    graph = dataclasses.replace(graph, digest=digest, traced_with=f"torch {cache.torch_version()}")
    cache.store(graph, sources)
    return graph


def _require_dtype(dtype: str) -> None:
    if dtype not in WORKING_DTYPES:
        raise PlannerError(
            "a graph is traced in " + ", ".join(WORKING_DTYPES),
            value=dtype,
            remedy="trace in bf16; other precisions are derived from that graph",
            key="dtype",
        )
