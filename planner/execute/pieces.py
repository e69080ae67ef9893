"""The memory of a step in any order, put together from what each kind of action does to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from planner.spec.orders import Action, Kind

_Case = tuple[Kind, int, bool]  # an action of a virtual stage, and whether it is the first such


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
    """Pieces of one rank's actions by virtual stage and kind, the first ones apart.

    If those of one case are the same, which `found` tells, a step of these cases is made of them in any order.
    """

    def __init__(self, actions: Sequence[Action], pieces: Sequence[Piece]) -> None:
        self.before, *parts, self.after = pieces
        self.known: dict[_Case, Piece] = {}
        self.found = True
        for case, piece in zip(_cases(actions), parts, strict=True):
            self.found &= self.known.setdefault(case, piece) == piece

    def peak(self, actions: Sequence[Action]) -> int | None:
        """Bytes at the fullest moment of a step in this order; none where a case of it was not shown."""
        cases = list(_cases(actions))
        if not self.known.keys() >= set(cases):
            return None
        return fullest([self.before, *(self.known[case] for case in cases), self.after])


def _cases(actions: Iterable[Action]) -> Iterator[_Case]:
    """The first forward fills buffers, the first backward, or weight part of one, makes sums of gradients."""
    seen: set[tuple[Kind, int]] = set()
    for kind, stage, _ in actions:
        yield kind, stage, (kind, stage) not in seen
        seen.add((kind, stage))


def sample_order(stages: Sequence[int], *, split: bool) -> tuple[Action, ...]:
    """Microbatches through a rank's virtual stages that show every case, and but for the first ones twice.

    `split`: backward in an input part and a weight part.
    """
    kinds: Sequence[Kind] = ("I", "W") if split else ("B",)
    turns: list[tuple[Kind, int]] = [("F", 0), ("F", 1), *((kind, 0) for kind in kinds), ("F", 2)]
    turns += [(kind, number) for kind in kinds for number in (1, 2)]
    return tuple(
        Action(kind, stage, number)
        for kind, number in turns
        for stage in (stages if kind == "F" else tuple(reversed(stages)))
    )
