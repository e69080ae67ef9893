"""What a user should know of a layout beside its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from planner.cost.network import group_ranks
from planner.cost.training import SharedStages
from planner.cost.uncertainty import source_shares, uncertainty
from planner.spec.estimate import StepTime
from planner.spec.legality import padded_vocab
from planner.spec.strategy import Strategy
from planner.units import GIB

_BUBBLE = 0.15  # of the step, above which more microbatches or virtual stages pay
_UNEVEN = 1.15  # the slowest stage over the mean one
_HEAD = 0.25  # of the last stage, above which the vocabulary's head is named as what makes it slow
_EXPOSED = 0.20  # of the step, in one kind of communication
_HOST = 0.10  # of the step
_ASSUMED = 0.5  # of the step
_MARGIN = 0.10  # of the memory
_PADDED = 0.01  # of the vocabulary
_GRAVEST = 2.0  # an order of its own: above any share of the step


def training_warnings(shared: SharedStages, strategy: Strategy, step: StepTime) -> tuple[str, ...]:
    """Sentences, the gravest first."""
    of = _Findings(shared, strategy, step)
    weighed = [
        *of.memory(),
        *of.tensor_parallel(),
        *of.pipeline(),
        *of.exposed(),
        *of.host(),
        *of.rests_on(),
        *of.shapes(),
        *of.nodes(),
    ]
    return tuple(found.text for found in sorted(weighed, key=lambda found: -found.gravity))


class Finding(NamedTuple):
    """A sentence and how grave it is: a share of the step where it costs time."""

    gravity: float
    text: str


class _Findings:
    def __init__(self, shared: SharedStages, strategy: Strategy, step: StepTime) -> None:
        self.shared, self.strategy, self.step = shared, strategy, step
        self.profile, self.workload, self.graph = shared.profile, shared.workload, shared.cost.graph
        self.total = step.total_seconds

    def memory(self) -> Iterator[Finding]:
        """Little room above the upper end."""
        capacity = self.profile.device.memory_bytes
        device = float(self.shared.memory().device.max())
        known = uncertainty(self.graph, self.profile, self.workload, self.strategy, self.step, device)
        high = known.memory_bytes.high
        if capacity * (1.0 - _MARGIN) < high <= capacity:
            yield Finding(
                _GRAVEST,
                f"memory may come within {(capacity - high) / GIB:.1f} GiB of the GPU's {capacity / GIB:.1f}: "
                f"longer sequences, uneven batches or a second process can exceed it",
            )

    def tensor_parallel(self) -> Iterator[Finding]:
        """Across network cards, or exposed; heads held twice; what is whole without sequence parallelism."""
        tp, share = self.strategy.tp, self.step.tp_seconds / self.total
        if tp == 1:
            return
        ranks = group_ranks("tp", self.shared.meshes.meshes[0])
        if self.shared.pricer.network.leaves_node(ranks):
            yield Finding(
                1.0 + share,
                f"tensor parallelism of {tp} crosses network cards, and its exchange takes {_percent(share)} of "
                f"the step: keep it within a node, innermost in the order",
            )
        elif share > _EXPOSED:
            hidden = "" if self.strategy.overlap.tp else ", or overlap it with the products (overlap tp)"
            yield Finding(
                share,
                f"the exchange of tensor parallelism is exposed for {_percent(share)} of the step: a smaller "
                f"tp with more pp, cp or zero{hidden}",
            )
        heads = min((kv for kv in self._kv_heads()), default=tp)
        if tp > heads:
            yield Finding(
                0.01,
                f"tp {tp} is more than the {heads} kv heads: each is computed and kept on {tp // heads} ranks",
            )
        divides = self.workload.seq_len % (tp * self.strategy.cp) == 0
        if not self.strategy.sp and divides:
            yield Finding(
                0.02,
                f"sequence parallelism is off: each of the {tp} tensor-parallel ranks computes and keeps norms, "
                f"residuals and their activations whole (sp)",
            )

    def pipeline(self) -> Iterator[Finding]:
        """Waiting for other stages, and stages that make others wait."""
        s, share = self.strategy, self.step.bubble_seconds / self.total
        if s.pp == 1:
            return
        if share > _BUBBLE:
            count = int(self.shared.layouts.microbatches[0])
            ways = ["a larger global batch"]
            ways += ["a smaller microbatch"] if s.microbatch > 1 else []
            ways += ["virtual stages (vpp)"] if s.vpp == 1 else []
            yield Finding(
                share,
                f"stages wait for each other for {_percent(share)} of the step, with "
                f"{_counted(count, 'microbatch')} for {s.pp} stages: {' or '.join(ways)} would help",
            )
        busy = self.shared.busy_seconds()[:, 0]
        slowest, excess = int(np.argmax(busy)), float(busy.max() / busy.mean())
        if excess > _UNEVEN:
            yield Finding(
                1.0 - 1.0 / excess,
                f"stage {slowest} of {s.pp} takes {excess:.2f} times the mean of all{self._why(slowest, busy)}",
            )

    def exposed(self) -> Iterator[Finding]:
        """Communication that computation does not hide."""
        ways = {
            "dp": ("gradients and parameters between replicas are", "a larger global batch", "dp"),
            "ep": ("the exchange of tokens between experts is", "ep within a node", "ep"),
            "cp": ("the exchange of context parallelism is", "a smaller cp", ""),
            "pp": ("sending between stages is", "fewer or larger microbatches", "pp"),
        }
        for axis, (what, way, overlap) in ways.items():
            share = getattr(self.step, f"{axis}_seconds") / self.total
            if share > _EXPOSED:
                hidden = f", or overlap {axis}" if overlap and not getattr(self.strategy.overlap, axis) else ""
                yield Finding(share, f"{what} exposed for {_percent(share)} of the step: {way}{hidden} helps")

    def host(self) -> Iterator[Finding]:
        """Kernels so small that launching them takes longer."""
        share = self.step.host_seconds / self.total
        if share > _HOST:
            ways = ["a larger microbatch"]
            ways += ["less tensor parallelism"] if self.strategy.tp > 1 else []
            ways += ["stack compiled"] if self.workload.stack == "eager" else []
            yield Finding(
                share,
                f"GPUs wait {_percent(share)} of the step for the host to launch kernels: {' or '.join(ways)} "
                f"helps",
            )

    def rests_on(self) -> Iterator[Finding]:
        """Numbers that nobody measured."""
        assumed = source_shares(self.profile, self.workload, self.strategy, self.step).assumed
        if assumed > _ASSUMED:
            yield Finding(
                1.0,
                f"{_percent(assumed)} of the step rests on assumed numbers: tp-plan profile measures them",
            )

    def shapes(self) -> Iterator[Finding]:
        """Rows that pad the vocabulary."""
        tp = self.strategy.tp
        rows = max(self._vocabularies(), default=0)
        if rows and padded_vocab(rows, tp) > (1.0 + _PADDED) * rows:
            padded = padded_vocab(rows, tp)
            yield Finding(
                0.03,
                f"the vocabulary of {rows:,} is padded to {padded:,} for tp {tp}: {_percent(padded / rows - 1)} "
                f"more of its embedding and head",
            )

    def nodes(self) -> Iterator[Finding]:
        """A last node that is not full."""
        held, gpus = self.profile.device.gpus_per_node, self.strategy.gpus
        if gpus > held and gpus % held:
            yield Finding(
                0.05,
                f"{gpus} GPUs fill {_counted(gpus // held, 'node')} of {held} and {gpus % held} of another: its "
                f"other {held - gpus % held} stay idle",
            )

    def _why(self, rank: int, busy: np.ndarray) -> str:
        """What makes a stage the slowest: the vocabulary's head, or its layers."""
        stages, last = self.shared.stages, self.shared.stages.blocks[-1]
        if stages.holds(rank, last) and not self.shared.pricer.kernels[last].layer:
            head = self.shared.blocks[last]
            share = float(head.forward_seconds[0] + head.backward_seconds[0]) / float(busy[rank])
            if share > _HEAD:
                return f": the vocabulary's head is {_percent(share)} of it, and wants fewer layers beside it"
        kernels = self.shared.pricer.kernels
        layer = np.array([[1 if kernels[name].layer else 0] for name in stages.blocks])
        held = stages.rank_sums(stages.sums(layer))[:, 0].astype(int)
        if held[rank] > held.min():
            return f": it has {held[rank]} layers, others {held.min()}; a pp that divides them evens it out"
        return ": fewer layers there would even it out"

    def _kv_heads(self) -> Iterator[int]:
        for block in self.graph.blocks.values():
            for operator in block.operators:
                if operator.kind == "attention":
                    yield int(operator.dims["kv_heads"].at(1, self.workload.seq_len))

    def _vocabularies(self) -> Iterator[int]:
        for kernels in self.shared.pricer.kernels.values():
            for operator in kernels.block.operators:
                if kernels.splits[operator.name].split == "vocab":
                    yield from (kernels.block.parameter(path).shape[0] for path in operator.parameters)


def _percent(share: float) -> str:
    return f"{100.0 * share:.0f} %"


def _counted(number: int, what: str) -> str:
    """`1 node`, `2 nodes`, `3 microbatches`."""
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("ch") else "s")
