"""Where a rank's parts lie in a whole weight: together they are the whole, each value once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner.execute import parts
from planner.execute.parameters import Piece

CASES = {
    "rows": ((12, 4), [Piece(0, 2, 0)]),
    "fused, of unequal parts": ((12, 4), [Piece(0, 2, 0, parts=(8, 2, 2))]),
    "padded": ((10, 4), [Piece(0, 4, 0, padded=12)]),
    "columns, then rows": ((4, 12), [Piece(1, 2, 0), Piece(0, 2, 0)]),
}


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_parts_of_all_ranks_are_the_whole(case: str, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, cuts = CASES[case]
    whole = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)
    filled = torch.zeros(shape)
    for number in range(cuts[0].count):
        pieces = tuple(Piece(cut.dim, cut.count, number, cut.padded, cut.parts) for cut in cuts)
        held = whole
        for piece in pieces:
            held = piece.of(held)
        rows = -(-held.shape[0] // shards)
        for shard in range(shards):
            module = nn.Module()
            module.weight = nn.Parameter(held[shard * rows : (shard + 1) * rows])
            monkeypatch.setattr(parts, "pieces_of", lambda *_, own=pieces: own)
            monkeypatch.setattr(parts, "chunk_of_state", lambda _, own=shard: (0, shards, own))
            found = parts.parts_of(module, {"weight": ("kept", shape)}, {"weight": module.weight})
            for path, kept, boxes in found:
                assert (path, kept) == ("weight", "kept")
                for box in boxes:
                    assert box.whole == shape
                    place = tuple(slice(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
                    assert not filled[place].any(), "a value of two parts"
                    filled[place] = box.tensor.detach()
    covered = filled != 0
    assert torch.equal(filled[covered], whole[covered])
    assert bool(covered.all()) == (len(cuts) == 1), "of two cuts by one number each rank has a diagonal block"
