"""Memory put together from pieces is that of the whole, and pieces that differ are noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, product

import pytest

from planner.execute.pieces import Piece, Repeated, fullest, piece_of, sample_order
from planner.spec.orders import Action


def test_pieces_reach_what_their_changes_reach() -> None:
    changes = [[5, 3, -4], [-4, 9, -2], [7, -14]]
    assert piece_of(changes[0]) == Piece(net_bytes=4, top_bytes=8)
    assert piece_of([]) == Piece(net_bytes=0, top_bytes=0)
    whole = piece_of(change for part in changes for change in part)
    assert fullest(map(piece_of, changes)) == whole.top_bytes == 14


@pytest.mark.parametrize("split", [False, True])
def test_a_sample_is_an_order_and_shows_what_follows_what(split: bool) -> None:
    order = sample_order((1, 4), split=split)
    kinds = ("I", "W") if split else ("B",)
    for stage in (1, 4):
        own = [action for action in order if action.stage == stage]
        for number in {action.microbatch for action in order}:
            assert [action.kind for action in own if action.microbatch == number] == ["F", *kinds]
        pairs = Counter(pairwise(action.kind for action in own if action.kind in kinds))
        assert all(pairs[pair] for pair in product(kinds, kinds))


def pieces_of(order: Sequence[Action], odd: int = -1) -> list[Piece]:
    """Each kind one piece, but for the action at one place."""
    made = {"F": (4, 6), "B": (-4, 1), "I": (1, 2), "W": (-5, 0)}
    some = [made[action.kind] if place != odd else (0, 0) for place, action in enumerate(order)]
    return [Piece(net_bytes=net, top_bytes=top) for net, top in ((0, 0), *some, (0, 0))]


def test_an_order_is_put_together_from_its_pieces() -> None:
    order = sample_order((0,), split=False)
    held = [action for action in order if action.kind == "F"] + [action for action in order if action.kind == "B"]
    assert Repeated(order, pieces_of(order)).peak(held) == 14


@pytest.mark.parametrize("split", [False, True])
def test_an_action_that_differs_from_its_like_forbids_to_put_together(split: bool) -> None:
    order = sample_order((0,), split=split)
    assert Repeated(order, pieces_of(order)).found
    assert not Repeated(order, pieces_of(order, odd=len(order) - 1)).found


def test_what_the_sample_did_not_show_is_not_made_up() -> None:
    order = sample_order((0,), split=True)
    assert Repeated(order, pieces_of(order)).peak(order) is not None
    assert Repeated(order[:4], pieces_of(order[:4])).peak(order) is None
