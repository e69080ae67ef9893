"""The operator graph of a model: torch-free, evaluated at any (microbatch, sequence length).

A graph is a sequence of blocks. Equal blocks are stored once, however often they stand in the sequence, so
126 layers cost what one costs. Every size is affine in b (sequences in the microbatch), s (tokens in a
sequence) and their product; FLOPs and bytes follow from the sizes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from planner.errors import PlannerError
from planner.spec.codec import Count, decode, encode
from planner.spec.sizes import Dim, Dtype, Tensor
from planner.spec.yaml_text import Source
from planner.units import bytes_per_element

GRAPH_FORMAT = 1

OperatorKind = Literal[
    "matmul", "grouped_matmul", "convolution", "attention", "embedding", "norm", "softmax", "loss",
    "dropout", "elementwise", "reduction", "indexing", "copy", "routing", "other",
]  # fmt: skip

PRODUCTS = ("matmul", "grouped_matmul", "convolution")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A weight, its path relative to the block that holds it."""

    path: str
    shape: tuple[Count, ...]
    dtype: Dtype
    trainable: bool = True

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator: a kernel, or the few kernels of a norm written out.

    Views are not operators: an input names the storage it looks into. `dims` names the sizes its cost depends
    on: products have batch, m, n, k (and experts), attention batch, heads, kv_heads, queries, keys, head_dim,
    value_dim.
    """

    name: str
    kind: OperatorKind
    module: str = ""
    call: str
    dims: dict[str, Dim]
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    parameters: tuple[str, ...] = ()
    keeps: tuple[Tensor, ...] = ()  # what backward needs, each storage whole
    needs_grad: bool = False
    backward_products: int = 0  # of a product: gradients of the input and of the weight
    kernels: int = 1  # launches in eager mode
    causal: bool = False
    window: Count = 0
    cross: bool = False  # attention over another sequence than its own

    def __post_init__(self) -> None:
        needed: tuple[str, ...] = ()
        if self.kind in PRODUCTS:
            needed = ("batch", "m", "n", "k")
        elif self.kind == "attention":
            needed = ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim")
        for key in needed:
            if key not in self.dims:
                raise PlannerError(
                    f"an operator of kind {self.kind} states its {', '.join(needed)}",
                    value=", ".join(self.dims) or "none",
                    remedy=f"add {key}, or trace the model anew",
                    key="dims",
                )

    def sizes(self, b: Any, s: Any, kv_len: Any = None) -> dict[str, Any]:
        """The named dims as numbers. With `kv_len`, self-attention looks at a cache of that many tokens.

        A sliding window keeps no more than its own length and the new tokens in that cache.
        """
        sizes = {name: dim.at(b, s) for name, dim in self.dims.items()}
        if kv_len is not None and self.kind == "attention" and not self.cross:
            within = self.window + sizes["queries"] - 1
            # min() of two numbers that may be arrays
            sizes["keys"] = kv_len - (kv_len - within) * (kv_len > within) if self.window else kv_len
        return sizes

    def flops(self, b: Any, s: Any, kv_len: Any = None) -> Any:
        """Multiply–adds of products, counted as two; attention whole, also where a mask hides half of it."""
        if self.kind in PRODUCTS:
            d = self.sizes(b, s)
            return 2 * d["batch"] * d["m"] * d["n"] * d["k"]
        if self.kind == "attention":
            d = self.sizes(b, s, kv_len)
            return 2 * d["batch"] * d["heads"] * d["queries"] * d["keys"] * (d["head_dim"] + d["value_dim"])
        return 0

    def backward_flops(self, b: Any, s: Any) -> Any:
        """A product per gradient asked for; fused attention computes its scores again (5 products for 2)."""
        if self.kind in PRODUCTS:
            return self.backward_products * self.flops(b, s)
        if self.kind == "attention" and self.needs_grad:
            d = self.sizes(b, s)
            pairs = d["batch"] * d["heads"] * d["queries"] * d["keys"]
            return 2 * pairs * (3 * d["head_dim"] + 2 * d["value_dim"])
        return 0

    def kept_bytes(self, b: Any, s: Any, widths: dict[str, float] | None = None) -> Any:
        """Bytes this operator alone keeps for backward; a block shares them between operators."""
        return sum(tensor.bytes(b, s, widths) for tensor in self.keeps)

    def activation_read_bytes(
        self, b: Any, s: Any, widths: dict[str, float] | None = None, kv_len: Any = None
    ) -> Any:
        """Bytes read from activations; with `kv_len`, keys and values are read from the whole cache."""
        read = [tensor.bytes(b, s, widths) for tensor in self.inputs]
        if kv_len is not None and self.kind == "attention" and not self.cross:
            # q, k, v come first
            stretch = self.sizes(b, s, kv_len)["keys"] / self.sizes(b, s)["keys"]
            read[1:3] = [tensor.bytes(b, s, widths) * stretch for tensor in self.inputs[1:3]]
        return sum(read)

    def written_bytes(self, b: Any, s: Any, widths: dict[str, float] | None = None) -> Any:
        """Bytes written."""
        return sum(tensor.bytes(b, s, widths) for tensor in self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of the model that runs as one: a layer, or what stands before, between and after layers."""

    parameters: tuple[Parameter, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[str, ...] = ()  # storages that come from the block before
    outputs: tuple[str, ...] = ()  # own storages that other blocks read
    shared: tuple[str, ...] = ()  # storages that several blocks read, such as rotary tables

    def __post_init__(self) -> None:
        known = {parameter.path for parameter in self.parameters}
        for index, operator in enumerate(self.operators):
            if not known.issuperset(operator.parameters):
                raise PlannerError(
                    "an operator uses parameters of its block",
                    value=", ".join(operator.parameters),
                    remedy="add the parameter to the block, or trace the model anew",
                    key=f"operators.{index}.parameters",
                )

    def parameter(self, path: str) -> Parameter:
        """The parameter of a path relative to this block."""
        return next(parameter for parameter in self.parameters if parameter.path == path)

    def read_bytes(
        self, operator: Operator, b: Any, s: Any, widths: dict[str, float] | None = None, kv_len: Any = None
    ) -> Any:
        """Bytes an operator of this block reads: its inputs and its weights (of a table, the rows it picks)."""
        activations = operator.activation_read_bytes(b, s, widths, kv_len)
        if operator.kind == "embedding":
            return activations + operator.written_bytes(b, s, widths)
        weights = 0.0
        for path in operator.parameters:
            parameter = self.parameter(path)
            width = (widths or {}).get(parameter.dtype)
            weights += parameter.elements * (bytes_per_element(parameter.dtype) if width is None else width)
        return activations + weights

    def kept(self) -> dict[str, Tensor]:
        """Every storage that backward of this block needs, once, without those other blocks own."""
        kept = {tensor.name: tensor for operator in self.operators for tensor in operator.keeps}
        return {name: tensor for name, tensor in kept.items() if name not in self.shared}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A block at its place in the model."""

    path: str  # module path; empty for what stands outside any layer list
    block: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A traced model."""

    format: int = GRAPH_FORMAT
    name: str
    dtype: Dtype  # the working precision it was traced in; other precisions replace this one
    blocks: dict[str, Block]
    sequence: tuple[Placement, ...]
    tied: tuple[tuple[str, ...], ...] = ()  # full paths that are one parameter
    unused: tuple[Parameter, ...] = ()  # parameters that the forward never touches, full paths
    own: bool = False  # a user's own module, of which the executor knows no more than its layers
    digest: str = ""  # of what was traced
    traced_with: str = ""

    def __post_init__(self) -> None:
        if self.format != GRAPH_FORMAT:
            raise PlannerError(
                f"this version reads graphs of format {GRAPH_FORMAT}",
                value=self.format,
                remedy="trace the model anew",
                key="format",
            )
        for index, placement in enumerate(self.sequence):
            if placement.block not in self.blocks:
                raise PlannerError(
                    "each placement names a block of the graph",
                    value=placement.block,
                    remedy="trace the model anew",
                    key=f"sequence.{index}.block",
                )

    @classmethod
    def from_dict(cls, data: Any, source: Source | None = None) -> Graph:
        """A graph from YAML or JSON data."""
        return decode(cls, data, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML or JSON."""
        data: dict[str, Any] = encode(self, omit_defaults=True)
        return {"format": self.format, **data}

    def repeats(self) -> dict[str, int]:
        """How often each block stands in the model."""
        counts = dict.fromkeys(self.blocks, 0)
        for placement in self.sequence:
            counts[placement.block] += 1
        return counts

    def operators(self) -> Iterator[tuple[str, Block, Operator]]:
        """Every operator of the whole model in order, with the full path of its module."""
        for placement in self.sequence:
            block = self.blocks[placement.block]
            for operator in block.operators:
                yield joined(placement.path, operator.module), block, operator

    def parameters(self) -> dict[str, Parameter]:
        """Every parameter by its full path; of tied ones the first."""
        found = {parameter.path: parameter for parameter in self.unused}
        for placement in self.sequence:
            for parameter in self.blocks[placement.block].parameters:
                found.setdefault(joined(placement.path, parameter.path), parameter)
        for group in self.tied:
            same = [found.pop(path) for path in group if path in found]
            if same:
                found[group[0]] = same[0]
        return found

    @property
    def parameter_count(self) -> int:
        """Numbers the model learns or holds, tied ones once."""
        return sum(parameter.elements for parameter in self.parameters().values())

    def flops(self, b: Any, s: Any, kv_len: Any = None) -> Any:
        """Forward FLOPs of one microbatch."""
        return self._sum(lambda operator: operator.flops(b, s, kv_len))

    def backward_flops(self, b: Any, s: Any) -> Any:
        """Backward FLOPs of one microbatch, without recomputation."""
        return self._sum(lambda operator: operator.backward_flops(b, s))

    def kept_bytes(self, b: Any, s: Any, widths: dict[str, float] | None = None) -> Any:
        """Activation bytes that one microbatch leaves behind for backward, all on one device."""
        kept = {name: block.kept() for name, block in self.blocks.items()}
        total = 0
        for name, count in self.repeats().items():
            total += count * sum(tensor.bytes(b, s, widths) for tensor in kept[name].values())
        for tensor, count in self._kept_by_both(kept):
            total -= count * tensor.bytes(b, s, widths)
        shared = {
            tensor.name: tensor
            for block in self.blocks.values()
            for operator in block.operators
            for tensor in operator.keeps
            if tensor.name in block.shared
        }
        owned = {name for tensors in kept.values() for name in tensors}
        return total + sum(tensor.bytes(b, s, widths) for name, tensor in shared.items() if name not in owned)

    def _kept_by_both(self, kept: dict[str, dict[str, Tensor]]) -> Iterator[tuple[Tensor, int]]:
        """Storages that a block keeps as its result and the next one as its input, and how often.

        A repeated block names its input after the first one's; one result that meets one input is the same.
        """
        pairs = Counter((one.block, other.block) for one, other in itertools.pairwise(self.sequence))
        for (before, after), count in pairs.items():
            results = [name for name in self.blocks[before].outputs if name in kept[before]]
            needs = [name for name in self.blocks[after].inputs if name in kept[after]]
            alone = len(self.blocks[before].outputs) == len(self.blocks[after].inputs) == 1
            for name in needs:
                if name in results or (alone and results):
                    yield kept[after][name], count

    def _sum(self, of: Any) -> Any:
        repeats = self.repeats()
        return sum(
            repeats[name] * sum(of(operator) for operator in block.operators)
            for name, block in self.blocks.items()
        )


def joined(prefix: str, path: str) -> str:
    """Two module paths put together; either may be empty."""
    return f"{prefix}.{path}" if prefix and path else prefix or path
