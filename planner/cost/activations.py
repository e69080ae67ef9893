"""What backward needs of a block: bytes a rank keeps of one microbatch, and what comes and goes around them.

The graph names every storage that backward reads, each once. The software stack decides which of them a fused
kernel keeps, recomputation which of them wait, and tensor parallelism what a rank has of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from planner.cost.blocks import BlockPricer
from planner.cost.exchanges import needed_behind
from planner.cost.fusion import is_heavy
from planner.cost.kernels import Kernels, Sizes
from planner.cost.layouts import Bools, Floats, Layouts, Words
from planner.cost.ways import Way
from planner.cost.weights import held_parameters
from planner.spec.graph import Operator
from planner.spec.sizes import Tensor
from planner.spec.strategy import Recompute
from planner.units import FP32_BYTES

_LOGIT_BYTES = FP32_BYTES
_QUANTISED = "~quantised"


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes of one microbatch in one block, by layout."""

    kept: Floats  # from forward to backward
    unfinished: Floats  # of it, what is there until gradients of weights are made, if only these are missing
    gradients: Floats  # of results of operators with weights, which wait for the same
    again: Floats  # further, while backward of this block runs: what recomputation brings back
    passing: Floats  # gradients and temporaries of its hungriest operator in backward
    routed: Floats  # of `kept`, tokens sent to experts

    def take(self, rows: Any) -> Activations:
        """Some of the layouts."""
        return Activations(**{item.name: getattr(self, item.name)[rows] for item in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """A block's bytes under each recomputation: what waits for backward, and what is brought back for it."""

    waiting: Mapping[Recompute, Floats]
    unfinished: Floats
    gradients: Floats
    again: Mapping[Recompute, Floats]
    passing: Floats
    routed: Floats

    def but(self, rows: Bools, other: _Kept) -> _Kept:
        """Other bytes in some rows, where nothing is run again."""
        return _Kept(
            waiting={word: np.where(rows, other.waiting["none"], kept) for word, kept in self.waiting.items()},
            unfinished=np.where(rows, other.unfinished, self.unfinished),
            gradients=np.where(rows, other.gradients, self.gradients),
            again={word: np.where(rows, 0.0, back) for word, back in self.again.items()},
            passing=np.where(rows, other.passing, self.passing),
            routed=np.where(rows, other.routed, self.routed),
        )

    def under(self, recomputed: Words) -> Activations:
        """With this recomputation: what runs again does so for both parts of backward at once."""
        plain = recomputed == "none"
        waiting, again = self.waiting["none"], np.zeros_like(self.passing)
        for word, back in self.again.items():
            waiting = np.where(recomputed == word, self.waiting[word], waiting)
            again = np.where(recomputed == word, back, again)
        return Activations(
            kept=waiting,
            unfinished=_only(plain, self.unfinished),
            gradients=_only(plain, self.gradients),
            again=again,
            passing=self.passing,
            routed=np.minimum(self.routed, waiting),
        )


class BlockActivations:
    """The activations of blocks under many layouts."""

    def __init__(self, pricer: BlockPricer, layouts: Layouts) -> None:
        self.pricer, self.layouts = pricer, layouts
        self.sizes = Sizes(layouts, pricer.workload.seq_len, pricer.widths)
        self._kept: dict[Way, _Kept] = {}

    def of(self, name: str) -> Activations:
        """Those of one way of a block."""
        kernels = self.pricer.kernels[name]
        plain = replace(kernels.way, recompute=None)
        if plain not in self._kept:
            self._kept[plain] = self._of(kernels)
        return self._kept[plain].under(kernels.recomputed(self.layouts))

    def _of(self, kernels: Kernels) -> _Kept:
        losses = [operator for operator in kernels.block.operators if operator.kind == "loss"]
        if not losses:
            return self._as_written(kernels, losses)
        in_place = kernels.loss_in_place(self.layouts)
        if in_place.all():
            return self._loss_in_place(kernels, losses[0])
        written = self._as_written(kernels, losses)
        return written.but(in_place, self._loss_in_place(kernels, losses[0])) if in_place.any() else written

    def _as_written(self, kernels: Kernels, losses: Sequence[Operator]) -> _Kept:
        """Every operator keeps what it keeps by itself."""
        everything = self._stored(kernels)
        kept = self._bytes(kernels, everything.values())
        routed = [t for t in everything.values() if kernels.shares.get(_original(t)) == "routed"]
        waiting: dict[Recompute, Floats] = {"none": kept}
        again: dict[Recompute, Floats] = {}
        if kernels.layer:
            entering = self._bytes(kernels, [t for t in everything.values() if t.name in kernels.block.inputs])
            waiting["full"] = np.maximum(self._input(kernels), entering)
            again["full"] = np.maximum(kept - waiting["full"], 0.0)
            waiting["selective"], again["selective"] = self._selective(kernels, everything)
        behind = {tensor.name for tensor in losses[0].keeps} if losses else set()
        return _Kept(
            waiting=waiting,
            unfinished=self._bytes(kernels, [t for t in everything.values() if t.name not in behind]),
            gradients=self._gradients(kernels),
            again=again,
            passing=self._passing(kernels, everything),
            routed=self._bytes(kernels, routed),
        )

    def _loss_in_place(self, kernels: Kernels, loss: Operator) -> _Kept:
        """Logits become probabilities, and these gradients, in one fp32 buffer; then they are cast."""
        shares = kernels.shares.get(loss.inputs[0].name, "whole")
        split = self.layouts.tp if shares == "cut" else self.layouts.whole_shards
        logits = self.sizes.elements(loss.inputs[0]) / split
        stored = self._stored(kernels)
        made = {tensor.name for operator in kernels.block.operators for tensor in operator.outputs}
        wide = {tensor.name for tensor in (*loss.inputs, *loss.keeps)}
        others = [tensor for tensor in stored.values() if tensor.name not in wide or tensor.name not in made]
        others = [tensor for tensor in others if tensor.dtype != "fp32" or tensor.name not in wide]
        unfinished = self._bytes(kernels, others)
        return _Kept(
            waiting={"none": unfinished + logits * _LOGIT_BYTES},
            unfinished=unfinished,
            gradients=self._gradients(kernels),
            again={},
            passing=logits * self.pricer.width,
            routed=np.zeros(len(self.layouts)),
        )

    def _stored(self, kernels: Kernels) -> dict[str, Tensor]:
        """Storages that backward reads, without those that the next block keeps as its input."""
        found: dict[str, Tensor] = {}
        for item in kernels.passes:
            if item.needs_grad:
                for tensor in item.keeps:
                    found.setdefault(tensor.name, tensor)
        for operator in kernels.block.operators:
            if is_heavy(operator):
                for tensor in operator.keeps:
                    kept = self._as_kept(kernels, operator, tensor)
                    found.setdefault(kept.name, kept)
        left_out = {*kernels.block.outputs, *kernels.block.shared}
        return {name: tensor for name, tensor in found.items() if _original(tensor) not in left_out}

    def _as_kept(self, kernels: Kernels, operator: Operator, tensor: Tensor) -> Tensor:
        """Megatron's 8-bit products keep their input as they read it, beside what others keep of it."""
        quantised = operator.name in kernels.low_precision and self.pricer.workload.stack == "megatron"
        if quantised and tensor.dtype == "bf16":
            return replace(tensor, name=tensor.name + _QUANTISED, dtype="fp8")
        return tensor

    def _selective(self, kernels: Kernels, everything: dict[str, Tensor]) -> tuple[Floats, Floats]:
        """Bytes that selective recomputation leaves, and those that it brings back."""
        one = self._stays(kernels, everything, summed=False)
        several = self._stays(kernels, everything, summed=True)
        several_ranks = self.layouts.tp > 1

        def size(left: dict[str, Tensor]) -> Floats:
            return self._bytes(kernels, left.values())

        def gone(left: dict[str, Tensor]) -> Floats:
            return self._bytes(kernels, [tensor for name, tensor in everything.items() if name not in left])

        stays = np.where(several_ranks, size(several), size(one))
        return stays, np.where(several_ranks, gone(several), gone(one))

    def _stays(self, kernels: Kernels, everything: dict[str, Tensor], *, summed: bool) -> dict[str, Tensor]:
        """What selective recomputation leaves: Megatron drops what stays inside the attention core.

        The torch stacks leave what enters, every second product, attention and, where products are `summed`
        over ranks, the sums instead of the summands. Behind the last value that backward reads nothing runs
        again, so nothing is left.
        """
        operators = kernels.block.operators
        if self.pricer.workload.stack == "megatron":
            made, around = _core(kernels)
            stays = {name: tensor for name, tensor in everything.items() if _original(tensor) not in made}
            return {tensor.name: tensor for tensor in around} | stays
        products = [operator for operator in operators if operator.kind in ("matmul", "grouped_matmul")]
        partial = [operator for operator in products if kernels.splits[operator.name].output == "partial"]
        saved = products[::2]
        if summed:
            saved = [operator for operator in saved if operator not in partial] + partial
        saved = [item for item in saved if needed_behind(kernels.block, operators.index(item) + 1)]
        saved += [operator for operator in operators if operator.kind == "attention"]
        made = {name for operator in saved for name in _made(operator)}
        entering = set(kernels.block.inputs)
        held = {tensor.name: tensor for operator in saved for tensor in operator.outputs}
        return held | {name: tensor for name, tensor in everything.items() if name in made | entering}

    def _input(self, kernels: Kernels) -> Floats:
        """What enters the block."""
        for operator in kernels.block.operators:
            for tensor in operator.inputs:
                if tensor.name in kernels.block.inputs and not tensor.dtype.startswith("int"):
                    return np.asarray(self.sizes.bytes(tensor) / self.layouts.whole_shards)
        return np.zeros(len(self.layouts))

    def _gathered(self, kernels: Kernels) -> set[str]:
        """Values that torch's products keep as they were gathered; Megatron keeps its part and gathers again."""
        if self.pricer.workload.stack == "megatron":
            return set()
        found = {name for split in kernels.splits.values() for name in split.gathers}
        for operator in kernels.block.operators:
            split = kernels.splits[operator.name]
            if split.hands_over or (split.inside and not split.is_cut):
                found |= {tensor.name for tensor in operator.outputs}
        return found

    def _passing(self, kernels: Kernels, everything: dict[str, Tensor]) -> Floats:
        """The most that backward has at any operator beyond what the block keeps.

        Gradients of the operator's results and inputs, and of the weights behind it, less what those behind it
        kept and need no more. A loss out of place has gradients of log-probabilities before those of logits.
        """
        most, balance = np.zeros((2, len(self.layouts)))
        first: dict[str, str] = {}  # of each storage, the operator whose backward is the last to read it
        for operator in kernels.block.operators:
            for tensor in operator.keeps:
                first.setdefault(tensor.name, operator.name)
        weights = {item.path: item for item in held_parameters(kernels.block, kernels.splits, self.layouts)}
        for operator in reversed(kernels.block.operators):
            if not operator.needs_grad or operator.kind == "embedding":
                continue
            tensors = [t for t in (*operator.outputs, *operator.inputs) if not t.dtype.startswith(("int", "bool"))]
            beside = self._bytes(kernels, {t.name: t for t in tensors}.values())
            if operator.kind == "loss":
                beside = beside + self._bytes(kernels, operator.inputs[:1])
            most = np.maximum(most, balance + beside)
            done = [item for name, item in everything.items() if first.get(_original(item)) == operator.name]
            balance = balance - self._bytes(kernels, done)
            for path in operator.parameters:
                balance = balance + weights[path].elements * self.pricer.width
        return most

    def _gradients(self, kernels: Kernels) -> Floats:
        """Of results of operators with weights; a part of a sum gets that of the whole sum."""
        total = np.zeros(len(self.layouts))
        for operator in kernels.block.operators:
            if not operator.parameters or not operator.needs_grad or operator.kind == "embedding":
                continue
            partial = kernels.splits[operator.name].output == "partial"
            bias_behind = partial and operator.kind == "matmul" and len(operator.parameters) > 1
            for tensor in operator.outputs:
                whole = self.sizes.bytes(tensor)
                total = total + (whole if partial else whole / self._ranks(kernels, tensor, set()))
                if bias_behind:  # it is added to the sum, cut with sp
                    total = total + np.where(self.layouts.sp, whole / self.layouts.tp, 0.0)
        return total

    def _bytes(self, kernels: Kernels, tensors: Iterable[Tensor]) -> Floats:
        total = np.zeros(len(self.layouts))
        gathered = self._gathered(kernels)
        for tensor in tensors:
            total = total + self.sizes.bytes(tensor) / self._ranks(kernels, tensor, gathered)
        return total

    def _ranks(self, kernels: Kernels, tensor: Tensor, gathered: set[str]) -> Floats:
        """Tensor-parallel ranks that share a tensor."""
        if tensor.name in gathered:
            return np.ones(len(self.layouts))
        name = _original(tensor)
        heads = kernels.kv_heads.get(name, 0)
        if heads:
            return np.asarray(np.minimum(self.layouts.tp, heads))
        share = kernels.shares.get(name, "whole")
        if share == "own" and any(name == operator.inputs[0].name for operator in _experts(kernels)):
            return np.asarray(self.layouts.tp / self.layouts.etp)  # gathered where an expert itself is cut
        return np.asarray(self.layouts.whole_shards if share == "whole" else self.layouts.tp)


def _only(rows: Bools, sizes: Floats) -> Floats:
    """Sizes in some rows, nothing in others; no copy where they are alike."""
    if rows.all():
        return sizes
    return np.where(rows, sizes, 0.0) if rows.any() else np.broadcast_to(0.0, sizes.shape)


def _original(tensor: Tensor) -> str:
    """The storage that a kept tensor is, or is a quantised copy of."""
    return tensor.name.removesuffix(_QUANTISED)


def _experts(kernels: Kernels) -> list[Operator]:
    return [operator for operator in kernels.block.operators if operator.kind == "grouped_matmul"]


def _core(kernels: Kernels) -> tuple[set[str], list[Tensor]]:
    """Storages made and used up inside the attention core, fused or written out; queries, keys and values."""
    block = kernels.block
    modules = {
        operator.module
        for operator in block.operators
        if operator.kind == "attention" or (operator.kind == "matmul" and not operator.parameters)
    }
    core = [operator for operator in block.operators if operator.module in modules and not operator.parameters]
    names = {operator.name for operator in core}
    made = {name for operator in core for name in _made(operator)}
    read = {t.name for operator in block.operators if operator.name not in names for t in operator.keeps}
    entering = {
        tensor.name: tensor
        for operator in core
        for tensor in operator.inputs
        if tensor.name not in made
        and tensor.name not in block.shared
        and tensor.dtype == operator.outputs[0].dtype
    }
    whole = {tensor.name: tensor for operator in block.operators for tensor in operator.outputs}
    return made - read, [whole.get(name, tensor) for name, tensor in entering.items()]


def _made(operator: Operator) -> set[str]:
    """Storages that an operator makes, statistics and masks among them."""
    read = {tensor.name for tensor in operator.inputs}
    return {tensor.name for tensor in (*operator.outputs, *operator.keeps)} - read
