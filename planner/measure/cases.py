"""What is measured: one frozen dataclass per kind of measurement, and the list of them for a machine.

Every rank goes through the same list in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from planner.measure.topology import Layout
from planner.units import KIB, MIB

DeviceKind = Literal["cpu", "cuda"]
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
DTYPES: dict[DeviceKind, tuple[str, ...]] = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp16", "fp32", "fp8")}

# transfers from this size on no cache holds
LARGE_BYTES: dict[DeviceKind, int] = {"cpu": 128 * MIB, "cuda": 1024 * MIB}
_GELU_BYTES = 40 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmCase:
    """`[m, k] × [k, n]`, every rank for itself, and where training has them the products of its backward."""

    dtype: str
    m: int
    n: int
    k: int

    @property
    def flops(self) -> float:
        """Two per multiplication."""
        return 2.0 * self.m * self.n * self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Fused attention; `kv_len` includes the query. Backward is without its forward."""

    dtype: str
    phase: Literal["prefill", "backward", "decode"]
    batch: int
    query_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCase:
    """Bytes read and written: by a copy, by an addition, by GELUs, or between host and device."""

    what: Literal["copy", "add", "gelu", "to_device", "from_device"]
    bytes_: int

    @property
    def gelus(self) -> int:
        """Elements of a GELU: forward moves two of each, backward three, and the case is the mean of both."""
        return self.bytes_ // 10 if self.what == "gelu" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchCase:
    """Host time of one small kernel, or of issuing one small collective."""

    what: Literal["eager", "compiled", "cuda_graph", "collective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCase:
    """A collective of `bytes_` in each of `groups`, which run at the same time."""

    collective: str
    level: str
    groups: tuple[tuple[int, ...], ...]
    bytes_: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCase:
    """A message from one rank to another, all pairs at the same time."""

    level: str
    pairs: tuple[tuple[int, int], ...]
    bytes_: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapCase:
    """Products and an all-reduce of the whole world: each alone, then each beside the other."""

    what: Literal["compute_alone", "communication_alone", "compute_beside", "communication_beside"]


Case: TypeAlias = GemmCase | AttentionCase | MemoryCase | LaunchCase | CollectiveCase | PeerCase | OverlapCase


def key_of(case: Case) -> str:
    """A case's name in records and on screen: `gemm bf16 512x512x512`."""
    if isinstance(case, GemmCase):
        return f"gemm {case.dtype} {case.m}x{case.n}x{case.k}"
    if isinstance(case, CollectiveCase):
        return f"{case.collective} {case.level} {_ranks(case.groups)} {case.bytes_}"
    if isinstance(case, PeerCase):
        return f"p2p {case.level} {_ranks(case.pairs)} {case.bytes_}"
    words = [str(getattr(case, item.name)) for item in fields(case)]
    return " ".join([type(case).__name__.removesuffix("Case").lower(), *words])


def series_of(case: Case) -> str:
    """Cases of one series differ in size alone and stand in rising order: too slow a one ends the series."""
    if isinstance(case, (CollectiveCase, PeerCase)):
        return key_of(case).rpartition(" ")[0]
    return ""


def cases_for(layout: Layout, device: DeviceKind, dtypes: Iterable[str], *, quick: bool) -> list[Case]:
    """Every measurement of a machine, in order."""
    return [
        *_memory(device, quick=quick),
        *(case for dtype in dtypes for case in _gemms(dtype, device, quick=quick)),
        *(case for dtype in dtypes if dtype != "fp8" for case in _attentions(dtype, device, quick=quick)),
        *_launches(layout, device, quick=quick),
        *_links(layout, device, quick=quick),
    ]


def _memory(device: DeviceKind, *, quick: bool) -> Iterator[Case]:
    large = LARGE_BYTES[device]
    yield MemoryCase(what="copy", bytes_=large)
    yield MemoryCase(what="copy", bytes_=2 * large)
    sizes = [4 * KIB, 256 * KIB, 4 * MIB, 32 * MIB, large, 2 * large]
    if not quick:
        sizes = sorted({*sizes, 32 * KIB, MIB, 16 * MIB, 64 * MIB})
    for size in sizes:
        yield MemoryCase(what="add", bytes_=size)
    yield MemoryCase(what="gelu", bytes_=_GELU_BYTES)
    if device == "cuda":
        yield MemoryCase(what="to_device", bytes_=64 * MIB)
        yield MemoryCase(what="from_device", bytes_=64 * MIB)


def _gemms(dtype: str, device: DeviceKind, *, quick: bool) -> Iterator[Case]:
    """Squares, then one dim small at a time, then thin ones that memory bounds."""
    if device == "cpu":
        squares, large, small, thin = [32, 128, 256, 512, 640], 512, [16, 64], [1, 4]
        if not quick:
            squares, small, thin = [*squares, 384, 1024], [16, 32, 64, 128], [1, 2, 4, 8]
    else:
        squares, large, small, thin = [128, 512, 1024, 2048, 4096, 8192], 4096, [64, 256, 1024], [1, 16]
        if not quick:
            squares = [*squares, 256, 1536, 3072, 6144]
            small, thin = [32, 64, 128, 256, 512, 1024, 2048], [1, 4, 16, 32]
    least = 16 if dtype == "fp8" else 1  # torch._scaled_mm wants n and k in multiples of 16
    shapes = [(size, size, size) for size in squares]
    shapes += [shape for size in small for shape in _with_one(size, large)]
    shapes += [(max(least, size), large * 2, large * 2) for size in thin]
    for m, n, k in dict.fromkeys(shapes):
        yield GemmCase(dtype=dtype, m=m, n=n, k=k)


def _with_one(size: int, large: int) -> tuple[tuple[int, int, int], ...]:
    return (size, large, large), (large, size, large), (large, large, size)


def _attentions(dtype: str, device: DeviceKind, *, quick: bool) -> Iterator[Case]:
    lengths, heads, caches, many = [64, 256, 512], 4, [256, 1024, 4096], 4
    if device == "cuda":
        lengths, heads, caches, many = [256, 1024, 4096], 16, [1024, 4096, 16384], 32
    if not quick:
        lengths = sorted({*lengths, *(2 * length for length in lengths)})
    for length in lengths:
        longest = length == lengths[-1]
        for phase in ("prefill", "backward"):
            for head_dim in (64, 128) if longest or not quick else (64,):
                for batch in (1, 2) if not quick or (phase == "prefill" and not longest) else (1,):
                    yield AttentionCase(
                        dtype=dtype, phase=phase, batch=batch, query_len=length, kv_len=length,
                        heads=heads, kv_heads=heads, head_dim=head_dim,
                    )  # fmt: skip
    for cache in caches:
        for batch in (1, many) if quick else (1, 2, many, 2 * many):
            for kv_heads in (heads, heads // 4):
                if quick and kv_heads < heads and batch > 1:
                    continue
                yield AttentionCase(
                    dtype=dtype, phase="decode", batch=batch, query_len=1, kv_len=cache,
                    heads=heads, kv_heads=kv_heads, head_dim=128,
                )  # fmt: skip


def _launches(layout: Layout, device: DeviceKind, *, quick: bool) -> Iterator[Case]:
    yield LaunchCase(what="eager")
    if layout.world > 1:
        yield LaunchCase(what="collective")
    if device == "cuda":
        yield LaunchCase(what="cuda_graph")
    if not quick:
        yield LaunchCase(what="compiled")


def _links(layout: Layout, device: DeviceKind, *, quick: bool) -> Iterator[Case]:
    factor, sizes = (8, _sizes(4 * KIB, 32 * MIB, 8)) if quick else (4, _sizes(KIB, 64 * MIB, 4))
    if device == "cuda":
        sizes = _sizes(KIB, (128 if quick else 512) * MIB, factor)
    for level in layout.levels:
        for pairs in layout.pairs(level):
            yield from (PeerCase(level=level.name, pairs=pairs, bytes_=size) for size in sizes)
        for groups in layout.groups(level):
            for collective in COLLECTIVES if len(groups) == 1 or not quick else COLLECTIVES[:1]:
                for size in sizes:
                    yield CollectiveCase(collective=collective, level=level.name, groups=groups, bytes_=size)
    if layout.world > 1:
        for what in ("compute_alone", "communication_alone", "compute_beside", "communication_beside"):
            yield OverlapCase(what=what)


def _sizes(first: int, last: int, factor: int) -> list[int]:
    sizes = [first]
    while sizes[-1] * factor <= last:
        sizes.append(sizes[-1] * factor)
    return sizes


def _ranks(groups: tuple[tuple[int, ...], ...]) -> str:
    return "|".join(",".join(map(str, group)) for group in groups)
