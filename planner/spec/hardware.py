"""A hardware profile: device, software stacks and topology, every number with its source.

Files spell units in their keys (GiB, GB/s, TFLOP/s, µs); the properties are SI. The number of nodes is no
part of a profile: its outermost level holds as many groups as there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from planner.errors import PlannerError
from planner.spec.codec import Count, Range, Share, decode, encode
from planner.spec.provenance import Number, Section, numbers_of
from planner.spec.workload import Precision, Stack
from planner.spec.yaml_text import Source
from planner.units import GB, GIB, MIB

PeakDtype = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4", "int8", "int4"]
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]

Efficiency = Annotated[float, Range(1e-6, 2.0)]  # share of a peak; caches and NVLS can pass the nominal one
Rate = Annotated[float, Range(1e-6, 1e9)]
Microseconds = Annotated[float, Range(0.0, 1e9)]
Size = Annotated[float, Range(0.0, 1e9)]
Factor = Annotated[float, Range(1.0, 100.0)]
Ranks = Annotated[int, Range(2, 1_000_000)]

_T = TypeVar("_T")
_PEAK_OF: dict[str, str] = {
    "fp8_block": "fp8", "mxfp8": "fp8", "nvfp4": "fp4", "mxfp4": "fp4",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(Section):
    """One GPU, or whatever computes."""

    name: str
    gpus_per_node: Annotated[int, Range(1, 1_000_000)]  # processes that a launcher starts on one host
    memory_gib: Rate
    memory_bandwidth_gb_per_second: Rate
    peak_tflops: dict[PeakDtype, Rate]  # dense
    processors: Count = 0  # streaming multiprocessors; 0 where kernels are not modelled by waves
    sustained_share: Efficiency = 1.0  # of kernel-benchmark rates that a long run keeps (power, heat)

    @property
    def memory_bytes(self) -> float:
        """Memory as the driver reports it."""
        return self.memory_gib * GIB

    @property
    def memory_bandwidth(self) -> float:
        """Peak bytes a second."""
        return self.memory_bandwidth_gb_per_second * GB

    def peak_flops(self, precision: Precision) -> float:
        """Dense peak; an error where the profile has none for this precision, never another's."""
        return _entry(self.peak_tflops, _PEAK_OF.get(precision, precision), "device.peak_tflops") * 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOverhead(Section):
    """Memory that no tensor of the model takes."""

    context_gib: Size  # driver context and kernels
    communicator_gib: Size = 0.0  # of the communication library, for each kind of group a GPU belongs to
    workspace_gib: Size = 0.0  # of the matrix library, which the allocator counts
    reserved_share: Share = 0.0  # held by the allocator above what is allocated


