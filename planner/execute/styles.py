"""One style per module: how it is cut over tp, what goes in and what comes out.

Between modules activations are plain local tensors in the layouts that the plan names; inside, weights are
this rank's parts. Modules of one parent that read the same activation share one prepared copy of it, so that
query, key and value cost one collective and not three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from planner.errors import PlannerError
from planner.execute.kept import partial_product
from planner.execute.mesh import Peers
from planner.execute.moves import Gradient, convert, own_part
from planner.execute.parameters import (
    Piece,
    Summed,
    cut,
    keep_whole,
    local,
    local_parameters,
    replace_forward,
)
from planner.models.attention import Core
from planner.models.huggingface_modules import TransposedLinear
from planner.models.positions import Positions
from planner.spec.legality import padded_vocab
from planner.spec.plan import Layout, ModuleSplit

Forward = Callable[..., Any]

# whether a module's result is read by heads, each rank its own, or its input already is such a result
HeadsSide = Literal["apart", "before", "inside"]


class SharedInput:
    """The prepared copies of what a parent's modules read, kept while the parent runs."""

    def __init__(self, parent: nn.Module) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        replace_forward(parent, self._scoped)

    def __call__(self, x: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """x prepared, the same tensor each time the same x comes."""
        for seen, prepared in self._kept:
            if seen is x:
                return prepared
        prepared = prepare(x)
        self._kept.append((x, prepared))
        return prepared

    def _scoped(self, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            finally:
                self._kept.clear()

        return run


class SplitStyle(ParallelStyle):
    """Applies a module's line of the plan. `summed` collects weights whose gradients are parts."""

    def __init__(
        self,
        plan: ModuleSplit,
        peers: Peers,
        *,
        shared: SharedInput | None,
        summed: list[Summed],
        copies: Peers,
        heads: HeadsSide = "apart",
        path: str = "",
        fused: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.plan = plan
        self.peers = peers
        self.shared = shared
        self.summed = summed
        self.copies = copies
        self.heads = heads
        self.path = path
        self.fused = fused

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.mesh = device_mesh
        split = self.plan.split
        if split in ("replicate", "sequence") and not isinstance(module, nn.Embedding):
            self._whole(module)
        elif split == "heads":
            self._heads(module)
        elif isinstance(module, (nn.Linear, TransposedLinear)) and split in ("column", "row", "vocab"):
            by_split: dict[str, Callable[[Any], None]] = {
                "column": self._column,
                "row": self._row,
                "vocab": self._vocab_head,
            }
            by_split[split](module)
        elif isinstance(module, nn.Embedding) and split == "vocab":
            self._vocab_table(module)
        elif isinstance(module, nn.Embedding) and split in ("replicate", "sequence"):
            self._table(module)
        else:
            raise PlannerError(
                f"a {split} split does not fit a module of class {type(module).__name__}",
                value=self.path or None,
                remedy="column, row, vocab cut linear layers, vocab embeddings; others are kept whole",
                key="modules",
            )
        return module

    def _column(self, linear: nn.Linear | TransposedLinear) -> None:
        """Each rank computes some of the features; the input's gradient is a sum over ranks."""
        self._expect(output="features")
        for name in _weights(linear):
            self._cut(linear, name, _dim(linear, name, 0), copies=self.copies.size, parts=self.fused)
            if self.copies.size > 1:
                self.summed.append(Summed(linear, name, self.copies))

        def forward(x: Tensor) -> Tensor:
            bias = None if linear.bias is None else local(linear.bias)
            return F.linear(self._prepared(x), _matrix(linear), bias)

        replace_forward(linear, lambda _: forward)

    def _row(self, linear: nn.Linear | TransposedLinear) -> None:
        """Each rank multiplies its features; the products are summed, then the bias is added once."""
        if self.plan.output not in ("replicate", "sequence"):
            self._expect(output="replicate")
        self._expect(input="features")
        self._cut(linear, "weight", _dim(linear, "weight", 1))
        if linear.bias is not None:
            keep_whole(linear, "bias", self.mesh)
            if self.plan.output == "sequence":
                self.summed.append(Summed(linear, "bias", self.peers))

        def forward(x: Tensor) -> Tensor:
            with partial_product():
                part = F.linear(x, _matrix(linear))
            out = convert(part, "partial", self.plan.output, self.peers)
            return out if linear.bias is None else out + local(linear.bias)

        replace_forward(linear, lambda _: forward)

    def _vocab_head(self, linear: nn.Linear) -> None:
        """Logits of some tokens on each rank; gathered where the plan wants them whole."""
        vocab = linear.out_features
        padded = padded_vocab(vocab, self.peers.size)
        for name in _weights(linear):
            self._cut(linear, name, 0, padded=padded)

        def forward(x: Tensor) -> Tensor:
            bias = None if linear.bias is None else local(linear.bias)
            logits = F.linear(self._prepared(x), local(linear.weight), bias)
            out = convert(logits, "features", self.plan.output, self.peers)
            return out if self.plan.output == "features" else out[..., :vocab]

        replace_forward(linear, lambda _: forward)

    def _vocab_table(self, table: nn.Embedding) -> None:
        """Each rank looks up the tokens whose rows it holds; the rest is zero, and the sum is whole."""
        rows = padded_vocab(table.num_embeddings, self.peers.size) // self.peers.size
        self._cut(table, "weight", 0, padded=rows * self.peers.size)
        first = self.peers.rank * rows
        silent = _own_row(table.padding_idx, first, rows)

        def forward(tokens: Tensor) -> Tensor:
            own = tokens - first
            elsewhere = (own < 0) | (own >= rows)
            out = F.embedding(own.masked_fill(elsewhere, 0), local(table.weight), padding_idx=silent)
            out = out.masked_fill(elsewhere[..., None], 0)
            return convert(out, "partial", self.plan.output, self.peers)

        replace_forward(table, lambda _: forward)

    def _table(self, table: nn.Embedding) -> None:
        """A table kept whole. Along the sequence each rank looks up its own positions only."""
        keep_whole(table, "weight", self.mesh)
        along = self.plan.split == "sequence"
        if along:
            self.summed.append(Summed(table, "weight", self.peers))
        self._expect(output="sequence" if along else "replicate")

        def forward(index: Tensor) -> Tensor:
            index = own_part(index, -1, self.peers) if along else index
            return F.embedding(index, local(table.weight), padding_idx=table.padding_idx)

        replace_forward(table, lambda _: forward)

    def _whole(self, module: nn.Module) -> None:
        """Weights whole: the same on every rank, or each rank on its part of the sequence."""
        runs_in: Layout = "sequence" if self.plan.split == "sequence" else "replicate"
        for name in _weights(module):
            keep_whole(module, name, self.mesh)
            if runs_in == "sequence" or self.heads == "inside":
                self.summed.append(Summed(module, name, self.peers))
        if self.heads != "apart":
            self._expect(output="replicate")
        gradient: Gradient = "partial" if self.heads == "before" else "same"

        def wrap(forward: Forward) -> Forward:
            def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                with local_parameters(module):
                    out = forward(convert(x, self.plan.input, runs_in, self.peers), *args, **kwargs)
                if not isinstance(out, Tensor):
                    return out
                return convert(out, runs_in, self.plan.output, self.peers, gradient=gradient)

            return run

        replace_forward(module, wrap)

    def _heads(self, module: nn.Module) -> None:
        """Each rank has some of the heads; what belongs to a head is cut, what all heads share is kept whole."""
        self._expect(input="features", output="features")
        core = isinstance(module, Core)
        for name in _weights(module):
            if core:
                self._cut(module, name, 0)
            else:
                keep_whole(module, name, self.mesh)
                self.summed.append(Summed(module, name, self.peers))

        def wrap(forward: Forward) -> Forward:
            def run(x: Tensor, *args: Any) -> Any:
                own = tuple(self._own_heads(a, x.shape[1]) if isinstance(a, Positions) else a for a in args)
                with local_parameters(module):
                    return forward(x, *own)

            return run

        replace_forward(module, wrap)

    def _cut(
        self,
        module: nn.Module,
        name: str,
        dim: int,
        *,
        copies: int = 1,
        padded: int = 0,
        parts: tuple[int, ...] = (),
    ) -> None:
        """Keep this rank's piece; `copies` neighbouring ranks keep the same one."""
        piece = Piece(dim, self.peers.size // copies, self.peers.rank // copies, padded, parts)
        cut(module, name, self.mesh, piece)

    def _own_heads(self, positions: Positions, heads: int) -> Positions:
        first = self.peers.rank * heads
        slopes, bias = positions.slopes, positions.bias
        return positions._replace(
            slopes=None if slopes is None else slopes[first : first + heads],
            bias=None if bias is None else bias[:, first : first + heads],
        )

    def _prepared(self, x: Tensor) -> Tensor:
        if self.heads == "inside":
            return x

        def prepare(x: Tensor) -> Tensor:
            return convert(x, self.plan.input, "replicate", self.peers, gradient="partial")

        return prepare(x) if self.shared is None else self.shared(x, prepare)

    def _expect(self, **layouts: str) -> None:
        for side, wanted in layouts.items():
            if getattr(self.plan, side) != wanted:
                raise PlannerError(
                    f"the {side} of a {self.plan.split} split is {wanted}",
                    value=getattr(self.plan, side),
                    remedy=f"set {side}: {wanted}",
                    key=f"modules.{self.path}.{side}",
                )


def _dim(linear: nn.Module, name: str, dim: int) -> int:
    """The dim of outputs or inputs, 0 or 1 where the weight is [out, in]."""
    return 1 - dim if isinstance(linear, TransposedLinear) and name == "weight" else dim


def _matrix(linear: nn.Linear | TransposedLinear) -> Tensor:
    """This rank's weight as [out, in]."""
    own = local(linear.weight)
    return own.mT if isinstance(linear, TransposedLinear) else own


def _own_row(row: int | None, first: int, rows: int) -> int | None:
    """A row of the table among those of this rank."""
    return row - first if row is not None and first <= row < first + rows else None


def _weights(module: nn.Module) -> list[str]:
    return [name for name, value in module._parameters.items() if value is not None]
