"""Memory put together from pieces is that of the whole, and pieces that differ are noticed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from planner.execute.pieces import Piece, Repeated, fullest, piece_of, sample_order
from planner.spec.orders import Kind


def test_pieces_reach_what_their_changes_reach() -> None:
    changes = [[5, 3, -4], [-4, 9, -2], [7, -14]]
    assert piece_of(changes[0]) == Piece(net_bytes=4, top_bytes=8)
    assert piece_of([]) == Piece(net_bytes=0, top_bytes=0)
    whole = piece_of(change for part in changes for change in part)
    assert fullest(map(piece_of, changes)) == whole.top_bytes == 14


@pytest.mark.parametrize("kinds", [("B",), ("I", "W")])
def test_a_sample_shows_each_kind_three_times_and_backwards_after_their_forwards(kinds: Sequence[Kind]) -> None:
    order = sample_order((1, 4), kinds)
    for stage in (1, 4):
        own = [action for action in order if action.stage == stage]
        for number in range(3):
            assert [action.kind for action in own if action.microbatch == number] == ["F", *kinds]
    assert len(order) == 3 * 2 * (1 + len(kinds))


def test_a_later_action_that_differs_forbids_to_put_together() -> None:
    order = sample_order((0,), ("B",))
    forward, backward = Piece(net_bytes=4, top_bytes=6), Piece(net_bytes=-4, top_bytes=1)
    made = {"F": forward, "B": backward}
    rest = Piece(net_bytes=0, top_bytes=0)
    alike = [rest, *(made[action.kind] for action in order), rest]
    held = [action for action in order if action.kind == "F"] + [action for action in order if action.kind == "B"]
    assert Repeated(order, alike).found
    assert Repeated(order, alike).peak(held) == 14
    assert not Repeated(order, [*alike[:-2], forward, rest]).found
