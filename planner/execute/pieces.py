"""The memory of a step in any order, put together from what each kind of action does to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from planner.spec.orders import Action, Kind

SAMPLED = 3  # microbatches that show each action once for the first time and twice after others


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What happens to memory in a part of a step: by how much it grows, and by how much at its fullest."""

    net_bytes: int
    top_bytes: int


def piece_of(changes: Iterable[int]) -> Piece:
    """Of allocations and releases in the order in which they came."""
    sums = list(accumulate(changes, initial=0))
    return Piece(net_bytes=sums[-1], top_bytes=max(sums))


def fullest(pieces: Iterable[Piece]) -> int:
    """Bytes at the fullest moment of pieces one after another."""
    held = most = 0
    for piece in pieces:
        most = max(most, held + piece.top_bytes)
        held += piece.net_bytes
    return most


class Repeated:
    """Pieces of one rank's actions by virtual stage and kind, the first of each apart.

    The first forward fills buffers and the first backward makes gradients. If those after it do one and the same
    whatever ran before them, which `found` tells, a step in any order is made of these pieces.
    """

    def __init__(self, actions: Sequence[Action], pieces: Sequence[Piece]) -> None:
        self.before, *parts, self.after = pieces
        self.first: dict[tuple[Kind, int], Piece] = {}
        self.later: dict[tuple[Kind, int], Piece] = {}
        self.found = True
        for action, piece in zip(actions, parts, strict=True):
            key = action.kind, action.stage
            if key not in self.first:
                self.first[key] = piece
            else:
                self.found &= self.later.setdefault(key, piece) == piece

    def peak(self, actions: Iterable[Action]) -> int:
        """Bytes at the fullest moment of a step in this order."""
        seen: set[tuple[Kind, int]] = set()
        pieces = [self.before]
        for action in actions:
            key = action.kind, action.stage
            pieces.append((self.later if key in seen else self.first)[key])
            seen.add(key)
        return fullest([*pieces, self.after])


def sample_order(stages: Sequence[int], kinds: Sequence[Kind]) -> tuple[Action, ...]:
    """Three microbatches through a rank's virtual stages, so that each kind follows itself and the others.

    `kinds` are those of a backward: one, or its input part and its weight part.
    """
    *sooner, last = kinds
    turns: list[tuple[Sequence[Kind], int]] = [(("F",), 0), (("F",), 1), (kinds, 0), (("F",), 2)]
    turns += [(sooner, 1), (sooner, 2), ((last,), 1), ((last,), 2)]
    return tuple(
        Action(kind, stage, number)
        for turn, number in turns
        for stage in (stages if "F" in turn else tuple(reversed(stages)))
        for kind in turn
    )
