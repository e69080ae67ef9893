"""Seconds of single kernels and collectives on a profile."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from planner.errors import PlannerError
from planner.spec.codec import nearest
from planner.spec.hardware_sources import HardwareLike, load_hardware


def gemm_seconds(hardware: HardwareLike, m: Any, n: Any, k: Any, dtype: str = "bf16") -> Any:
    """Seconds of y[m, n] = x[m, k]·w[k, n] on one device; scalars or numpy arrays, which broadcast."""
    from planner.cost import gemm

    profile = load_hardware(hardware)
    sizes = _positive({"m": m, "n": n, "k": k})
    precision = _word(dtype, profile.gemm, "dtype")
    return gemm.gemm_seconds(profile.device, profile.gemm_for(precision), precision, *sizes.values())


def attention_seconds(
    hardware: HardwareLike,
    *,
    phase: Literal["prefill", "decode", "backward"],
    batch: Any,
    query_len: Any,
    kv_len: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    dtype: str = "bf16",
    window: Any = 0,
) -> Any:
    """Seconds of fused causal attention; `kv_len` includes the queries. Scalars or numpy arrays, as above."""
    from planner.cost import attention

    profile = load_hardware(hardware)
    sizes = _positive(
        {
            "batch": batch,
            "query_len": query_len,
            "kv_len": kv_len,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
        }
    )
    precision = _word(dtype, profile.attention, "dtype")
    curves = profile.attention_for(precision)
    given = {**sizes, "value_dim": sizes["head_dim"], "window": _positive({"window": window}, low=0)["window"]}
    phase = _word(phase, ("prefill", "decode", "backward"), "phase")
    if phase == "decode":
        return attention.attention_decode_seconds(profile.device, curves, precision, **given)
    if phase == "backward":
        return attention.backward_seconds(profile.device, curves.backward, precision, **given)
    return attention.prefill_seconds(profile.device, curves.prefill, precision, **given)


def collective_seconds(
    hardware: HardwareLike,
    kind: str,
    bytes_: Any,
    *,
    ranks: Collection[int],
    concurrent_groups: int = 1,
    dtype: str = "bf16",
    custom_all_reduce: Literal["graph", "eager"] | None = None,
) -> Any:
    """Seconds of a collective among ranks placed in the topology.

    Bytes: all_reduce and broadcast the buffer, all_gather the total output, reduce_scatter the total input,
    all_to_all one rank's send buffer, p2p the message; a number or an array. `custom_all_reduce` is the serving
    engines' own for small messages; where the profile has none for these ranks, the library's, as in engines.
    """
    from planner.cost import collectives

    word: Any = kind
    return collectives.collective_seconds(
        load_hardware(hardware),
        word,
        bytes_,
        ranks=ranks,
        concurrent_groups=concurrent_groups,
        dtype=dtype,
        custom_all_reduce=custom_all_reduce,
    )


def _positive(sizes: Mapping[str, Any], low: float = 1) -> dict[str, Any]:
    """Sizes as numbers or arrays of numbers, none below `low`, none of them NaN."""
    import numpy as np

    for key, value in sizes.items():
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            array = np.asarray(np.nan)
        if not np.all(np.isfinite(array)) or np.any(array < low):
            raise PlannerError(
                f"{key} is at least {low:g}", value=value, remedy=f"give a number of {key}", key=key
            )
    return {key: value if np.ndim(value) == 0 else np.asarray(value) for key, value in sizes.items()}


def _word(word: Any, allowed: Collection[str], key: str) -> Any:
    if word not in allowed:
        raise PlannerError(
            "one of " + ", ".join(allowed) + " is needed",
            value=word,
            remedy=nearest(str(word), allowed),
            key=key,
        )
    return word
