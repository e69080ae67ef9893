"""Linear layers and tables of a user's own module, cut: what each rank keeps, and how it computes with that."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.cut import Along, Cut, Source, entering, gathered, own_features, require_divisible, summed_up
from planner.execute.mesh import Peers
from planner.execute.parameters import Piece, local
from planner.execute.styles import SharedInput
from planner.spec.legality import padded_vocab
from planner.spec.plan import Layout, ModuleSplit

CUT = ("column", "row", "vocab")


@dataclass(slots=True)
class CutModule:
    """A linear layer or a table of which each rank has a piece."""

    path: str
    module: nn.Module
    plan: ModuleSplit
    peers: Peers
    source: Source
    parts: tuple[int, ...] = ()
    notes: bool = True  # whether the code after it is watched: where does it take the result apart?
    whole: dict[str, nn.Parameter] = field(default_factory=dict)  # while nothing is cut yet

    def piece(self, name: str) -> Piece | None:
        """Which part of a weight a rank keeps; None where it keeps the whole."""
        ranks, rank = self.peers.size, self.peers.rank
        if self.plan.split == "row":
            return Piece(1, ranks, rank) if name == "weight" else None
        if self.plan.split == "vocab":
            return Piece(0, ranks, rank, padded_vocab(self.source.size, ranks))
        copies = self.source.copies
        return Piece(0, ranks // copies, rank // copies, parts=self.parts)

    def weight(self, name: str) -> Tensor | None:
        """This rank's part, or the whole of what is not cut."""
        if self.whole:
            piece, parameter = self.piece(name), self.whole.get(name)
            return parameter if piece is None or parameter is None else piece.of(parameter)
        held = self.module._parameters[name]
        return held if held is None else local(held)

    @property
    def matrix(self) -> Tensor:
        """This rank's part of what every layer has."""
        found = self.weight("weight")
        assert found is not None
        return found


def cut_module(path: str, module: nn.Module, line: ModuleSplit, peers: Peers) -> CutModule:
    """A module that a line of the plan cuts, or a PlannerError where it cannot."""
    fits = isinstance(module, nn.Linear) or (
        isinstance(module, nn.Embedding) and line.split in ("vocab", "sequence")
    )
    if not fits or type(module).forward not in (nn.Linear.forward, nn.Embedding.forward):
        raise PlannerError(
            f"a {line.split} split does not fit a module of class {type(module).__name__}",
            value=path,
            remedy="column, row, vocab cut nn.Linear, vocab nn.Embedding; for others write split: replicate, or "
            "plan with --fix tp=1",
            key=f"modules.{path}",
        )
    size = 0
    if isinstance(module, nn.Linear):
        size = module.in_features if line.split == "row" else module.out_features
        if line.split != "vocab" and size % peers.size:
            raise PlannerError(
                f"tp {peers.size} divides the features that a {line.split} split cuts",
                value=f"{path}: {size}",
                remedy="write split: replicate for the modules that are cut together, or plan with another tp",
                key=f"modules.{path}",
            )
    elif isinstance(module, nn.Embedding):
        size = module.num_embeddings
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise PlannerError(
                "a table that is cut looks up, and does nothing else",
                value=path,
                remedy="leave out max_norm, scale_grad_by_freq and sparse, or write split: replicate",
                key=f"modules.{path}",
            )
    return CutModule(path, module, line, peers, Source(path, size))


def forward_of(made: CutModule, shared: SharedInput) -> Callable[[Any], Callable[..., Any]]:
    """The forward of a cut module, as `replace_forward` takes it."""
    makers: dict[str, Any] = {
        "column": lambda: _columns(made, shared),
        "row": lambda: _rows(made),
        "sequence": lambda: _own_tokens(made),
        "vocab": lambda: _table(made) if isinstance(made.module, nn.Embedding) else _columns(made, shared),
    }
    forward = makers[made.plan.split]()
    return lambda _: forward


def _columns(made: CutModule, shared: SharedInput) -> Callable[..., Any]:
    """Some features on each rank; the gradient of what goes in is a sum. A padded vocabulary is gathered."""
    peers, size = made.peers, made.source.size

    def forward(input: Tensor) -> Tensor:  # noqa: A002  as torch calls it
        whole = shared(input, lambda x: gathered(x, peers, gradient="partial"))
        own = F.linear(whole, made.matrix, made.weight("bias"))
        if made.plan.split == "vocab" and size % peers.size:
            padded = own.shape[-1] * peers.size
            return gathered(Cut.of(own, Along(own.dim() - 1, padded, peers)), peers)[..., :size]
        source = made.source if made.notes and made.plan.split == "column" else None
        return Cut.of(own, Along(own.dim() - 1, size, peers, made.parts, source, copies=made.source.copies))

    return forward


def _rows(made: CutModule) -> Callable[..., Any]:
    """The products of each rank's features, summed; then the bias, once."""
    layout = _layout(made)

    def forward(input: Tensor) -> Tensor:  # noqa: A002
        part = F.linear(own_features(input, made.peers), made.matrix)
        out = summed_up(part, layout, made.peers)
        bias = made.weight("bias")
        return out if bias is None else out + bias

    return forward


def _table(made: CutModule) -> Callable[..., Any]:
    """Each rank looks up the rows it has; the rest is zero, and the sum is whole."""
    table: Any = made.module
    rows = padded_vocab(made.source.size, made.peers.size) // made.peers.size
    first, layout = made.peers.rank * rows, _layout(made)
    padding = table.padding_idx
    silent = padding - first if padding is not None and first <= padding < first + rows else None

    def forward(input: Tensor) -> Tensor:  # noqa: A002
        own = input - first
        elsewhere = (own < 0) | (own >= rows)
        out = F.embedding(own.masked_fill(elsewhere, 0), made.matrix, padding_idx=silent)
        return summed_up(out.masked_fill(elsewhere[..., None], 0), layout, made.peers)

    return forward


def _own_tokens(made: CutModule) -> Callable[..., Any]:
    """A whole table in which each rank looks up its part of the sequence."""
    table: Any = made.module
    peers = made.peers

    def forward(input: Tensor) -> Tensor:  # noqa: A002
        length = input.shape[-1]
        require_divisible(length, peers, "tokens")
        along = Along(input.dim() - 1, length, peers, tokens=True)
        own = along.own(input, input.dim() - 1)
        out = F.embedding(own, entering(table.weight, peers), padding_idx=table.padding_idx)
        return Cut.of(out, along)

    return forward


def _layout(made: CutModule) -> Layout:
    if made.plan.output not in ("replicate", "sequence"):
        raise PlannerError(
            f"the output of a {made.plan.split} split is replicate or sequence",
            value=made.plan.output,
            remedy="set output: replicate",
            key=f"modules.{made.path}.output",
        )
    return made.plan.output
