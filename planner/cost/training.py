"""A training step: blocks, stages, the pipeline's schedule, data parallelism and the optimizer, put together.

The closed form here is what a search minimises; many layouts are priced at once. Layouts with the same stages
(pp, vpp, schedule) are grouped, everything else is a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import numpy as np

from planner.cost import data_parallel
from planner.cost.activations import Activations
from planner.cost.blocks import BlockPricer
from planner.cost.elementwise import elementwise_seconds, optimizer_bytes_per_parameter
from planner.cost.kernels import Sizes
from planner.cost.layouts import Floats, Ints, Layouts
from planner.cost.memory import MemoryCosts, rank_memory
from planner.cost.network import GroupAxis, MeshRows
from planner.cost.simulate import Timeline, simulate
from planner.cost.stages import StageCounts, stage_counts
from planner.cost.steps import OnceAStep, StageWork, Step, put_off, step
from planner.cost.times import PARTS, BlockCost, Times, add
from planner.cost.ways import Way
from planner.cost.weights import rank_weights, tied_parameters
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.orders import ONE_STAGE_A_RANK, orders
from planner.spec.strategy import Schedule, Strategy
from planner.spec.workload import TrainWorkload
from planner.units import FP32_BYTES

_PACKED = 4.0  # times that each byte is read or written around its exchange

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutCosts:
    """Time and memory of every layout."""

    parts: Times  # seconds of a step, [part, layout]
    device_bytes: Floats  # of the worst rank, as the device sees it

    @property
    def step_seconds(self) -> Floats:
        """Of a step."""
        return np.asarray(self.parts.sum(axis=0))


class TrainingCost:
    """Prices layouts of one model on one cluster for one workload."""

    def __init__(
        self, graph: Graph, profile: HardwareProfile, workload: TrainWorkload, ways: Iterable[Way] = ()
    ) -> None:
        self.graph, self.profile, self.workload = graph, profile, workload
        self.pricer = BlockPricer(graph, profile, workload, ways)
        self.tied = tied_parameters(graph)

    def costs(self, strategies: Sequence[Strategy], ways: Sequence[Way] | None = None) -> LayoutCosts:
        """Step time and memory of many layouts, with the ways that `alone` takes.

        None may leave its recomputation open.
        """
        layouts = Layouts.of(strategies, self.workload.global_batch)
        parts = np.zeros((len(PARTS), len(layouts)))
        device = np.zeros(len(layouts))
        blocks = self.pricer.costs(layouts)
        for rows, stages in self._stages(layouts, ways):
            shared = {name: block.take(rows) for name, block in blocks.items()}
            some = SharedStages(self, layouts.take(rows), stages, shared)
            parts[:, rows] = some.parts()
            device[rows] = some.memory().device.max(axis=0)
        return LayoutCosts(parts=parts, device_bytes=device)

    def alone(
        self, strategy: Strategy, layers: Sequence[int] | None = None, ways: Sequence[Way] | None = None
    ) -> SharedStages:
        """One layout by itself, optionally with the layers of each virtual stage and the way of each block given.

        Ways are among those that this was made for, one for each placement of the graph.
        """
        layouts = Layouts.of([strategy], self.workload.global_batch)
        stages = stage_counts(self.graph, strategy.pp, strategy.vpp, strategy.schedule, layers, ways)
        return SharedStages(self, layouts, stages)

    def _stages(self, layouts: Layouts, ways: Sequence[Way] | None) -> Iterator[tuple[Ints, StageCounts]]:
        keys = list(zip(layouts.pp.tolist(), layouts.vpp.tolist(), layouts.schedule.tolist(), strict=True))
        for key in dict.fromkeys(keys):
            rows = np.array([place for place, other in enumerate(keys) if other == key])
            yield rows, stage_counts(self.graph, *key, ways=ways)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """Seconds of every virtual stage with one microbatch, and what they are made of, [stage, layout]."""

    work: StageWork
    parts: Times  # of computation and its collectives, [stage, part, layout]
    gathering: Floats  # parameters and gradients exchanged with every block
    blocking: Floats  # messages that a rank waits for


def waited_for(schedule: Schedule, workload: TrainWorkload, sends: T, receives: T) -> tuple[T, T]:
    """Of a stage that does or does not send results and receive them: what its forward and its backward wait for.

    A message travels once both ranks are there. Megatron and torch's 1F1B send a result to the next rank as the
    gradient comes back from it, and likewise with the one before. torch's GPipe waits for what it receives alone.
    """
    if schedule == "gpipe" and workload.stack != "megatron":
        return receives, sends
    return sends, receives


class SharedStages:
    """Layouts that cut the model into the same stages."""

    def __init__(
        self,
        cost: TrainingCost,
        layouts: Layouts,
        stages: StageCounts,
        blocks: Mapping[str, BlockCost] | None = None,
        activations: Mapping[str, Activations] | None = None,
    ) -> None:
        self.cost, self.layouts, self.stages, self.activations = cost, layouts, stages, activations
        self.pricer, self.workload, self.profile = cost.pricer, cost.workload, cost.profile
        self.blocks: Mapping[str, BlockCost] = blocks or self.pricer.costs(layouts)
        self.weights = rank_weights(cost.pricer.kernels, cost.tied, layouts, stages)
        self.meshes = MeshRows(layouts, self.weights.copies)
        self.interference = self.profile.interference

    def parts(self) -> Times:
        """Seconds by part of the rank that sets the pace."""
        layouts, stages, work = self.layouts, self.stages, self._work
        taken = self.step()
        count = layouts.microbatches.astype(np.float64)
        pace, rows = taken.pace, np.arange(len(layouts))
        parts = np.zeros((len(PARTS), len(layouts)))
        parts += stages.rank_sums(work.parts)[pace, :, rows].T * count
        add(parts, "dp", stages.rank_sums(work.gathering)[pace, rows] * count)
        add(parts, "pp", stages.rank_sums(work.blocking)[pace, rows] * count)
        add(parts, "bubble", np.maximum(taken.pipeline - parts.sum(axis=0), 0.0))
        add(parts, "dp", taken.exposed)
        add(parts, "optimizer", taken.optimizer)
        add(parts, "host", self.pricer.software.step_us * 1e-6)
        return parts

    def step(self) -> Step:
        """Seconds of the flush, of exposed exchanges and of the optimizer."""
        return step(
            self.schedule,
            self.work,
            self.once_a_step(),
            rank_of=self.stages.rank_of,
            microbatches=self.layouts.microbatches,
            pp=self.stages.pp,
            vpp=self.stages.vpp,
        )

    def timeline(self, row: int = 0) -> Timeline:
        """The pipeline of one layout, event by event."""
        work = self.work
        weight = put_off(self.schedule, work)
        return simulate(
            orders(self.schedule, self.stages.pp, self.stages.vpp, int(self.layouts.microbatches[row])),
            work.ahead[:, row].tolist(),
            work.back[:, row].tolist(),
            None if weight is None else weight[:, row].tolist(),
            hop_seconds=float(work.hop[row]),
        )

    @property
    def schedule(self) -> Schedule:
        """Of all the layouts."""
        word: Schedule = cast("Schedule", str(self.layouts.schedule[0]))
        return word

    @cached_property
    def _work(self) -> _Work:
        """What every virtual stage does with a microbatch."""
        forward = self._of_blocks(lambda block: block.forward)
        backward = self._of_blocks(lambda block: block.backward)
        again = self._of_blocks(lambda block: block.recompute)
        weight = self._of_blocks(lambda block: block.weight_seconds)
        gathering = self._gathering()  # [forward | backward, stage, layout]
        hop = self._hop_seconds()
        # torch sends and receives on the side where a rank has several stages
        together = self.workload.stack == "megatron" or self.schedule in ONE_STAGE_A_RANK
        waits = ~self.layouts.overlap_pp & together
        blocking = self._blocking(np.where(waits, hop, 0.0))
        return _Work(
            work=StageWork(
                ahead=forward.sum(axis=1) + gathering[0] + blocking[0],
                back=backward.sum(axis=1) + again.sum(axis=1) + gathering[1] + blocking[1],
                weight=weight,
                hop=np.where(waits, 0.0, hop),
            ),
            parts=forward + backward + again,
            gathering=gathering.sum(axis=0),
            blocking=blocking.sum(axis=0),
        )

    def _blocking(self, hop: Floats) -> Floats:
        """What waiting for messages adds to a stage's forward and backward: one hop, for two go side by side."""
        around = waited_for(self.schedule, self.workload, self.stages.sends, self.stages.receives)
        return np.asarray(np.stack(around).astype(np.float64)[:, :, None] * hop)

    @property
    def work(self) -> StageWork:
        """What every virtual stage does with a microbatch."""
        return self._work.work

    def busy_seconds(self) -> Floats:
        """What each pipeline rank computes and exchanges for one microbatch, [rank, layout]."""
        stages = self.stages
        work = np.stack(
            [self.blocks[name].forward_seconds + self.blocks[name].backward_seconds for name in stages.blocks]
        )
        return stages.rank_sums(stages.sums(work))

    def memory(self) -> MemoryCosts:
        """Bytes by part of every pipeline rank."""
        return rank_memory(self.pricer, self.layouts, self.stages, self.weights, self.activations)

    def _of_blocks(self, of: Callable[[BlockCost], Floats]) -> Floats:
        return self.stages.sums(np.stack([of(self.blocks[name]) for name in self.stages.blocks]))

    def _hop_seconds(self) -> Floats:
        """One stage's result to the next one."""
        if self.layouts.pp[0] == 1:
            return np.zeros(len(self.layouts))
        sent = self.sent_bytes()
        network = self.pricer.network
        if self.workload.stack == "megatron":  # each rank sends its share, the receivers gather them
            gathered = network.seconds("all_gather", "tp", self.meshes, sent)
            shared = network.seconds("p2p", "stages", self.meshes, sent / self.layouts.tp)
            return shared + np.where(self.layouts.sp, 0.0, gathered)
        return network.seconds("p2p", "stages", self.meshes, sent / self.layouts.whole_shards)

    def sent_bytes(self) -> Floats:
        """A microbatch's result of a stage, whole."""
        last = self.cost.graph.sequence[-2 if len(self.cost.graph.sequence) > 1 else -1].block
        kernels = next(item for item in self.pricer.kernels.values() if item.way.block == last)
        sizes = Sizes(self.layouts, self.workload.seq_len, self.pricer.widths)
        made = {tensor.name: tensor for operator in kernels.block.operators for tensor in operator.outputs}
        sent = sum((sizes.bytes(made[name]) for name in kernels.block.outputs if name in made), np.zeros(1))
        return np.asarray(sent)

    def _gathering(self) -> Floats:
        """What gathered parameters and scattered gradients add to each stage's forward and backward."""
        layouts = self.layouts
        by_block = data_parallel.with_every_block(layouts, self.workload)
        result = np.zeros((2, len(self.stages.rank_of), len(layouts)))
        if not np.any(by_block & ((layouts.dp * layouts.cp > 1) | (layouts.expert_dp > 1))):
            return result
        slow, slower = self.interference.compute_factor, self.interference.communication_factor
        overlapped = data_parallel.overlaps(layouts, self.pricer.software)
        added = []
        for name in self.stages.blocks:
            block, weights = self.blocks[name], self.weights.blocks[name]
            moved = data_parallel.exchange(
                self.pricer.network, self.meshes, layouts, weights.dense, width=self.pricer.width
            )
            routed = data_parallel.exchange(
                self.pricer.network, self.meshes, layouts, weights.experts, width=self.pricer.width, experts=True
            )
            gather, reduce = moved.gather + routed.gather, moved.reduce + routed.reduce
            copies = self._copies(weights.dense + weights.experts)
            once = 1.0 / layouts.microbatches
            gathers = np.where(layouts.zero == 3, 1.0, once)  # for each microbatch, as the next two
            gathers_again = np.where((layouts.zero == 3) & self.pricer.kernels[name].layer, 1.0, 0.0)
            reduces = np.where(layouts.zero == 1, once, 1.0)
            pairs = (
                (block.forward_seconds, gather * gathers, copies.values * gathers),
                (
                    block.backward_seconds,
                    gather * gathers_again + reduce * reduces,
                    copies.values * gathers_again + copies.gradients * reduces,
                ),
            )
            shown = [
                np.where(overlapped, data_parallel.beside(work, moving, slow, slower) - work, moving) + copying
                for work, moving, copying in pairs
            ]
            added.append([np.where(by_block, seconds, 0.0) for seconds in shown])
        stacked: Floats = np.array(added)  # [block, 2, layout]
        summed = self.stages.sums(stacked)  # [stage, 2, layout]
        return np.moveaxis(summed, 1, 0)

    def once_a_step(self) -> OnceAStep:
        """Gradients and parameters that cross the network once, and the optimizer of each rank."""
        layouts, weights, network = self.layouts, self.weights, self.pricer.network
        apart = ~data_parallel.with_every_block(layouts, self.workload)
        width = self.pricer.width
        moved = data_parallel.exchange(network, self.meshes, layouts, weights.dense, width=width)
        routed = data_parallel.exchange(network, self.meshes, layouts, weights.experts, width=width, experts=True)
        copies = self._copies(weights.dense + weights.experts)
        last = data_parallel.last_share(
            layouts, weights.dense + weights.experts, weights.largest_block, self.workload
        )
        return OnceAStep(
            reduce=np.where(apart, moved.reduce + routed.reduce, 0.0),
            gather=np.where(apart, moved.gather + routed.gather, 0.0),
            last=last,
            alone=np.where(apart, copies.gradients + copies.values, 0.0) + self._parts_seconds(),
            optimizer=self._optimizer_seconds(),
            overlapped=data_parallel.overlaps(layouts, self.pricer.software),
        )

    def _parts_seconds(self) -> Floats:
        """Gradients of which each tensor-parallel rank has a part, packed, summed and unpacked in fp32.

        Those of copies of a head are summed apart, by the ranks that keep them.
        """
        return self._summed_seconds("tp", self.weights.parts) + self._summed_seconds(
            "same_head", self.weights.copied
        )

    def _summed_seconds(self, axis: GroupAxis, elements: Floats) -> Floats:
        bytes_ = elements / np.maximum(self.layouts.dp_shard, 1) * FP32_BYTES
        packing = elementwise_seconds(self.profile.device, self.profile.elementwise, _PACKED * bytes_, kernels=0)
        sending = self.pricer.network.seconds("all_reduce", axis, self.meshes, bytes_)
        return np.asarray(np.where(bytes_ > 0, packing + sending, 0.0))

    def _copies(self, parameters: Floats) -> data_parallel.Copies:
        """Seconds for gradients and values of so many parameters."""
        experts = bool(self.weights.experts.any())
        moved = data_parallel.copies(
            self.layouts, self.workload, parameters, width=self.pricer.width, experts=experts
        )
        device, curve = self.profile.device, self.profile.elementwise
        return data_parallel.Copies(
            gradients=np.asarray(elementwise_seconds(device, curve, moved.gradients, kernels=0)),
            values=np.asarray(elementwise_seconds(device, curve, moved.values, kernels=0)),
        )

    def _optimizer_seconds(self) -> Floats:
        """Every weight, moment and gradient that a rank keeps, and the norm for clipping."""
        layouts = self.layouts
        dense = self.weights.dense / np.maximum(layouts.dp_shard, 1)
        copies = np.where(layouts.zero > 0, np.maximum(layouts.expert_dp // layouts.dp_replicate, 1), 1)
        each = optimizer_bytes_per_parameter(self.workload.optimizer, self.pricer.width)
        moved = (dense + self.weights.experts / copies) * (each + layouts.gradient_bytes)
        return np.asarray(elementwise_seconds(self.profile.device, self.profile.elementwise, moved))
