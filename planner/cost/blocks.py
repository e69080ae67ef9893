"""What one block costs a rank, forward, backward and again for recomputation, under many layouts at once.

Products and attention are priced on their sharded shapes by the measured curves, the rest by the bytes its
kernels move; what tensor parallelism leaves whole is cut along the sequence under sequence parallelism. The
collectives of tensor, context and expert parallelism follow from the splits. Host and device work side by side:
where issuing the kernels takes longer than running them, the difference is host time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from planner.cost import attention as attention_cost
from planner.cost.data_parallel import beside
from planner.cost.elementwise import elementwise_seconds, host_seconds, host_waiting
from planner.cost.exchanges import BlockExchanges, Exchange
from planner.cost.fusion import Pass
from planner.cost.gemm import gemm_seconds, grouped_gemm_seconds
from planner.cost.kernels import LOW_PRECISIONS, Kernels, Share, Sizes, base_precision, kernels_of
from planner.cost.layouts import Floats, Layouts
from planner.cost.network import MeshRows, Network
from planner.cost.times import PARTS, BlockCost, BlockPasses, Times, add
from planner.cost.ways import Way, in_model_order, usual_ways
from planner.spec.graph import Graph, Operator
from planner.spec.hardware import GemmCurve, HardwareProfile
from planner.spec.sizes import Dim, Tensor
from planner.spec.strategy import Recompute
from planner.spec.workload import Precision, TrainWorkload
from planner.units import FP32_BYTES, bytes_per_element

_BACKWARD_PASSES = 2.0  # a product's backward is two products
_QUANTISED_BYTES = 1.0
_WEIGHT_SUM_BYTES = FP32_BYTES  # gradients that the product's own kernel adds to fp32 sums


class BlockPricer:
    """Prices blocks of one graph on one cluster for one workload."""

    def __init__(
        self, graph: Graph, profile: HardwareProfile, workload: TrainWorkload, ways: Iterable[Way] = ()
    ) -> None:
        self.graph, self.profile, self.workload = graph, profile, workload
        self.ways = in_model_order(graph, ways or usual_ways(graph))
        self.kernels = kernels_of(graph, workload, self.ways)
        self.network = Network(profile)
        self.base = base_precision(workload.precision)
        self.width = bytes_per_element(self.base)
        self.widths: dict[str, float] = {graph.dtype: self.width}
        self.software = profile.software_for(workload.stack)
        self.fused_siblings = workload.stack == "megatron"

    def costs(self, layouts: Layouts) -> dict[str, BlockCost]:
        """Every way of every block under every layout."""
        sizes = Sizes(layouts, self.workload.seq_len, self.widths)
        meshes = MeshRows(layouts)
        passes: dict[Way, BlockPasses] = {}
        for kernels in self.kernels.values():
            plain = replace(kernels.way, recompute=None)
            if plain not in passes:
                passes[plain] = _BlockCosting(self, kernels, layouts, sizes, meshes).passes()
        return {
            name: passes[replace(kernels.way, recompute=None)].cost(kernels.recomputed(layouts))
            for name, kernels in self.kernels.items()
        }


class _BlockCosting:
    """One block under many layouts."""

    def __init__(
        self, pricer: BlockPricer, kernels: Kernels, layouts: Layouts, sizes: Sizes, meshes: MeshRows
    ) -> None:
        self.pricer, self.kernels, self.layouts, self.sizes, self.meshes = pricer, kernels, layouts, sizes, meshes
        self.tp = layouts.tp.astype(np.float64)
        self.whole = layouts.whole_shards.astype(np.float64)
        self.sustained = pricer.profile.device.sustained_share
        self.exchanges = BlockExchanges(kernels, layouts, sizes, pricer.workload.stack)

    def passes(self) -> BlockPasses:
        forward, backward = self._zeros(), self._zeros()
        core_again, products_again = self._zeros(), self._zeros()
        launches = np.zeros(2)
        weight_seconds = np.zeros(len(self.layouts))
        for place, products in enumerate(self._products()):
            ahead, back, of_weights = self._product_seconds(products)
            add(forward, "matmul", ahead)
            add(backward, "matmul", back + of_weights)
            weight_seconds = weight_seconds + of_weights
            if not products[0].parameters:
                add(core_again, "recompute", ahead)
            elif place % 2:
                add(products_again, "recompute", ahead)
            launches += (1, max(item.backward_products for item in products))
        for operator in self._operators("attention"):
            ahead, back = self._attention_seconds(operator)
            add(forward, "attention", ahead)
            add(backward, "attention", back)
            add(core_again, "recompute", ahead)
            launches += (1, 2)
        for item in self.kernels.passes:
            if self._is_cast_of_loss(item):
                continue
            ahead, back = self._pass_seconds(item)
            add(forward, "elementwise", ahead)
            add(backward, "elementwise", back)
            scores = any(operator.kind in ("softmax", "dropout") for operator in item.operators)
            if scores and self._share(item.writes[0]) == "cut":
                add(core_again, "recompute", ahead)
            add(products_again, "recompute", ahead)
            launches += (item.launches, item.launches * (item.needs_grad and item.backward_moves))
        add(backward, "elementwise", self._accumulation_seconds())
        selective = core_again if self.pricer.workload.stack == "megatron" else products_again
        again: dict[Recompute, Times] = {"selective": selective, "full": self._zeros()}
        add(again["full"], "recompute", forward.sum(axis=0))
        calls = self._communication(forward, backward, again)
        self._host(forward, launches[0], calls)
        self._host(backward, launches[1], calls, passes=_BACKWARD_PASSES)
        self._host(again["full"], launches[0], calls)
        return BlockPasses(forward=forward, backward=backward, again=again, weight_seconds=weight_seconds)

    # products and attention

    def _products(self) -> Iterable[list[Operator]]:
        """Products, those that one kernel computes together."""
        siblings: dict[Any, list[Operator]] = {}
        for operator in self.kernels.block.operators:
            if operator.kind not in ("matmul", "grouped_matmul", "convolution"):
                continue
            alone: Any = operator.name
            if self.pricer.fused_siblings and operator.parameters and operator.kind != "convolution":
                split = self.kernels.splits[operator.name].split
                alone = (operator.kind, split, operator.inputs[0].name)
            siblings.setdefault(alone, []).append(operator)
        return siblings.values()

    def _product_seconds(self, operators: list[Operator]) -> tuple[Any, Any, Any]:
        """Forward, the input's gradient, the weights' gradient."""
        first = operators[0]
        dims, split = first.dims, self.kernels.splits[first.name].split
        weighted = bool(first.parameters)
        batch = self.sizes.dim(dims["batch"])
        m = self.sizes.dim(dims["m"])
        n = sum(
            self.sizes.dim(item.dims["n"], keys=not weighted) * self.kernels.copies(item.name, self.tp)
            for item in operators
        )
        k = self.sizes.dim(dims["k"], keys=not weighted)
        if first.kind == "grouped_matmul":
            return self._grouped_seconds(first, m, n, k)
        if split in ("column", "vocab"):
            n = n / self.tp
        elif split == "row":
            k = k / self.tp
        elif split == "heads":
            batch = batch / self.tp
        else:
            m = m / (self.tp if first.name in self.kernels.own else self.whole)
        precision = self._precision(first)
        ahead = self._gemm(precision, m, n, k, batch) + self._cast_seconds(precision, m * k)
        back: Any = self._cast_seconds(precision, m * n)
        if any(item.backward_products > 1 for item in operators):
            back = back + self._gemm(precision, m, k, n, batch)
        of_weights: Any = 0.0
        if first.backward_products > 0:
            of_weights = self._gemm(precision, n, k, m, batch)
        if weighted and first.backward_products > 0:
            of_weights = of_weights + self._weight_sum_seconds(n * k)
        return ahead, back, of_weights

    def _grouped_seconds(self, operator: Operator, m: Floats, n: Any, k: Floats) -> tuple[Any, Any, Any]:
        layouts, etp = self.layouts, self.layouts.etp
        experts = self.sizes.dim(operator.dims["experts"]) / layouts.ep
        rows = m / self.tp * etp
        into = self._share(operator.inputs[0]) == "routed"
        n, k = (n, k / etp) if into else (n / etp, k)
        precision = self._precision(operator)
        imbalance = np.where(layouts.ep > 1, self.pricer.workload.imbalance, 1.0)

        def grouped(rows: Any, n: Any, k: Any) -> Any:
            return self._grouped(precision, rows, n, k, experts, imbalance)

        each = rows * imbalance / experts
        of_weights = self._gemm(precision, n, k, each, experts) + self._weight_sum_seconds(n * k * experts)
        back = grouped(rows, k, n) + self._cast_seconds(precision, rows * n)
        return grouped(rows, n, k) + self._cast_seconds(precision, rows * k), back, of_weights

    def _grouped(self, precision: Precision, rows: Any, n: Any, k: Any, experts: Any, imbalance: Any) -> Any:
        profile = self.pricer.profile
        return grouped_gemm_seconds(
            profile.device, self._curve(precision), precision, rows, n, k, experts=experts, imbalance=imbalance
        ) / self._rate(precision)

    def _gemm(self, precision: Precision, m: Any, n: Any, k: Any, batch: Any) -> Any:
        profile = self.pricer.profile
        curve = self._curve(precision)
        return gemm_seconds(profile.device, curve, precision, m, n, k, batch=batch) / self._rate(precision)

    def _rate(self, precision: Precision) -> float:
        """Of kernel-benchmark rates, what a training step keeps."""
        return self.sustained * (self.pricer.software.low_precision_share if precision in LOW_PRECISIONS else 1.0)

    def _curve(self, precision: Precision) -> GemmCurve:
        """A product of operands that are already quantised."""
        return replace(self.pricer.profile.gemm_for(precision), cast_bytes=0.0, cast_row_ns=0.0)

    def _cast_seconds(self, precision: Precision, elements: Any) -> Any:
        """Quantising an operand once for two products, along its rows and along its columns."""
        if precision not in LOW_PRECISIONS:
            return 0.0
        return self._elementwise(elements * (self.pricer.width + 2 * _QUANTISED_BYTES), 1)

    def _precision(self, product: Operator) -> Precision:
        low = product.name in self.kernels.low_precision
        return self.pricer.workload.precision if low else self.pricer.base

    def _weight_sum_seconds(self, weights: Any) -> Any:
        """Adding a microbatch's weight gradients to those before; Megatron's kernel does so as it writes."""
        profile, stack = self.pricer.profile, self.pricer.workload.stack
        rate = profile.device.memory_bandwidth * profile.elementwise.bandwidth_efficiency
        if stack == "megatron":
            moved = 2 * _WEIGHT_SUM_BYTES - self.pricer.width
            return weights * moved / rate
        later = 1.0 - 1.0 / np.maximum(self.layouts.microbatches, 1)
        summed = np.where(self.layouts.zero < 2, later, 0.0)
        return summed * weights * 3 * self.pricer.width / rate

    def _attention_seconds(self, operator: Operator) -> tuple[Any, Any]:
        profile = self.pricer.profile
        curves = profile.attention_for(self.pricer.base)
        cut = self.kernels.splits[operator.name].is_cut
        share = (self.tp if cut else 1.0) * self.layouts.cp  # each rank has its queries of every head
        sizes = {key: self.sizes.dim(operator.dims[key], keys=True) for key in operator.dims}
        given: dict[str, Any] = {
            "batch": sizes["batch"], "query_len": sizes["queries"], "kv_len": sizes["keys"],
            "heads": sizes["heads"] / share,
            "kv_heads": np.maximum(sizes["kv_heads"] / share, 1.0 / self.layouts.cp),
            "head_dim": sizes["head_dim"], "value_dim": sizes["value_dim"], "causal": operator.causal,
            "window": operator.window,
        }  # fmt: skip
        ahead = attention_cost.prefill_seconds(profile.device, curves.prefill, self.pricer.base, **given)
        back = attention_cost.backward_seconds(profile.device, curves.backward, self.pricer.base, **given)
        rate = self.sustained * self.pricer.software.attention_share
        return ahead / rate, back / rate * operator.needs_grad

    # kernels that memory bounds

    def _is_cast_of_loss(self, item: Pass) -> bool:
        """A loss that works in place casts its logits itself."""
        if self.kernels.loss != "in place" or any(op.kind != "copy" for op in item.operators):
            return False
        losses = self._operators("loss")
        read = {tensor.name for operator in losses for tensor in operator.inputs}
        return bool(losses) and all(tensor.name in read for tensor in item.writes)

    def _loss_seconds(self, loss: Operator) -> tuple[Any, Any]:
        """Largest logit, copy to fp32, difference, exponential, sum, quotient; product and cast in backward."""
        share = self.tp if self._share(loss.inputs[0]) == "cut" else self.whole
        logits = self.sizes.elements(loss.inputs[0]) / share
        width = self.pricer.width
        ahead = logits * (2 * width + FP32_BYTES + 3 * 2 * FP32_BYTES + FP32_BYTES)
        return self._elementwise(ahead, 6), self._elementwise(logits * (3 * FP32_BYTES + width), 2)

    def _pass_seconds(self, item: Pass) -> tuple[Any, Any]:
        written = self._written_seconds(item)
        if item.operators[0].kind != "loss":
            return written
        in_place = self.kernels.loss_in_place(self.layouts)
        ahead, back = (
            np.where(in_place, *pair) for pair in zip(self._loss_seconds(item.operators[0]), written, strict=True)
        )
        return ahead, back

    def _written_seconds(self, item: Pass) -> tuple[Any, Any]:
        """As the graph has it."""
        moved = self._moved([*item.reads, *item.writes, *item.own])
        if item.operators[0].kind == "embedding":
            moved = self._moved([*item.reads, *item.writes, *item.writes])
        gelus = self._gelus(item)
        ahead = self._elementwise(moved, item.launches, gelus)
        if not item.needs_grad or not item.backward_moves:
            return ahead, 0.0
        back = self._moved([*item.backward_reads, *item.backward_writes])
        if item.operators[0].kind == "embedding":
            back = self._moved([*item.writes, *item.writes, *item.writes])
        return ahead, self._elementwise(back, item.launches, gelus)

    def _gelus(self, item: Pass) -> Any:
        """Elements that go through a GELU."""
        made = [operator.outputs[0] for operator in item.operators if operator.call == "gelu"]
        return sum(self.held_bytes(tensor) / self.sizes.width(tensor) for tensor in made)

    def _accumulation_seconds(self) -> Any:
        """Gradients of values that several kernels read are added to one another."""
        readers: dict[str, set[Any]] = {}
        tensors: dict[str, Tensor] = {}
        for index, products in enumerate(self._products()):
            for operator in products:
                if operator.backward_products > 1:
                    self._note(operator, ("product", index), readers, tensors)
        for index, item in enumerate(self.kernels.passes):
            for operator in item.operators:
                if operator.needs_grad:
                    self._note(operator, ("pass", index), readers, tensors)
        seconds: Any = 0.0
        for name, who in readers.items():
            if len(who) > 1:
                seconds = seconds + self._elementwise(
                    3 * (len(who) - 1) * self._moved([tensors[name]]), len(who) - 1
                )
        return seconds

    def _note(
        self, operator: Operator, who: Any, readers: dict[str, set[Any]], tensors: dict[str, Tensor]
    ) -> None:
        for tensor in operator.inputs:
            if tensor.dtype.startswith(("int", "bool")) or tensor.name in self.kernels.block.shared:
                continue
            tensors.setdefault(tensor.name, tensor)
            readers.setdefault(tensor.name, set()).add(who)

    def _elementwise(self, moved: Any, launches: int, gelus: Any = 0.0) -> Any:
        profile = self.pricer.profile
        return elementwise_seconds(profile.device, profile.elementwise, moved, launches, gelus=gelus)

    def _moved(self, tensors: Iterable[Tensor]) -> Any:
        return sum((self.held_bytes(tensor) for tensor in tensors), start=np.zeros(len(self.layouts)))

    def held_bytes(self, tensor: Tensor) -> Floats:
        """What a rank has of a tensor."""
        share = self._share(tensor)
        size = self.sizes.bytes(tensor)
        if share in ("cut", "own", "routed"):
            return np.asarray(size / self.tp)
        return np.asarray(size / self.whole)

    def _share(self, tensor: Tensor) -> Share:
        return self.kernels.shares.get(tensor.name, "whole")

    # communication

    def _communication(self, forward: Times, backward: Times, again: Mapping[Recompute, Times]) -> Any:
        """Exposed seconds of the block's collectives; returns how many calls the host issues in a pass."""

        def count(exchange: Exchange, axis: str, seconds: Any) -> None:
            add(backward if exchange.phase == "backward" else forward, axis, seconds)
            for recompute in exchange.again:
                add(again[recompute], axis, seconds)

        between = self.pricer.profile.interference
        hidden_tp = np.where(self.layouts.overlap_tp, between.hidden_tp, 0.0)
        hidden_ep = np.where(self.layouts.overlap_ep, between.hidden_ep, 0.0)
        calls: Any = 0.0
        for exchange in self.exchanges.tensor():
            seconds = exchange.calls * self._seconds(exchange)
            count(exchange, "tp", seconds if exchange.phase == "loss" else seconds * (1.0 - hidden_tp))
            # every rank of a group waits for the host of each of its peers
            calls = calls + exchange.calls * (self.layouts.tp - 1) * (exchange.phase != "backward")
        for operator in self._operators("attention"):
            for exchange, seconds in self._around_context(operator):
                count(exchange, "cp", seconds)
        for exchange in self.exchanges.experts():
            seconds = exchange.calls * self._seconds(exchange)
            count(exchange, "ep", seconds * (1.0 - hidden_ep))
            calls = calls + exchange.calls * (exchange.phase == "forward")
        return calls

    def _around_context(self, attention: Operator) -> Iterator[tuple[Exchange, Floats]]:
        """A ring runs beside the attention and each slows the other; a gather is waited for."""
        if not np.any(self.layouts.cp > 1):
            return
        ahead, back = self._attention_seconds(attention)
        between = self.pricer.profile.interference
        for exchange in self.exchanges.context(attention):
            seconds = exchange.calls * self._seconds(exchange)
            if exchange.kind == "p2p":
                work = ahead if exchange.phase == "forward" else back
                seconds = beside(work, seconds, between.compute_factor, between.communication_factor) - work
            yield exchange, seconds

    def _seconds(self, exchange: Exchange) -> Floats:
        """Of one call."""
        network = self.pricer.network
        if exchange.axis == "ep" and self.pricer.workload.stack == "megatron":
            return self._dispatched(exchange.bytes_ * self.pricer.workload.imbalance)
        busiest = self.pricer.workload.imbalance if exchange.axis == "ep" else 1.0
        return network.seconds(exchange.kind, exchange.axis, self.meshes, exchange.bytes_ * busiest)

    def _dispatched(self, sent: Floats) -> Floats:
        """One way between tokens and experts by Megatron's dispatchers (DeepEP, HybridEP).

        They send a token once to each node that holds some of its experts, where it is handed on; of N nodes, k
        random experts touch N·(1 − (1 − 1/N)^k).
        """
        network = self.pricer.network
        nodes = network.nodes("ep", self.meshes)
        choices = self.sizes.dim(self._operators("grouped_matmul")[0].dims["m"]) / self.sizes.dim(Dim(per_bs=1))
        touched = nodes * (1.0 - (1.0 - 1.0 / nodes) ** choices)
        copies = np.where(nodes > 1, np.minimum(touched / choices, 1.0), 1.0)
        between = network.seconds("all_to_all", "ep", self.meshes, sent * copies)
        inside = network.seconds("all_to_all", "ep_node", self.meshes, sent)
        return np.where(nodes > 1, np.maximum(between, inside), between)

    # host

    def _host(self, times: Times, kernels: Any, calls: Any, passes: float = 1.0) -> None:
        software = self.pricer.software
        experts = passes * bool(self._operators("grouped_matmul"))
        issuing = host_seconds(software, kernels=kernels, layers=passes, expert_layers=experts, collectives=calls)
        device = times.sum(axis=0)
        waiting = software.blocking * issuing if software.blocking else host_waiting(issuing, device)
        add(times, "host", waiting)

    def _operators(self, *kinds: str) -> list[Operator]:
        return [operator for operator in self.kernels.block.operators if operator.kind in kinds]

    def _zeros(self) -> Times:
        return np.zeros((len(PARTS), len(self.layouts)))
