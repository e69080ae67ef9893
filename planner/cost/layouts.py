"""Strategies as columns of arrays, so that thousands of them are priced at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.spec.strategy import Strategy
from planner.units import bytes_per_element

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Words = NDArray[np.str_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """The keys of many strategies, a column each."""

    tp: Ints
    pp: Ints
    dp: Ints
    cp: Ints
    ep: Ints
    etp: Ints
    vpp: Ints
    microbatch: Ints
    zero: Ints
    dp_replicate: Ints
    sp: Bools
    recompute: Words
    schedule: Words
    order: Words
    overlap_tp: Bools
    overlap_dp: Bools
    overlap_ep: Bools
    overlap_pp: Bools
    gradient_bytes: Floats  # of one gradient
    microbatches: Ints

    @classmethod
    def of(cls, strategies: Sequence[Strategy], global_batch: int) -> Layouts:
        """The columns of strategies that share a workload."""

        def whole(name: str) -> Ints:
            return np.array([getattr(item, name) for item in strategies], dtype=np.int64)

        def word(name: str) -> Words:
            return np.array([getattr(item, name) for item in strategies], dtype=np.str_)

        def overlap(name: str) -> Bools:
            return np.array([getattr(item.overlap, name) for item in strategies], dtype=np.bool_)

        return cls(
            tp=whole("tp"), pp=whole("pp"), dp=whole("dp"), cp=whole("cp"), ep=whole("ep"), etp=whole("etp"),
            vpp=whole("vpp"), microbatch=whole("microbatch"), zero=whole("zero"),
            dp_replicate=whole("dp_replicate"), recompute=word("recompute"), schedule=word("schedule"),
            order=word("order"), overlap_tp=overlap("tp"), overlap_dp=overlap("dp"), overlap_ep=overlap("ep"),
            overlap_pp=overlap("pp"),
            sp=np.array([item.sp and item.tp > 1 for item in strategies], dtype=np.bool_),
            gradient_bytes=np.array([bytes_per_element(item.grad_dtype) for item in strategies]),
            microbatches=np.array([item.microbatches(global_batch) for item in strategies], dtype=np.int64),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, rows: Any) -> Layouts:
        """Some of the rows: a mask or their numbers."""
        return Layouts(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})

    @property
    def gpus(self) -> Ints:
        """GPUs that each takes."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def whole_shards(self) -> Ints:
        """Ranks that share what tensor parallelism leaves whole: tp under sequence parallelism, else 1."""
        return np.where(self.sp, self.tp, 1)

    @property
    def dp_shard(self) -> Ints:
        """Ranks that sharded state is spread over, context parallel ones among them."""
        return np.where(self.zero > 0, self.dp // self.dp_replicate * self.cp, 1)

    @property
    def expert_dp(self) -> Ints:
        """Data-parallel ranks of one expert's weights."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)