@dataclass(frozen=True, slots=True, kw_only=True)
class Elementwise(Section):
    """Kernels bound by memory: norms, activations, casts, the optimizer."""

    bandwidth_efficiency: Efficiency
    floor_us: Microseconds
    half_mib: Size = 0.0  # size at which half the bandwidth is reached
    gelu_ns: Size = 0.0  # that an element's GELU takes beyond its bytes, where arithmetic is dear


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference(Section):
    """How much longer each takes while computation and communication overlap."""

    compute_factor: Factor
    communication_factor: Factor
    hidden_tp: Share = 0.0  # of tensor-parallel exchange, where it is overlapped with the products around it
    hidden_ep: Share = 0.0  # of the experts' exchange likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmCurve(Section):
    """Matrix products of one precision: a roofline, and beside it the times that only small products notice."""

    efficiency: Efficiency  # of peak, for large products
    bandwidth_efficiency: Efficiency  # of reads
    floor_us: Microseconds  # of the smallest product, with its cast
    m_half: Size = 0.0  # rows at which half the efficiency is reached: tiles and waves partly filled
    n_half: Size = 0.0  # columns likewise
    k_half: Size = 0.0  # inner size likewise: what a tile spends before and after its sum
    roofline_power: Size = 0.0  # p of (compute^p + memory^p)^(1/p); 0: the larger of the two
    write_factor: Factor = 1.0  # time of a byte written over that of a byte read
    k_step_ns: Size = 0.0  # per step along k, which one block of threads walks alone
    split_k: Size = 0.0  # k at which blocks that share the walk have halved it; 0: they never do
    cast_bytes: Size = 0.0  # moved per element of the activations, to quantise them
    cast_row_ns: Size = 0.0  # per row of the activations, to quantise it


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCurve(Section):
    """Fused attention over many queries, forward or backward: compute and memory time add up."""

    efficiency: Efficiency  # of peak, at head dim 128 and for long sequences
    bandwidth_efficiency: Efficiency
    floor_us: Microseconds
    flops_factor: Factor = 1.0  # of the forward's; backward about 2.5
    bytes_factor: Factor = 1.0  # of the forward's; backward about 2
    head_dim_half: Size = 0.0  # head dim at which half the efficiency of infinitely wide heads is reached
    wide_factor: Factor = 1.0  # compute time of heads wider than 256, whose tiles no longer fit on chip
    tail_share: Size = 0.0  # of the longest tile's time, spent while other processors are already idle
    key_padding: Size = 0.0  # tokens read beyond the end of each sequence's keys and values
    key_reads: Annotated[float, Range(0.1, 100.0)] = 1.0  # how often keys and values cross the memory bus
    sequence_head_us: Microseconds = 0.0  # per sequence and kv head
    throttle_share: Size = 0.0  # further compute time of kernels long enough to meet the power limit
    throttle_ms: Size = 0.0  # length at which half of it is seen


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCurve(Section):
    """Fused attention of a few queries over a cache: streaming it, or the work per sequence and kv head."""

    efficiency: Efficiency  # of peak; seldom the limit
    bandwidth_efficiency: Efficiency
    floor_us: Microseconds
    sequence_head_us: Microseconds = 0.0  # per sequence and kv head, whatever its length
    head_dim_us: Microseconds = 0.0  # further, at head dim 128, and in proportion to it
    query_share: Size = 0.0  # by which both grow with each query that shares a kv head
    stream_power: Annotated[float, Range(1.0, 100.0)] = 1.0  # p of (work^p + stream^p)^(1/p)
    idle_factor: Factor = 1.0  # streaming time, at most, where heads do not divide evenly among processors
    split_us: Microseconds = 0.0  # per e-fold of the cache's length, to split it and merge the parts
    split_tokens: Size = 1024.0  # length from which on it is split
    cached_share: Share = 0.0  # of streaming time saved while the keys and values fit the GPU's own cache,
    cached_mib: Size = 0.0  # ... which this many MiB half do; benchmarks that repeat a kernel see it
    scan_us: Microseconds = 0.0  # further work per sequence and kv head of kernels that scan all sequences
    scan_pair_us: Microseconds = 0.0  # ... and per further sequence of the batch
    scan_sequences: Count = 0  # batch from which on they no longer do; 0: they never do


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Fused attention of one precision, of the keys and values."""

    prefill: AttentionCurve
    backward: AttentionCurve
    decode: DecodeCurve
    wide_decode: DecodeCurve | None = None  # where heads wider than 256 run another kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareStack(Section):
    """What the host spends: a layer takes the longer of device and host time."""

    kernel_us: Microseconds  # per kernel launched
    layer_us: Microseconds = 0.0  # per layer and pass, beside its kernels
    expert_layer_us: Microseconds = 0.0  # further, per layer with experts
    collective_us: Microseconds = 0.0  # per collective
    step_us: Microseconds = 0.0  # per step
    attention_share: Efficiency = 1.0  # of the attention curves' rates, that this stack's kernels reach
    low_precision_share: Efficiency = 1.0  # of the rates of 8-bit and 4-bit products, likewise
    # where launches wait for the kernel before, and nothing overlaps: their cost over that of others; it adds up
    blocking: Size = 0.0


def bus_factor(kind: str, ranks: int) -> float:
    """Bytes that cross a rank's link per byte of the message, as nccl-tests define bus bandwidth."""
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
    return passes[kind] * (ranks - 1) / ranks if kind in passes else 1.0


