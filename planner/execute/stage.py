"""The part of a decoder that one pipeline rank runs. Every module keeps the path it has in the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.models.block import Block
from planner.models.embedding import Embedding, Head
from planner.models.norms import make_norm
from planner.models.positions import Positions, make_positions
from planner.spec.model import ModelSpec
from planner.spec.paths import Span


class Stage(nn.Module):
    """Tokens or activations → activations or logits, for the layers of one virtual stage.

    What the executor asks of it, whatever model it is cut from (`adapters.stage_of` cuts):

    - Paths are those of the unsplit model. `blocks` are its own layers by number; `embedding`, `norm` and
      `head` are None where another stage has them. The first stage has the embedding, the last norm and head.
    - `forward(x, length)`: x is tokens [batch, length], or what an earlier stage gave: one tensor [batch,
      length, hidden] in the layout between blocks. The result is never a view of x.
    - `spec` tells what splits, sharding, recompute and seeds need to know of the model.
    - `tie_weights` shares the table with the head where the model does and both are here. It is called again
      after a split, and after memory was given to a stage built on meta.
    - A rank that holds scattered parts of longer sequences says so in `positions_of` and `length_factor`.
    - It is built on the meta device; `weights.fill` gives memory and values, by path.
    """

    spec: ModelSpec
    blocks: nn.ModuleDict
    embedding: Embedding | None
    norm: nn.Module | None
    head: nn.Module | None
    length_factor: int
    positions_of: Callable[[int, torch.device], Tensor] | None

    shifts_labels = False  # whether labels are the tokens themselves, and each place predicts the next one

    @property
    def embedding_modules(self) -> list[nn.Module]:
        """What holds the tables of tokens and positions."""
        return [] if self.embedding is None else [self.embedding]

    @property
    def projection(self) -> nn.Module | None:
        """What holds the head's matrix."""
        return None if self.head is None else self.get_submodule("head.projection")

    def plan_path(self, path: str) -> str:
        """The path at which a plan speaks of a module."""
        return path

    def fused_widths(self, path: str) -> tuple[int, ...]:
        """Of the parts of what a module gives at once, each of which is cut; empty where it gives one thing."""
        return ()

    def tie_weights(self) -> None:
        """Share the table with the head where the model does and both are here."""
        if self.spec.tied_embeddings and self.embedding is not None and self.projection is not None:
            self.projection.weight = self.embedding.tokens.weight

    def forward(self, x: Tensor, length: int) -> Tensor:
        """x: tokens [batch, length], or activations that an earlier stage sent."""
        if not (self.embedding or self.blocks or self.norm or self.head):
            return x.clone()  # a stage that only hands on
        if self.embedding is not None:
            x = self.embedding(x)
        positions = self.make_positions(x, length)
        for block in self.blocks.values():
            x = self.run_block(block, x, positions)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.head is None else self.logits(x, self.head)

    def run_block(self, block: nn.Module, x: Tensor, positions: Positions) -> Tensor:
        """One layer."""
        out: Tensor = block(x, positions)
        return out

    def logits(self, x: Tensor, head: nn.Module) -> Tensor:
        """What the head gives."""
        out: Tensor = head(x)
        return out

    def make_positions(self, like: Tensor, length: int) -> Positions:
        """Those of this rank's tokens."""
        table = make_positions(self.spec, like, length * self.length_factor)
        if self.positions_of is None or table.cos is None or table.sin is None:
            return table
        rows = self.positions_of(length, like.device)
        return table._replace(cos=table.cos[rows], sin=table.sin[rows])


class DecoderStage(Stage):
    """A stage of a bundled decoder."""

    head: Head | None

    def __init__(self, spec: ModelSpec, layers: Span, *, first: bool = True, last: bool = True) -> None:
        super().__init__()
        if spec.kind != "decoder":
            raise PlannerError(
                "the executor runs decoders",
                value=f"kind: {spec.kind}",
                remedy="use a model of kind: decoder",
                key="kind",
            )
        self.spec = spec
        self.length_factor = 1  # of the sequence to this rank's part of it
        self.positions_of = None
        self.embedding = Embedding(spec) if first else None
        own = range(layers.first, layers.last + 1)
        self.blocks = nn.ModuleDict({str(layer): Block(spec, layer) for layer in own})
        self.norm = make_norm(spec, spec.hidden) if last and spec.final_norm else None
        self.head = Head(spec) if last else None
        self.tie_weights()


def build_stage(
    spec: ModelSpec,
    layers: Span,
    *,
    first: bool = True,
    last: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> DecoderStage:
    """A stage with memory of its own and no values yet."""
    with torch.device("meta"):
        stage = DecoderStage(spec, layers, first=first, last=last).to(dtype)
    stage.to_empty(device=device)
    stage.tie_weights()
    return stage