def low_latency_channels(kind: str, ranks: int) -> int:
    """Channels of a rank that carry small messages side by side: one per peer in an all-to-all."""
    return ranks - 1 if kind == "all_to_all" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTable(Section):
    """One collective by group size: the cheaper of a low-latency and a bulk protocol.

    time = min(floor + x/share, (latency^p + x^p)^(1/p)) with x = bus_factor · bytes / bandwidth. A column holds
    a number for each group size, or one for all of them. Without low_latency_share there is the bulk one alone. An
    all-to-all has a low-latency channel per peer: its share counts (ranks − 1) times.
    """

    ranks: tuple[Ranks, ...]
    floor_us: tuple[Microseconds, ...]  # of the smallest message, low-latency protocol
    bandwidth_gb_per_second: tuple[Rate, ...]  # on the bus as nccl-tests count it, of the largest messages
    latency_us: tuple[Microseconds, ...] = ()  # of the bulk protocol; none: the floor
    low_latency_share: tuple[Share, ...] = ()  # of the bandwidth, that low-latency packets reach; none: no such
    power: Annotated[float, Range(0.1, 100.0)] = 1.0  # p: 1 start-up and transfer add up, ½ chunks are pipelined
    one_byte_share: tuple[Efficiency, ...] = ()  # of the bandwidth, for 8-bit elements; none: 1
    largest_mib: Size = 0.0  # messages above take another way; 0: no limit

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)):
            raise PlannerError(
                "group sizes rise", value=list(self.ranks), remedy="list each once, in order", key="ranks"
            )
        needed = ("floor_us", "bandwidth_gb_per_second")
        for key in (*needed, "latency_us", "low_latency_share", "one_byte_share"):
            column = getattr(self, key)
            if len(column) not in (1, len(self.ranks)) and (column or key in needed):
                raise PlannerError(
                    f"each column has as many numbers as ranks, {len(self.ranks)}, or one for all",
                    value=list(column),
                    remedy="give one number for each group size",
                    key=key,
                )
        if any(share <= 0.0 for share in self.low_latency_share):
            raise PlannerError(
                "a share of the bandwidth is above 0",
                value=list(self.low_latency_share),
                remedy="leave low_latency_share out where there is no such protocol",
                key="low_latency_share",
            )

    @property
    def largest_bytes(self) -> float:
        """Largest message this table speaks of."""
        return self.largest_mib * MIB or float("inf")

    @property
    def numbers_per_size(self) -> float:
        """Numbers that were fitted, per group size; neutral ones claim nothing."""
        columns = (self.floor_us, self.bandwidth_gb_per_second, self.latency_us, self.low_latency_share)
        shares = [share for share in self.one_byte_share if share != 1.0]
        count = sum(map(len, columns)) + len(shares) + (self.power != 1.0)
        return count / len(self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nics(Section):
    """Network cards: `count` of them serve `gpus` neighbouring GPUs, which share them evenly."""

    count: Annotated[int, Range(1, 1_000_000)]
    gpus: Annotated[int, Range(1, 1_000_000)]
    bandwidth_gb_per_second: Rate  # of one card, one direction
    efficiency: Efficiency = 1.0  # of that, which large collectives reach
    rails: bool = False  # the i-th card of every node meets at one switch

    @property
    def bandwidth(self) -> float:
        """Bytes a second that collectives get out of all cards together."""
        return self.count * self.bandwidth_gb_per_second * self.efficiency * GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Level(Section):
    """GPUs that reach one another through the same link: a pair, an NVLink domain, a rail, a spine."""

    link: str  # such as NVLink 4 or InfiniBand NDR
    gpus: Count = 0  # in one group of this level; 0, outermost only: as many as there are
    bandwidth_gb_per_second: Rate  # of one GPU to another that is no nearer than this level, one direction
    latency_us: Microseconds
    power: Annotated[float, Range(0.1, 100.0)] = 1.0  # p of (latency^p + transfer^p)^(1/p) of collectives
    oversubscription: Factor = 1.0  # bandwidth entering this level over bandwidth that can cross it
    nvls: bool = False  # switches reduce
    nics: Nics | None = None  # none: this level is reached without network cards
    collectives: dict[Collective, CollectiveTable] = field(default_factory=dict)
    custom_all_reduce: dict[Literal["eager", "graph"], CollectiveTable] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Bytes a second between two GPUs."""
        return self.bandwidth_gb_per_second * GB

    @property
    def latency_seconds(self) -> float:
        """Of the smallest message."""
        return self.latency_us * 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A kind of cluster. Levels stand innermost first; each divides the next."""

    name: str = "unnamed"
    device: Device
    memory: MemoryOverhead
    elementwise: Elementwise
    interference: Interference
    gemm: dict[Precision, GemmCurve]
    attention: dict[Precision, Attention] = field(default_factory=dict)
    software: dict[Stack, SoftwareStack]
    topology: dict[str, Level]
    environment: dict[str, str] = field(default_factory=dict)  # date and versions of a measured profile
    notes: str = ""

    @classmethod
    def from_dict(cls, data: Any, source: Source | None = None) -> HardwareProfile:
        """A profile from YAML data."""
        return decode(cls, data, source)

    def to_dict(self) -> dict[str, Any]:
        """YAML data without the neutral keys."""
        data: dict[str, Any] = encode(self, omit_defaults=True)
        return data

    def __post_init__(self) -> None:
        for key in ("gemm", "software", "topology"):
            if not getattr(self, key):
                raise PlannerError(
                    f"{key} has an entry", value=getattr(self, key), remedy=f"add one under {key}", key=key
                )
        inner = 1
        for position, (name, level) in enumerate(self.topology.items()):
            outermost = position == len(self.topology) - 1
            if (level.gpus or not outermost) and (level.gpus % inner or level.gpus <= inner):
                raise PlannerError(
                    f"levels stand innermost first, and each is a multiple of the one before, {inner} GPUs",
                    value=level.gpus,
                    remedy="mend gpus; only the outermost level may leave it out",
                    key=f"topology.{name}.gpus",
                )
            inner = level.gpus or inner
            if "." in name:
                raise PlannerError(
                    "names of levels have no dots: dotted keys lead to their numbers",
                    value=name,
                    remedy="rename it",
                    key="topology",
                )

    @property
    def largest_gpus(self) -> int:
        """GPUs that the topology describes; 0 where the outermost level has no bound."""
        return list(self.topology.values())[-1].gpus

    def require_gpus(self, gpus: int) -> None:
        """Refuse a cluster that the topology does not describe."""
        if self.largest_gpus and gpus > self.largest_gpus:
            raise PlannerError(
                f"{self.name} describes at most {self.largest_gpus} GPUs",
                value=gpus,
                remedy="use fewer GPUs, or add an outer level to the profile's topology",
                key="gpus",
            )

    def gemm_for(self, precision: Precision) -> GemmCurve:
        """Matrix products of a precision; an error where the profile has none, never another's."""
        return _entry(self.gemm, precision, "gemm")

    def attention_for(self, precision: Precision) -> Attention:
        """Fused attention of a precision."""
        return _entry(self.attention, precision, "attention")

    def software_for(self, stack: Stack) -> SoftwareStack:
        """What the host spends under a software stack."""
        return _entry(self.software, stack, "software")

    def numbers(self) -> tuple[Number, ...]:
        """Every number of the profile with its source."""
        return tuple(numbers_of(self))


def _entry(table: Mapping[Any, _T], key: str, where: str) -> _T:
    if key in table:
        return table[key]
    raise PlannerError(
        f"the profile says nothing about {key} under {where}",
        value=key,
        remedy=f"use one of {', '.join(table) or 'none'}, or add {where}.{key}",
        key=f"{where}.{key}",
    )
